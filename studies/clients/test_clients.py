"""Tests of the study of clients: its rows, a model in transformers, and a missing client."""

import json
import subprocess
import sys

import pytest

from shared import works
from studies import runner
from studies.clients import models
from studies.clients.rows import CONTROL, Answer, Row, compare, figures, table
from studies.clients.study import WORKER, Clients, error_line

# Two prompts, three steps; the reference's tokens are 7 8 9 and 1 2 3.
LIKED = [
    [{"7": 2.0, "1": 1.5}, {"8": 3.0, "4": 2.995}, {"9": 1.0, "5": 0.0}],
    [{"1": 2.0, "7": 1.0}, {"2": 1.0, "6": 0.5}, {"3": 4.0, "5": 3.0}],
]


def row(model, client, tokens):
    return Row(model, client, "1.0", tie=0.01, answers=compare(LIKED, tokens))


def test_the_first_other_token_counts():
    assert compare(LIKED, [[7, 8, 9], [1, 2, 3]]) == (Answer(), Answer())
    near, far = compare(LIKED, [[7, 4, 5], [7, 2, 3]])
    assert (near.at, near.gap) == (1, pytest.approx(0.005))
    assert (far.at, far.gap) == (0, 1.0)
    # A token whose logit was not kept counts as infinitely far below.
    assert compare(LIKED, [[7, 8, 9], [1, 2, 99]])[1] == Answer(2, float("inf"))
    with pytest.raises(ValueError):
        compare(LIKED, [[7, 8], [1, 2, 3]])


def test_a_near_tie_is_no_agreement():
    rows = [
        row("a", "one", [[7, 8, 9], [1, 2, 3]]),
        row("a", "two", [[7, 4, 9], [1, 2, 3]]),
        row("a", "three", [[7, 4, 9], [1, 6, 3]]),
        Row("a", "four", refused="isingcut says no"),
        Row("a", "five", error="RuntimeError: no", original="failed"),
        Row("a", "six"),
        row("a", CONTROL, [[7, 4, 9], [7, 2, 3]]),
        row("b", CONTROL, [[7, 8, 9], [1, 2, 3]]),
    ]
    assert [r.outcome for r in rows] == [
        *(
            "agrees",
            "near-ties",
            "differs",
            "refused",
            "failed",
            "failed",
            "differs",
            "agrees",
        )
    ]
    assert rows[2].counts == (0, 1, 1)
    assert figures(rows) == {
        "clients_agree": 1,
        "clients_near_ties": 1,
        "clients_refused": 1,
        "clients_failed": 3,
        "clients_failed_uncut": 1,
        "controls_noticed": 1,
    }
    lines = table(rows)
    assert "    prompt 0, token 1: 0.005 below the reference's highest logit" in lines
    assert lines[lines.index("    RuntimeError: no") - 1].endswith(
        "failed; the uncut original failed"
    )
    assert "    isingcut says no" in lines


def test_a_cut_model_answers_in_transformers_as_the_skipped_one(tmp_path, monkeypatch):
    # In this process, where torch is loaded.
    monkeypatch.setattr(models, "_isingcut", works)
    words = ["--models=llama", "--envs", str(tmp_path), "--new-tokens=2"]
    words += [f"--work={tmp_path}/work"]
    runner.run(Clients, words)
    runner.run(
        Clients, [*words, "--collect", "--results", str(tmp_path / "clients.json")]
    )
    rows = runner.read(tmp_path / "clients.json")["rows"]
    assert [(r["client"], r["outcome"]) for r in rows] == [
        ("transformers", "agrees"),
        (CONTROL, "differs"),
    ]


def test_an_error_is_one_line_with_what_the_program_said():
    log = "load: error loading model: unknown pre-tokenizer\nllama_load: failed\n"
    assert error_line("ValueError: cannot load\nmore", log) == (
        "ValueError: cannot load (load: error loading model: unknown pre-tokenizer)"
    )
    assert error_line("ValueError: no", "ValueError: no\n") == "ValueError: no"


def test_a_client_that_is_not_there_is_an_answer(tmp_path):
    job = tmp_path / "job.json"
    answer = tmp_path / "answer.json"
    job.write_text(json.dumps({"model": "none", "prompts": [[1]], "new_tokens": 1}))
    # -S: without site-packages, so that no client is installed.
    worker = [sys.executable, "-S", str(WORKER)]
    subprocess.run([*worker, "vllm", str(job), str(answer)], check=True)
    assert json.loads(answer.read_text()) == {
        "versions": {},
        "error": "ModuleNotFoundError: No module named 'vllm'",
    }
