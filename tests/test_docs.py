"""The documentation is correct: its code runs, its commands exist, its pages are linked."""

import contextlib
import functools
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
import typer
import yaml

import isingcut
from isingcut.cli import main as cli
from isingcut.energies import registry as energies
from isingcut.evaluation.metrics import registry as metrics
from isingcut.healing.repairs import registry as repairs
from isingcut.options.declaration import from_yaml
from shared import (
    ArchitectureError,
    RunConfig,
    load_json,
    parametrize,
    refuses,
    write_words,
)
from tiny import tiny_checkpoint

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
PAGES = sorted(p.name for p in DOCS.glob("*.md"))
NO_COMMANDS = "api experiments index limits physics rooms safety solvers tour"
WITHOUT_COMMANDS = {f"docs/{page}.md" for page in NO_COMMANDS.split()}
VERBS = typer.main.get_command(cli.app).commands


def script(path):
    """Import a script outside the package as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass of the module looks its annotations up there.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def blocks(page, language):
    """Return the fenced code blocks of one language."""
    text = page.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the my-model and my-text.txt that the pages use."""
    tiny_checkpoint("llama", tmp_path / "my-model", num_hidden_layers=10)
    write_words(tmp_path / "my-text.txt")
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
@parametrize("page", ["extending.md", "constraints.md"])
def test_code_on_pages_runs(page, place, monkeypatch):
    for registry in (energies, metrics, repairs):
        monkeypatch.setattr(registry, "_registered", {})
    space = {"__name__": "page"}
    code = blocks(DOCS / page, "python")
    assert code
    for block in code:
        exec(compile(block, page, "exec"), space)


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_the_python_example_runs(place, capsys, no_speed, monkeypatch):
    few = functools.partial(isingcut.prune, patch_tokens=2000, report_samples=4)
    monkeypatch.setattr(isingcut, "prune", few)
    script(ROOT / "examples/prune.py").main("my-model", "smaller")
    assert "blocks (" in capsys.readouterr().out
    assert load_json(Path("smaller/config.json")).num_hidden_layers == 4


def test_the_config_file_example_is_read():
    config = RunConfig(**from_yaml(RunConfig, ROOT / "examples/run.yaml")).validate()
    assert config.removal == "6"


def commands(text):
    """Yield every `isingcut VERB ...` in code blocks and inline code, as a list of words."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = [code for language, code in fences if language in ("", "bash", "sh", "text")]
    code += re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    code += re.findall(r"`(isingcut [^`\n]*)`", text)
    for line in "\n".join(code).splitlines():
        for part in re.split(r"&&|\|\||\||;|\$\(|\)", line.partition(" #")[0]):
            if re.match(r"\s*(\$ )?isingcut\s", part):
                part = part.replace("$ ", "", 1).replace("...", "").strip()
                # A command inside $( ) was cut out of a quoted string.
                yield shlex.split(
                    part if part.count('"') % 2 == 0 else part.strip('"')
                )[1:]


def wrong(found):
    """Yield the commands that name a verb or an option that does not exist."""
    for words in found:
        named = [w for w in words if not w.startswith("-")]
        if not named or named[0] == "VERB":
            continue
        parameters = getattr(VERBS.get(named[0]), "params", ())
        known = {"--debug", "--help", *(o for p in parameters for o in p.opts)}
        typed = {w.partition("=")[0] for w in words if w[:2] == "--"}
        if named[0] not in VERBS or not typed <= known:
            yield " ".join(words)


@parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{p}" for p in PAGES),
        *(f"examples/{p.name}" for p in SCRIPTS),
    ],
)
def test_commands_exist_with_their_options(page):
    text = (ROOT / page).read_text()
    if page.endswith(".sh"):
        text = "```bash\n" + text.replace("say isingcut", "isingcut") + "```\n"
    found = list(commands(text))
    # Without this, a page whose commands are not recognised would pass.
    assert bool(found) == (page not in WITHOUT_COMMANDS)
    assert list(wrong(found)) == []


def test_a_command_that_does_not_exist_is_found():
    page = """```bash
isingcut solve my-run --remove 4 && isingcut slove my-run
```
`isingcut rank my-run --random-sates 9`, `isingcut VERB --debug`, `isingcut --help`
"""
    assert list(wrong(commands(page))) == [
        "slove my-run",
        "rank my-run --random-sates 9",
    ]


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        if isinstance(entry, dict):
            return [p for value in entry.values() for p in pages(value)]
        return [p for value in entry for p in pages(value)]

    assert {*pages(config["nav"])} == {
        str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")
    }
    assert config["strict"] is True
    assert config["theme"]["font"] is False


def test_the_site_ships_no_scripts():
    pathspec = pytest.importorskip("pathspec")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    left_out = pathspec.GitIgnoreSpec.from_lines(config["exclude_docs"].splitlines())
    scripts = [p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.py")]
    assert "make_options.py" in scripts
    assert [
        p for p in [*scripts, "__pycache__/a.pyc"] if not left_out.match_file(p)
    ] == []


def test_the_tables_of_options_are_those_declared():
    made = script(DOCS / "make_options.py").page()
    assert (DOCS / "options.md").read_text() == made, "run docs/make_options.py"


def test_the_table_of_stages_is_that_declared():
    rooms = script(DOCS / "make_rooms.py")
    assert rooms.PAGE.read_text() == rooms.page(), "run docs/make_rooms.py"


def test_the_table_of_the_docs_shows_which_layer_absorbs(tmp_path):
    patches = script(DOCS / "make_patches.py")
    found = {f: patches.absorbers(f, tmp_path / f) for f in ("nemotron_h", "qwen3_moe")}
    *_, hybrid, experts = patches.table(found).splitlines()
    assert "`mixer.out_proj` (mamba2); `mixer.shared_experts.down_proj` (moe)" in hybrid
    assert (
        "`mlp.down_proj` (attention+mlp) | `self_attn.o_proj` (attention+moe)"
        in experts
    )
    with refuses("blocks pass more than the residual stream", ArchitectureError):
        patches.absorbers("gemma4", tmp_path / "gemma4")


def test_the_architectures_are_those_of_the_sweep():
    make = script(DOCS / "make_architectures.py")
    assert make.PAGE.read_text() == make.page(), "run docs/make_architectures.py"


def test_pictures_are_small_and_self_contained():
    make = script(DOCS / "pictures/make.py")
    shown = {
        name
        for page in DOCS.rglob("*.md")
        for name in re.findall(r"pictures/(\w+)\.svg", page.read_text())
    }
    assert shown == set(make.PICTURES)
    for name in shown:
        text = (DOCS / "pictures" / f"{name}.svg").read_text()
        assert len(text) < 100_000
        assert not re.search(r'(href|src)="http', text)


def test_pictures_are_drawn(tmp_path):
    make = script(DOCS / "pictures/make.py")
    make.main(tmp_path)
    assert {p.stem for p in tmp_path.glob("*.svg")} == set(make.PICTURES)


def test_the_tour_shown_is_the_tour_of_the_script():
    source = pytest.importorskip("jupytext").read(ROOT / "examples/tour.py")
    shown = load_json(ROOT / "examples/tour.ipynb")
    cells = ["".join(c["source"]) for c in shown.cells]
    assert cells == [c.source for c in source.cells]
    page = (DOCS / "tour.md").read_text()
    assert all(cell in page for cell in cells)
    code = [c for c in shown.cells if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    assert "Traceback" not in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_the_tour_runs(place, monkeypatch, tmp_path):
    """The cells run in this process, where torch is loaded; a notebook's kernel is not ours."""

    def execute(notebook):
        space = {}
        for cell in (c for c in notebook.cells if c.cell_type == "code"):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                exec(compile(cell.source, "tour.py", "exec"), space)
            cell.outputs = [nbformat.v4.new_output("stream", text=said.getvalue())]

    monkeypatch.setenv("TOUR_MODEL", "my-model")
    monkeypatch.setenv("TOUR_TEXT", "my-text.txt")
    make = script(ROOT / "examples/make_tour.py")
    monkeypatch.setattr(
        make.NotebookClient, "execute", lambda client: execute(client.nb)
    )
    make.main(tmp_path)
    assert "10 blocks before, 7 after" in (tmp_path / "tour.md").read_text()


def test_no_function_trusts_remote_code_by_default():
    files = Path(isingcut.__file__).parent.rglob("*.py")
    wrong = [f for f in files if "trust_remote_code: bool = True" in f.read_text()]
    assert not wrong
