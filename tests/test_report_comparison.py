"""The page that compares several runs, and what it says of runs that cannot be compared."""

import pytest

from isingcut.errors import InputError, OutputExistsError
from isingcut.files.writing import read_json
from pages import Page
from run_files import hamiltonian, write_comparison, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


def compared(*runs, out):
    warnings = write_comparison([(r, r) for r in runs], out)
    return Page(out.read_text(encoding="utf-8")), warnings


def test_two_energies_on_one_text_differ_in_nothing_else(run, tmp_path):
    other = write_run(tmp_path / "other", energy="hessian", extras=False)
    page, warnings = compared(run, other, out=tmp_path / "c.html")
    assert warnings == []
    assert "They differ in energy; everything else is the same." in page.text
    assert "energy of states of run states of other" in page.text
    assert len(page.classed("mark")) == 2 * 50 + 3 * 1 + 3 * (2 + 1)


def test_the_energies_are_judged_on_each_others_states(run, tmp_path):
    from scipy.stats import spearmanr

    other = write_run(tmp_path / "other", energy="hessian", extras=False)
    turned = hamiltonian(12, 1)
    type(turned)(-turned.h, -turned.J).save(other / "hamiltonian.safetensors")
    page, _ = compared(run, other, out=tmp_path / "c.html")
    found = read_json(run / "candidates.json", "candidates")
    rows = [*found["candidates"], *found["random"]]
    value = spearmanr([r["energy"] for r in rows], [r["kl"] for r in rows]).statistic
    assert f"run: pairwise {value:.2f} {value:.2f}" in page.text
    assert f"other: hessian −{value:.2f} −{value:.2f}" in page.text


def test_what_is_not_comparable_is_said(run, tmp_path):
    model = write_run(tmp_path / "m", model="b-model", n=16, m=4, extras=False)
    text = write_run(tmp_path / "t", seed=1, extras=False)
    (text / "candidates.json").unlink()
    page, warnings = compared(run, model, text, out=tmp_path / "c.html")
    said = " ".join(warnings)
    assert "different models" in said
    assert "different tokens" in said
    assert "different numbers of blocks: 3 and 4" in said
    assert "Not ranked, so without losses: t." in said
    assert all(w in page.text for w in warnings)
    assert "Each energy on every run" not in page.text


def test_a_comparison_that_exists_is_not_replaced(run, tmp_path):
    out = tmp_path / "c.html"
    out.write_text("mine")
    places = [(run, run), (run, run / "remove-2")]
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError):
            write_comparison(places, out, overwrite=overwrite)
    assert out.read_text() == "mine"
    out.unlink()
    write_comparison(places, out)
    with pytest.raises(OutputExistsError, match="already exists"):
        write_comparison(places, out)
    write_comparison(places, out, overwrite=True)
    assert "remove-2" in out.read_text()


def test_the_command_line_compares_folders(run, tmp_path, monkeypatch, capsys):
    from isingcut.runs.solving import report

    monkeypatch.chdir(tmp_path)
    answer = report([run, run / "remove-2"])
    assert answer.data["comparison"] == "compare.html"
    with pytest.raises(InputError, match="no results for --remove 7"):
        report([run, run], remove="7")
    with pytest.raises(InputError, match="--out"):
        report([run], out=tmp_path / "x.html")
    one = report([run])
    one.show()
    assert one.data["html"] in capsys.readouterr().out
