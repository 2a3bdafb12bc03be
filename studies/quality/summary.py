"""Tables and figures of the quality study, computed from a results file alone."""

from __future__ import annotations

from math import exp
from typing import Any

from studies.quality.tables import OURS
from studies.runner import Content


def show(content: Content) -> dict[str, float]:
    """Print all tables and return the figures that the file has data for."""
    p = content["provenance"]
    print(f"{p['model']} ({p['dtype']})")
    for name, text in content["judged"].items():
        print(
            f"judged on {name}: {text['tokens']} tokens in {text['samples']} samples, "
            f"original perplexity {text['original_ppl']:.2f}"
        )
    for table in content["tables"]:
        _table(table, p["tokens_chosen_on"].get(table["chosen_on"]))
    _accuracy(content.get("accuracy", []))
    _estimators(content.get("estimators", []))
    print()
    return _figures(content)


def _table(table: Content, pool: int) -> None:
    losses = table["losses"]
    texts = [t for t in losses if t != "pooled"]
    texts += ["pooled"] * (len(texts) > 1)
    print(
        f"\nM = {table['remove']}, chosen on {table['chosen_on']} ({pool} tokens): KL to the "
        "original, nats/token, and perplexity (* lowest, ~ within its paired 95 % interval)"
    )
    head = "".join(f"{t:>12}{'ppl':>11}" for t in texts)
    print(f"{'method':<28}{'runs':>5}{'passes':>8}{'heads':>7}{head}")
    last = losses[texts[-1]]["kl"]["methods"]
    for entry in sorted(
        table["methods"], key=lambda e: float(last[e["method"]]["value"])
    ):
        name = entry["method"]
        cells = ""
        for text in texts:
            kl = losses[text]["kl"]
            nll = losses[text]["nll"]
            loss = nll["methods"][name]["value"]
            perplexity = f"{exp(loss):.2f}" if loss < 20 else "> 1e8"
            cells += f"{kl['methods'][name]['value']:>11.4f}{_mark(kl, name)}"
            cells += f"{perplexity:>10}{_mark(nll, name)}"
        print(
            f"{name:<28}{len(entry['runs']):>5}{entry['passes']:>8.1f}"
            f"{entry['heads']:>7.0f}{cells}"
        )
    for name in OURS:
        for text in texts:
            if name in losses[text]["kl"]:
                words = [
                    f"{w.upper()} {_against(losses[text][w][name])}"
                    for w in ("kl", "nll")
                ]
                print(f"  {name} on {text}: {'; '.join(words)}")


def _mark(losses: Content, name: str) -> str:
    found = losses["methods"]
    if found[name]["value"] == found[losses["lowest"]]["value"]:
        return "*"
    return "~" if found[name]["over_lowest_interval"][0] <= 0 else " "


def _against(c: Content) -> str:
    low, high = c["ratio_interval"]
    state = (
        "lowest" if c["lowest"] else "within" if c["within_interval"] else "NOT within"
    )
    return f"{c['ratio']:.3f} ({low:.3f} to {high:.3f}) of {c['best_other']}, {state}"


def _accuracy(rows: list[Content]) -> None:
    if not rows:
        return
    tasks = sorted(rows[0]["tasks"])
    usual = {t: rows[0]["usual"].get(t, "acc") for t in tasks}
    print(
        "\naccuracy, % (standard error); "
        + ", ".join(f"{t}: {usual[t]}" for t in tasks)
    )
    print(
        f"{'method':<28}{'M':>4}" + "".join(f"{t:>15}" for t in tasks) + f"{'mean':>8}"
    )
    for row in sorted(rows, key=lambda r: (r["remove"], r["method"])):
        found = [row["tasks"][t][usual[t]] for t in tasks]
        cells = [f"{100 * f['value']:.1f} ({100 * f['se']:.1f})" for f in found]
        mean = 100 * sum(f["value"] for f in found) / len(found)
        words = "".join(f"{cell:>15}" for cell in cells)
        print(f"{row['method']:<28}{row['remove']:>4}{words}{mean:>8.1f}")


def _estimators(parts: list[Content]) -> None:
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
            between = f"{a['spearman_low']:.2f} to {a['spearman_high']:.2f}"
            print(
                f"{name:<32}{a['spearman']:>9.2f}{between:>18}{e['random']['spearman']:>13.2f}"
                f"{e['ground_kl']:>11.3f}{e['best_of_lowest_kl']:>16.3f}"
            )


def _figures(content: Content) -> dict[str, float]:
    """Return the figures by name; `studies.quality.study` defines them."""
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
    return found


def _over_all(tables: list[Content]) -> dict[str, float]:
    """Return the figures over all numbers of removals together."""
    views = [v for t in tables for text, v in t["losses"].items() if text != "pooled"]
    ours = [v[metric]["refined"] for v in views for metric in ("kl", "nll")]
    pooled = [t["losses"]["pooled"]["kl"]["methods"] for t in tables]
    everywhere = set.intersection(*(set(p) for p in pooled))
    means = {m: sum(p[m]["value"] for p in pooled) / len(pooled) for m in everywhere}
    others = [v for m, v in means.items() if m not in OURS]
    found = {
        "refined_lowest_or_within": sum(
            o["lowest"] or o["within_interval"] for o in ours
        )
        / len(ours),
        "refined_mean_kl_over_best_baseline": means["refined"] / min(others),
    }
    prices = [_over_sleb(t, unit) for t in tables for unit in ("passes", "heads")]
    return found | {"refined_price_over_sleb": max(prices)}


def _over_sleb(table: Content, unit: str) -> Any:
    entries = {e["method"]: e for e in table["methods"]}
    return max(r[unit] for r in entries["refined"]["runs"]) / entries["sleb"][unit]
