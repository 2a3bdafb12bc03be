"""The command line of the sweep: every architecture in a process of its own, and one table."""

import functools
import gc
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import isingcut
from cards import fake_cards
from isingcut.formats.libraries import quiet_transformers
from isingcut.models.verify import reload
from isingcut.testing.tiny import FAMILIES, tiny_checkpoint
from sweep.conformance import Report, check_entry, check_family, entries
from sweep.sample import SAMPLE

# Limits for one architecture.
_SECONDS = 600
_BYTES = 4 * 10**9
OUTCOMES = ("passed", "refused", "failed", "not built")
# Results of all architectures, for docs/make_architectures.py.
RESULTS = Path(__file__).with_name("results.jsonl")
PACKAGE = Path(isingcut.__file__).parent


def code():
    """Return the version of transformers, and a hash of the code that cuts and of the checks."""
    digest = hashlib.sha256()
    for folder in (PACKAGE / "formats", PACKAGE / "models", RESULTS.parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return {"transformers": transformers.__version__, "code": digest.hexdigest()}


def main(names):
    """Check these model types and families; return 1 if one failed.

    Without names: the sample, but all if the code is not that of the last check of all.
    """
    found = {e: e.model_type for e in entries()}
    now = code()
    known = json.loads(RESULTS.read_text().splitlines()[0]) == now
    if unknown := sorted(set(names) - {*FAMILIES, *found.values()}):
        sys.exit(f"transformers has no causal or image-text model type {unknown[0]!r}")
    families = [f for f in names or FAMILIES if f in FAMILIES]
    tasks = [(f"{f} (family)", check_family, f) for f in families]
    wanted = (e for e, model_type in found.items() if not names or model_type in names)
    # Both mappings give some types the same class: one check is the result of both.
    twins = {}
    tasks += [(e.name, check_entry, twins.setdefault(e.built, e)) for e in wanted]
    if known and not names:
        tasks = [task for task in tasks if task[0] in SAMPLE]
        assert len(tasks) == len(SAMPLE), "a name of the sample is unknown"
    with tempfile.TemporaryDirectory() as room:
        # Forked, so that torch and transformers are imported once. A first model imports what they
        # import late and compiles their patterns; frozen objects are not searched for garbage.
        with quiet_transformers(), fake_cards():
            reload(tiny_checkpoint("llama", Path(room, "first")), dtype=torch.float32)
        gc.freeze()
        context = multiprocessing.get_context("fork")
        with context.Pool(os.cpu_count(), _limit, maxtasksperchild=1) as pool:
            start = functools.cache(
                lambda *what: pool.apply_async(_check, (*what, room))
            )
            pending = [(name, start(*what)) for name, *what in tasks]
            print(
                "| architecture | outcome | blocks | cuts | difference | gate | remarks |"
            )
            print("|---|---|---|---|---|---|---|")
            reports = [_report(*task) for task in pending]
    failed = any(r.outcome == "failed" for r in reports)
    if not (names or known or failed):
        facts = [r.facts() for r in reports[len(families) :]]
        lines = map(json.dumps, [now, *facts])
        RESULTS.write_text("\n".join(lines) + "\n")
    for outcome in OUTCOMES:
        count = sum(r.outcome == outcome for r in reports)
        print(f"architectures_{outcome.replace(' ', '_')}: {count}")
    split = [r for r in reports if r.outcome == "passed"]
    print(f"sublayer_sweep_passed: {sum(not r.unsplit for r in split)} of {len(split)}")
    print(f"kv_bytes_wrong: {sum(bool(r.kv_wrong) for r in reports)}")
    with_mtp = [r for r in reports if r.mtp and (r.states or r.outcome == "failed")]
    kept = [r for r in with_mtp if r.outcome != "failed"]
    print(f"mtp_heads_found: {sum(r.mtp.count for r in with_mtp)}")
    print(f"mtp_heads_kept: {sum(r.mtp.count for r in kept)}")
    print(
        f"mtp_generate_equal: {int(any(r.drafts for r in kept) and kept == with_mtp)}"
    )
    return int(failed)


def _check(check, what, room):
    """Check one architecture in a temporary folder, which is deleted with its checkpoints."""
    with tempfile.TemporaryDirectory(dir=room) as folder:
        return check(what, Path(folder))


def _report(name, result):
    """Return the report of an architecture, and print it as a row of the table."""
    try:
        r = replace(result.get(_SECONDS), name=name)
    except multiprocessing.TimeoutError:
        reason = f"no result within {_SECONDS} s: too slow, or its process died"
        r = Report(name, "failed", reason=reason)
    mtp = ""
    if r.mtp:
        mtp = (
            f"MTP: {r.mtp.prefix}{'N' if r.mtp.numbered_on else '0'}"
            + ", drafts" * r.drafts
        )
    remarks = "; ".join(
        filter(None, (r.reason or r.rows, r.unseen, r.unsplit, r.kv_wrong, mtp))
    ).replace("|", "/")
    cells = (
        r.kinds,
        r.states,
        f"{r.difference:.1e}",
        "sublayer" if r.sublayer else "block",
    )
    print(
        f"| {name} | {r.outcome} | {' | '.join(map(str, cells))} | {remarks} |",
        flush=True,
    )
    return r


def _limit():
    """Limit how much memory this process may take beyond the present, and silence its output."""
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
