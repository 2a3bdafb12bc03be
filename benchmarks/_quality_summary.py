"""Print the tables of a results file, and one line a figure; nothing is computed from parts."""

from __future__ import annotations

from typing import Any

OURS = ("refined", "refined-joint")
"""Entries of the product's own search: neither is a baseline of the other."""


def show(content: dict[str, Any]) -> None:
    """All tables, then the figures."""
    p = content["provenance"]
    print(f"{p['model']} ({p['dtype']}, sha256 {p['settings']['model_sha256'][:16]})")
    for name, text in content["judged"].items():
        print(
            f"judged on {name}: {text['tokens']} tokens in {text['samples']} samples, "
            f"original perplexity {text['original_ppl']:.2f}"
        )
    for table in content["tables"]:
        _table(table, p["tokens_chosen_on"].get(table["chosen_on"]))
    _accuracy(content["accuracy"])
    _estimators(content["estimators"])
    _large(content["large"])
    minutes = ", ".join(f"{stage} {value:g}" for stage, value in content["minutes"].items())
    print(f"\nminutes: {minutes}\n")
    for name, value in figures(content).items():
        print(f"{name}: {value:.4g}")


def _table(table: dict[str, Any], pool: int | None) -> None:
    losses = table["losses"]
    texts = [t for t in losses if t != "pooled"]
    if len(texts) > 1:
        texts.append("pooled")
    print(
        f"\nM = {table['remove']}, chosen on {table['chosen_on']} ({pool} tokens): KL to the "
        "original, nats/token, and perplexity (* lowest, ~ within its paired 95 % interval)"
    )
    head = "".join(f"{t:>12}{'ppl':>11}" for t in texts)
    print(f"{'method':<28}{'runs':>5}{'passes':>8}{'heads':>7}{head}")
    last = losses[texts[-1]]["kl"]["methods"]
    for entry in sorted(table["methods"], key=lambda e: float(last[e["method"]]["value"])):
        name = entry["method"]
        cells = ""
        for text in texts:
            kl, nll = losses[text]["kl"], losses[text]["nll"]
            cells += f"{kl['methods'][name]['value']:>11.4f}{_mark(kl, name)}"
            cells += f"{_perplexity(nll['methods'][name]['value']):>10}{_mark(nll, name)}"
        runs, passes, heads = len(entry["runs"]), entry["passes"], entry["heads"]
        print(f"{name:<28}{runs:>5}{passes:>8.1f}{heads:>7.0f}{cells}")
    for name in OURS:
        for text in texts:
            if name not in losses[text]["kl"]:
                continue
            words = []
            for metric in ("kl", "nll"):
                c = losses[text][metric][name]
                low, high = c["ratio_interval"]
                state = (
                    "lowest" if c["lowest"] else "within" if c["within_interval"] else "NOT within"
                )
                words.append(
                    f"{metric.upper()} {c['ratio']:.3f} ({low:.3f} to {high:.3f}) of "
                    f"{c['best_other']}, rank {c['rank']:g} of {c['of']}, {state}"
                )
            print(f"  {name} on {text}: {'; '.join(words)}")


def _mark(losses: dict[str, Any], name: str) -> str:
    found = losses["methods"]
    if found[name]["value"] == found[losses["lowest"]]["value"]:
        return "*"
    return "~" if found[name]["over_lowest_interval"][0] <= 0 else " "


def _perplexity(nll: float) -> str:
    from math import exp

    return f"{exp(nll):.2f}" if nll < 20 else "> 1e8"


def _accuracy(rows: list[dict[str, Any]]) -> None:
    tasks = sorted({task for row in rows for task in row["tasks"]})
    if not tasks:
        return
    usual = rows[0].get("usual", {})
    print(
        "\naccuracy, % (standard error); " + ", ".join(f"{t}: {usual.get(t, 'acc')}" for t in tasks)
    )
    print(f"{'method':<28}{'M':>4}" + "".join(f"{t:>15}" for t in tasks) + f"{'mean':>8}")
    for row in sorted(rows, key=lambda r: (r["remove"], r["method"])):
        cells, values = "", []
        for task in tasks:
            found = row["tasks"].get(task, {}).get(usual.get(task, "acc"))
            if found is None:
                cells += f"{'-':>15}"
                continue
            values.append(100 * found["value"])
            text = f"{values[-1]:.1f} ({100 * found['se']:.1f})"
            cells += f"{text:>15}"
        mean = f"{sum(values) / len(values):.1f}" if len(values) == len(tasks) else "-"
        print(f"{row['method']:<28}{row['remove']:>4}{cells}{mean:>8}")


def _estimators(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        print(
            f"\nSpearman with the measured KL, M = {part['remove']}, {part['tokens_judged']} "
            f"unseen instruction tokens; states: {part['distribution']}"
        )
        print(
            f"{'energy':<32}{'Spearman':>9}{'95 % interval':>18}{'random only':>13}"
            f"{'ground KL':>11}{'best of lowest':>16}"
        )
        for name, e in part["energies"].items():
            a = e["all"]
            between = f"{_number(a['spearman_low'])} to {_number(a['spearman_high'])}"
            print(
                f"{name:<32}{_number(a['spearman']):>9}{between:>18}"
                f"{_number(e['random']['spearman']):>13}{e['ground_kl']:>11.3f}"
                f"{e['best_of_lowest_kl']:>16.3f}"
            )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _large(found: dict[str, Any]) -> None:
    for name, run in found.items():
        more = ""
        if "generations" in run:
            more = f", {run['generations']} of {run['published_generations']} generations"
        print(
            f"\n{name} on {run['pool_tokens']} tokens, M = {run['remove']}: "
            f"{run['passes']:.1f} passes{more}"
        )
        print(f"{'million token-passes':>22}{'KL on the judged texts':>25}")
        for step in run["trace"]:
            kl = "not judged" if step["kl"] is None else f"{step['kl']:.4f}"
            print(f"{step['token_passes'] / 1e6:>22.3f}{kl:>25}")


def figures(content: dict[str, Any]) -> dict[str, float]:
    """Every figure by name, as far as the file holds it; defined in `benchmarks/quality.py`."""
    first = content["tables"][0]["chosen_on"] if content["tables"] else None
    tables = [
        t
        for t in content["tables"]
        if t["chosen_on"] == first and "refined" in t["losses"]["pooled"]["kl"]
    ]
    found: dict[str, float] = {}
    for table in tables:
        ratio = table["losses"]["pooled"]["kl"]["refined"]["ratio"]
        found[f"refined_kl_over_best_baseline_{table['remove']}"] = ratio
    if tables:
        found |= _over_all(tables)
    for name in ("pairwise", "empirical-fisher-2048"):
        for part in content["estimators"]:
            value = part["energies"].get(name, {}).get("all", {}).get("spearman")
            if value is not None:
                found[f"spearman_{name.replace('-', '_')}_{part['remove']}"] = value
    return found | _tokens_to_match(content["large"])


def _over_all(tables: list[dict[str, Any]]) -> dict[str, float]:
    """What is said of all numbers of removals together."""
    views = [v for t in tables for text, v in t["losses"].items() if text != "pooled"]
    ranks = [v["kl"]["refined"]["rank"] for v in views]
    lowest = [
        v[metric]["refined"]["lowest"] or v[metric]["refined"]["within_interval"]
        for v in views
        for metric in ("kl", "nll")
    ]
    found = {
        "refined_mean_rank": sum(ranks) / len(ranks),
        "refined_lowest_or_within": sum(lowest) / len(lowest),
    }
    pooled = [t["losses"]["pooled"]["kl"]["methods"] for t in tables]
    everywhere = set.intersection(*(set(p) for p in pooled))
    means = {m: sum(p[m]["value"] for p in pooled) / len(pooled) for m in everywhere}
    others = [v for m, v in means.items() if m not in OURS]
    if others:
        found["refined_mean_kl_over_best_baseline"] = means["refined"] / min(others)
    for unit, name in (("passes", "evaluations"), ("heads", "heads")):
        over = []
        for table in tables:
            entries = {e["method"]: e for e in table["methods"]}
            if "sleb" in entries:
                paid = max(r[unit] for r in entries["refined"]["runs"])
                over.append(paid / entries["sleb"][unit])
        if over:
            found[f"refined_{name}_over_sleb"] = max(over)
    return found


def _tokens_to_match(large: dict[str, Any]) -> dict[str, float]:
    """Tokens of `refined` over those of the long evolution, to the evolution's final KL."""
    if not {"evopress", "refined"} <= set(large):
        return {}
    final = large["evopress"]["trace"][-1]
    reached = [
        step["token_passes"]
        for step in large["refined"]["trace"]
        if step["kl"] is not None and final["kl"] is not None and step["kl"] <= final["kl"]
    ]
    if not reached:
        return {}
    spent = large["evopress"]["passes"] * large["evopress"]["pool_tokens"]
    return {"refined_tokens_over_evopress": min(reached) / spent}
