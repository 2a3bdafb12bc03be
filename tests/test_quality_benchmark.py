"""The quality benchmark on a tiny model: every part against a direct computation."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.errors import InputError, IsingcutError
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.testing.tiny import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _quality_collect as collecting
import _quality_evolution as evolution
import quality
from _quality_bench import Bench
from _quality_judge import Judged, load_judged, rows_chosen
from _quality_methods import Choosing
from _quality_store import Part, Speed, Stage, Store, drive

WORDS = ["the", "cat", "sat", "on", "a", "mat", "rain", "fell", "over", "old", "stone", "town"]


def text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words))


FILES = {
    "arc_easy": "arc_easy/test_sub500.jsonl",
    "hellaswag": "hellaswag/val_sub500.jsonl",
    "piqa": "piqa/val_sub500.jsonl",
    "winogrande": "winogrande/dev_sub500.jsonl",
    "lambada": "lambada/test_sub500.jsonl",
}


def write(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


@pytest.fixture(scope="module")
def data(shared) -> Path:
    """The data folder in small: the same files, random words."""
    return shared.folder("quality-data", write_data)


def write_data(folder: Path) -> None:
    chats = [
        {
            "messages": [
                {"role": "user", "content": text(2 * k, 3)},
                {"role": "assistant", "content": text(2 * k + 1, 5)},
            ]
        }
        for k in range(340)
    ]
    write(folder / "calib_instruct/mix1000.jsonl", chats[:330])
    write(folder / "calib_instruct/other.jsonl", [*chats[310:320], *chats[330:]])
    for name in ("wikitext2/test_raw", "calib_text/c4_300"):
        write(folder / f"{name}.jsonl", [{"text": text(k, 60)} for k in range(12)])
    choices = {"arc_easy": 4, "hellaswag": 4, "piqa": 2, "winogrande": 2}
    for task, k in choices.items():
        blank = " _ and" if task == "winogrande" else ""
        records = [
            {
                "context": text(q, 4) + blank,
                "choices": [text(10 * q + c, 1 + c) for c in range(k)],
                "answer": q % k,
            }
            for q in range(3)
        ]
        write(folder / FILES[task], records)
    write(folder / FILES["lambada"], [{"text": text(k, 8)} for k in range(3)])
    (folder / "own.txt").write_text(text(100, 600), encoding="utf-8")
    (folder / "judge.txt").write_text(text(101, 600), encoding="utf-8")


@pytest.fixture(scope="module")
def model(llama) -> Path:
    return llama


def arguments(model: Path, data: Path, work: Path, *more: str) -> list[str]:
    sizes = [
        "--pool",
        "3",
        "--search-pool",
        "3",
        "--length",
        "24",
        "--judged-tokens",
        "72",
        "--chat-length",
        "60",
    ]
    where = ["--model", str(model), "--data", str(data), "--work", str(work)]
    own = ["--calibration", str(data / "own.txt"), "--remove", "2", "--dtype", "float32"]
    return [*where, *own, *sizes, "--batch-tokens", "96", "--quiet", *more]


@pytest.fixture(scope="module")
def finished(model, data, shared) -> tuple[Bench, dict]:
    """One whole run at the standard texts, all stages, and what was collected."""

    def make(work: Path) -> None:
        quality.main(whole(model, data, work))
        quality.main([*whole(model, data, work), "--collect"])

    work = shared.folder("quality-work", make)
    content = json.loads((work / "result.json").read_text(encoding="utf-8"))
    return Bench(quality.parser().parse_args(whole(model, data, work))), content


def whole(model: Path, data: Path, work: Path) -> list[str]:
    typed = arguments(
        model, data, work, "--second-remove", "2", "--accuracy-remove", "2", "--seeds", "2"
    )
    typed += ["--estimator-remove", "2,3", "--estimator-sizes", "3,6", "--estimator-tokens", "60"]
    typed += ["--lowest", "3", "--random-states", "5", "--results", str(work / "result.json")]
    return [*typed, "--large-pool", "5", "--large-remove", "2", "--large-minutes", "0.02"]


def test_losses_of_the_tables_are_those_of_the_states(finished):
    bench, content = finished
    first = content["tables"][0]
    assert (first["chosen_on"], first["remove"]) == ("own", 2)
    names = {e["method"] for e in first["methods"]}
    assert {"sleb", "pairwise", "pairwise-top20", "evopress", "refined", "random"} <= names
    plain = {e["method"]: e for e in first["methods"] if "merges" not in e}
    for name in ("wikitext2", "instruct"):
        found = measure(
            bench.replay,
            bench.judged(name),
            states_of(bench.n, [e["removed"] for e in plain.values()]),
        )
        for metric, expected in (("kl", found.kl), ("nll", found.nll)):
            rows = first["losses"][name][metric]["methods"]
            got = [rows[m]["value"] for m in plain]
            np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_an_evolution_pays_no_more_than_sleb(finished):
    _, content = finished
    for table in content["tables"]:
        entries = {e["method"]: e for e in table["methods"]}
        assert all(r["passes"] <= entries["sleb"]["passes"] for r in entries["evopress"]["runs"])


def test_figures_follow_from_the_collected_tables(finished, capsys):
    bench, content = finished
    quality.main(["--summary", "--results", str(Path(bench.options.work) / "result.json")])
    lines = capsys.readouterr().out.splitlines()
    last = lines[len(lines) - lines[::-1].index("") :]
    figures = {k: float(v) for k, v in (line.split(": ") for line in last)}
    kl = {
        m: v["value"] for m, v in content["tables"][0]["losses"]["pooled"]["kl"]["methods"].items()
    }
    others = [v for m, v in kl.items() if m not in ("refined", "refined-joint")]
    assert figures["refined_kl_over_best_baseline_2"] == pytest.approx(
        kl["refined"] / min(others), rel=1e-3
    )
    assert 1 <= figures["refined_mean_rank"] <= len(others) + 1
    assert 0 <= figures["refined_lowest_or_within"] <= 1
    assert figures["refined_mean_kl_over_best_baseline"] == pytest.approx(
        figures["refined_kl_over_best_baseline_2"], rel=1e-3
    )
    entries = {e["method"]: e for e in content["tables"][0]["methods"]}
    paid = max(r["passes"] for r in entries["refined"]["runs"])
    assert figures["refined_evaluations_over_sleb"] == pytest.approx(
        paid / entries["sleb"]["passes"], rel=1e-3
    )
    assert -1 <= figures["spearman_pairwise_3"] <= 1


def test_all_texts_and_tasks_are_judged_and_named(finished):
    _, content = finished
    assert set(content["judged"]) == {"wikitext2", "c4", "instruct"}
    assert {t["chosen_on"] for t in content["tables"]} == {"own", "instruct"}
    assert set(content["accuracy"][0]["tasks"]) == set(FILES)
    assert {row["remove"] for row in content["accuracy"]} == {0, 2}
    assert [p["remove"] for p in content["estimators"]] == [2, 3]
    assert set(content["large"]) == {"evopress", "refined"}
    assert content["large"]["evopress"]["trace"][-1]["kl"] > 0
    written = json.dumps(content)
    assert "/tmp" not in written
    assert str(Path.home()) not in written


def test_a_second_call_makes_nothing_again(finished, capsys):
    bench, _ = finished
    before = {p: p.stat().st_mtime_ns for p in bench.store.folder.rglob("*.json")}
    stages = quality.plan(bench)
    drive(stages, bench.store, bench.speed, only=(), minutes=1e9)
    assert "took" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in bench.store.folder.rglob("*.json")} == before


def test_the_estimator_is_that_of_the_first_conversations(finished):
    bench, content = finished
    source = str(bench.instruction_file("estimate"))
    tokens = bench.conversations(source, samples=6)
    own = EmpiricalFisher().measure(bench.replay, tokens.select(range(3)), Work())
    n = bench.n
    pairs = states_of(n, [(i, j) for i in range(n) for j in range(i + 1, n)])
    ground = pairs[int(np.argmin(own.energies(pairs)))]
    found = content["estimators"][0]["energies"]["empirical-fisher-3"]
    assert found["ground"] == np.flatnonzero(ground).tolist()
    assert found["all"]["n"] == 3 + 5


def test_no_instruction_record_serves_two_uses(finished):
    bench, _ = finished
    held = {
        use: set(bench.instruction_file(use).read_text(encoding="utf-8").splitlines())
        for use in ("judge", "choose", "estimate")
    }
    assert len(held["judge"]) == 300
    assert len(held["choose"]) == 30
    assert len(held["estimate"]) == 30 + 10
    assert not held["judge"] & (held["choose"] | held["estimate"])


def test_other_settings_are_refused(finished, model, data):
    bench, _ = finished
    typed = arguments(model, data, Path(bench.options.work), "--pool", "4")
    with pytest.raises(InputError, match="pool: 3 there, 4 now"):
        Bench(quality.parser().parse_args(typed))


def test_any_model_and_text_are_compared_in_one_call(model, data, tmp_path, capsys):
    typed = arguments(model, data, tmp_path / "w", "--seeds", "1")
    quality.main([*typed, "--judge", str(data / "judge.txt")])
    out = capsys.readouterr().out
    assert "refined_kl_over_best_baseline_2: " in out
    assert "refined_mean_rank: " in out
    assert (tmp_path / "w/quality.json").exists()


@pytest.mark.parametrize("search_pool", [3, 6])
def test_evolution_spends_its_budget_and_no_more(model, data, tmp_path, search_pool):
    typed = arguments(model, data, tmp_path, "--search-pool", str(search_pool))
    bench = Bench(quality.parser().parse_args(typed))
    choosing = Choosing(bench, "own", (3,))
    part, found = evolution.within(choosing, 3, 0, 9.0, Work())
    assert choosing.scale == search_pool / 3
    assert choosing.wide.input_ids[:3].tolist() == choosing.tokens.input_ids.tolist()
    # The price is that of the same evolution on the wide text, in passes over the pool.
    again = part.choose(bench.replay, choosing.wide, 3, Work(), 0)
    assert found.removed == again.removed
    assert found.passes == pytest.approx(again.passes * search_pool / 3)
    assert found.passes <= 9
    longer = evolution.evolution(choosing.wide, part.generations + 1, part.initial)
    more = longer.choose(bench.replay, choosing.wide, 3, Work(), 0)
    published = evolution.published_generations(bench.n, 3)
    assert more.passes * search_pool / 3 > 9 or part.generations == published


# accuracy ---------------------------------------------------------------------------------


def test_a_task_is_graded_as_by_hand(finished):
    bench, content = finished
    right = []
    lines = (bench.data / FILES["piqa"]).read_text().splitlines()
    for record in map(json.loads, lines):
        sums = []
        for choice in record["choices"]:
            prompt = tiny_tokenizer()(f"Question: {record['context']}\nAnswer:").input_ids
            ids = tiny_tokenizer()(f"Question: {record['context']}\nAnswer: {choice}").input_ids
            with torch.no_grad():
                logits = bench.loaded.model(input_ids=torch.tensor([ids])).logits[0]
            logp = torch.log_softmax(logits.double(), -1)
            sums.append(sum(float(logp[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        right.append(int(np.argmax(sums)) == record["answer"])
    found = content["accuracy"][0]["tasks"]["piqa"]["acc"]
    assert found["value"] == pytest.approx(np.mean(right), abs=1e-5)
    assert found["n"] == 3


# statistics and the driver -----------------------------------------------------------------


def test_intervals_are_paired():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 10.0, 40)
    counts = np.full(40, 10)
    sums = {"a": base, "b": base + 0.2, "c": base + rng.normal(9, 4, 40)}
    judged = {"text": Judged(sums, sums, base, counts)}
    found = collecting._compared(judged, {"refined": "b", "sleb": "a", "evopress": "c"}, "kl")
    ours = found["refined"]
    # Far smaller than the spread between samples, and certain: the same samples on both sides.
    assert ours["difference"] == pytest.approx(0.02, rel=1e-4)
    assert ours["best_other"] == "sleb"
    assert ours["difference_interval"] == pytest.approx([0.02, 0.02], rel=1e-3)
    assert not ours["within_interval"]
    se = found["methods"]["sleb"]["se"]
    assert se == pytest.approx(base.std(ddof=1) / 40**0.5 / 10, rel=1e-3)


def test_equal_states_share_a_rank():
    assert collecting._rank(np.array([1.0, 1.0, 0.5, 2.0]), 0, [1, 2, 3]) == 2.5


def test_the_median_run_stands_for_a_method():
    runs = [{"chosen": type("C", (), {"key": str(k)})(), "seed": k} for k in range(3)]
    assert collecting._median(runs, {"0": 3.0, "1": 1.0, "2": 2.0})["seed"] == 2


def test_the_driver_keeps_to_its_time_and_prefixes(tmp_path):
    store = Store(tmp_path, {"a": 1})
    made = []

    def part(name: str, needs: tuple[str, ...] = ()) -> Part:
        return Part(name, lambda journal: made.append(name) or {"x": 1}, needs=needs)

    stages = [Stage("all", lambda: [part("a/1"), part("b/1", ("a/9",)), part("b/2")])]
    assert drive(stages, store, Speed(1, 1), only=["b/"], minutes=1)
    assert made == ["b/2"]
    assert store.read("b/2")["x"] == 1
    assert drive(stages, store, Speed(1, 1), only=(), minutes=1)
    assert made == ["b/2", "a/1"]


def test_a_part_that_does_not_fit_waits(tmp_path):
    from _quality_store import Price

    store = Store(tmp_path, {})
    dear = Part("dear", lambda journal: {}, (Price(100, 1, 0),))
    cheap = Part("cheap", lambda journal: {}, (Price(1, 1, 0),))
    assert not drive([Stage("", lambda: [dear, cheap])], store, Speed(1, 1), only=(), minutes=1)
    assert store.done("cheap")
    assert not store.done("dear")


def test_a_part_that_fails_is_named_and_the_others_are_made(tmp_path, capsys):
    store = Store(tmp_path, {})

    def fail(journal: Path) -> dict:
        raise InputError("too few samples")

    parts = [Part("bad", fail), Part("good", lambda journal: {})]
    with pytest.raises(IsingcutError, match="1 parts failed: bad"):
        drive([Stage("", lambda: parts)], store, Speed(1, 1), only=(), minutes=1)
    assert store.done("good")
    assert "too few samples" in capsys.readouterr().out


def test_every_choice_is_judged(finished):
    bench, _ = finished
    for name in bench.judged_on:
        judged = load_judged(bench, name)
        assert judged is not None
        assert {r["chosen"].key for r in rows_chosen(bench)} <= set(judged.kl)
