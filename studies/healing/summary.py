"""Tables and figures of the results files of the healing study."""

from __future__ import annotations

from math import exp

import numpy as np

from isingcut.measure.losses import standard_error
from studies.runner import Content

OURS = "isingcut"
PEERS = ("block-influence", "angular-window", "sleb")
STAGES = ("cut", "patched", "tuned", "healed")


def show(content: Content) -> dict[str, float]:
    """Print the tables; gives the figures."""
    if "rows" in content:
        return _show_patches(content)
    settings, figures = content["settings"], {}
    print(f"states: {content['states_from']}; settings: {settings}")
    for m, rows in content["removals"].items():
        _table(m, rows)
        _tuning(rows)
        _trial(rows)
        figures |= {f"{name}_{m}": value for name, value in _figures(rows).items()}
    prefix = "coder_" if settings.get("model") == "coder" else ""
    return {prefix + name: value for name, value in figures.items()}


def paired(first: Content, second: Content, what: str) -> tuple[float, float, int]:
    """Nats a token that the second has more than the first on the same samples of some texts.

    Returns:
        the difference, its standard error and the number of samples.
    """
    name = f"sample_{what}"
    gaps = np.concatenate([np.subtract(second[k][name], first[k][name]) for k in first])
    counts = np.concatenate([first[k]["sample_tokens"] for k in first])
    error = float(standard_error(gaps[None], counts)[0])
    return float(gaps.sum() / counts.sum()), error, len(counts)


def _table(m: str, rows: Content) -> None:
    print(f"\n{m} blocks removed")
    header = f"{'':<17}{'stage':<9}{'perplexity':>11}{'KL':>8}{'+-':>7}{'recovered':>10}"
    print(f"{header}  perplexity/KL by text; blocks; tokens seen")
    for method in (p for p in (OURS, *PEERS) if p in rows):
        row = rows[method]
        for stage in (s for s in STAGES if s in row["stages"]):
            pooled, texts = row["stages"][stage]["pooled"], row["stages"][stage]["texts"].items()
            won = f"{'':>10}" if stage == "cut" else f"{_recovered(row, stage):9.1f}%"
            tail = ", ".join(f"{k} {exp(t['nll']):.2f}/{t['kl']:.3f}" for k, t in texts)
            if stage == "cut":
                tail += "; " + " ".join(map(str, row["removed"]))
            if stage == "healed":
                tail += f"; {row['tokens_seen']} tokens"
            print(
                f"{method:<17}{stage:<9}{exp(pooled['nll']):>11.3f}{pooled['kl']:>8.4f}"
                f"{pooled['kl_se']:>7.4f}{won}  {tail}"
            )


def _tuning(rows: Content) -> None:
    """The tuned patch against the one by least squares, with 95 % intervals."""
    stages = rows[OURS]["stages"]
    if not {"patched", "tuned"} <= set(stages):
        return
    before, after = (stages[stage]["texts"] for stage in ("patched", "tuned"))
    for name in ("all texts", *before):
        one, two = ((t if name == "all texts" else {name: t[name]}) for t in (before, after))
        found = {what: paired(one, two, what) for what in ("kl", "nll")}
        words = [f"{w.upper()} {gap:+.4f} ± {1.96 * se:.4f}" for w, (gap, se, _) in found.items()]
        print(f"  tuned minus least squares, {name}, nats, 95 %: {', '.join(words)}")


def _trial(rows: Content) -> None:
    """What a few steps of healing showed of the candidates, and whose state was chosen."""
    ours = rows[OURS]
    if not (chosen := ours["healed_state_of"]) or not ours["trial"]:
        return
    for method, row in rows.items():
        if trial := row["trial"]:
            gap, error, samples = paired({"": ours["trial"]}, {"": trial}, "kl")
            print(
                f"  trial of {method}'s state: KL {trial['kl']:.4f}, perplexity "
                f"{exp(trial['nll']):.3f}; KL minus that of {OURS}'s {gap:+.4f} ± {error:.4f}, "
                f"paired over {samples} samples"
            )
    whose = "its own state" if chosen == OURS else f"the state of {chosen}"
    print(f"  {OURS} chose {whose} after trial; its healed stage is of that state")


def _recovered(row: Content, stage: str) -> float:
    """Percent of the lost log-perplexity that is back at a stage."""
    cut, now = (row["stages"][s]["pooled"] for s in ("cut", stage))
    return float(100 * (cut["nll"] - now["nll"]) / (cut["nll"] - cut["original_nll"]))


def _figures(rows: Content) -> dict[str, float]:
    ours, found = rows[OURS], dict[str, float]()
    for name, stage in (("recovered_percent", "healed"), ("patch_percent", "tuned")):
        if stage in ours["stages"]:
            found[name] = _recovered(ours, stage)
    peers = [p for p in PEERS if p in rows and "healed" in rows[p]["stages"]]
    if "healed" not in ours["stages"] or len(peers) < len(PEERS):
        return found

    def nll(method: str, stage: str) -> float:
        return float(rows[method]["stages"][stage]["pooled"]["nll"])

    best = min(peers, key=lambda p: nll(p, "healed"))
    ratio = exp(nll(OURS, "healed") - nll(best, "healed"))
    texts = [rows[p]["stages"]["healed"]["texts"] for p in (best, OURS)]
    _, error, samples = paired(*texts, "nll")
    same = rows[ours["healed_state_of"]]["removed"] == rows[best]["removed"]
    print(
        f"  healed: perplexity of {OURS} over that of the best peer ({best}): {ratio:.3f} ± "
        f"{ratio * error:.3f}, paired over {samples} samples" + (" (the same state)" * same)
    )
    found["healed_ppl_over_best_peer"] = ratio
    before = min(nll(p, "cut") for p in peers)
    return {**found, "cut_ppl_over_best_peer": exp(nll(OURS, "cut") - before)}


def _show_patches(content: Content) -> dict[str, float]:
    """Least-squares and tuned patches of our states, of `patches.json`."""
    print(f"{'':12} {'M':>3}  perplexity      KL  recovered  (KL by text, minus linear's ± se)")
    figures = {}
    for m, row in sorted(content["rows"].items(), key=lambda pair: int(pair[0])):
        sums, lost, kl = {}, {}, {}
        for stage, texts in row["stages"].items():
            counts = np.concatenate([t["tokens"] for t in texts.values()])
            sums[stage] = {name: np.array(t["sums"]) for name, t in texts.items()}
            before, after, kl[stage] = (
                np.concatenate([*sums[stage].values()], axis=1).sum(1) / counts.sum()
            )
            lost[stage] = after - before
            by = []
            for name, (_, _, each) in sums[stage].items():
                tokens = np.array(texts[name]["tokens"])
                words = f"{name} {each.sum() / tokens.sum():.4f}"
                if stage == "tuned":
                    gap = each - sums["linear"][name][2]
                    error = standard_error(gap[None], tokens)[0]
                    words += f" ({gap.sum() / tokens.sum():+.4f} ± {error:.4f})"
                by.append(words)
            share = 1 - lost[stage] / lost["cut"]
            print(
                f"{stage:12} {m:>3} {exp(after):11.3f} {kl[stage]:7.4f} {share:9.1%}  "
                + ", ".join(by)
            )
        for stage in ("linear", "tuned"):
            figures[f"{stage}_percent_{m}"] = float(100 * (1 - lost[stage] / lost["cut"]))
        figures[f"tuned_kl_over_linear_{m}"] = float(kl["tuned"] / kl["linear"])
    return figures
