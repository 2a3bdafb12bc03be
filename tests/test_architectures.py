"""Finding and replaying blocks, cutting configurations, legality, and the sweep."""

import copy

import torch
import yaml
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from isingcut.formats.architectures.blocks import text_config
from isingcut.formats.architectures.cuts import rename_pattern, renumber_blocks
from isingcut.models.verify import reload
from odd_models import prove_cut
from shared import (
    ArchitectureError,
    ModelError,
    cells,
    flags,
    load_json,
    parametrize,
    refuses,
    works,
)
from sweep import conformance
from sweep.caches import compare_cache
from sweep.conformance import Entry, check_entry, check_family
from sweep.shrink import tiny_configuration
from tiny import (
    Replay,
    cut_config,
    edit_config,
    excise,
    find_stack,
    forbids,
    inspect_model,
    random_tokens,
    skip_blocks,
    tiny_checkpoint,
    tiny_model,
    tiny_replay,
)

# `make architectures` checks all families, and every model type of transformers.
FAST = ["llama", "gemma4", "nemotron_h"]


@parametrize("family", FAST)
def test_conformance_of_a_family(family, tmp_path):
    report = check_family(family, tmp_path, states=2)
    assert report.outcome == ("refused" if family == "gemma4" else "passed"), (
        report.reason
    )
    assert report.states >= 1


@parametrize(
    "family, per_token",
    [
        # A latent of 16 and a rotary key of 8, in float32.
        ("deepseek_v3", [4 * (16 + 8)] * 6),
        ("mistral", [128] * 6),
        ("gpt2", [2 * 4 * 32] * 6),
        # The last three blocks use keys and values of earlier ones.
        ("gemma3n", [128] * 5 + [0] * 3),
    ],
)
def test_the_cache_is_counted_as_transformers_fills_it(family, per_token, tmp_path):
    source = tiny_checkpoint(family, tmp_path)
    stack = inspect_model(source).stack
    assert [b.kv_bytes_per_token for b in stack.blocks] == per_token
    assert compare_cache(reload(source, dtype=torch.float32), stack) == ""
    stack.blocks[0].kv_bytes_per_token += 1
    assert "of" in compare_cache(reload(source, dtype=torch.float32), stack)


def test_kinds_and_costs_of_a_hybrid(tmp_path):
    stack = inspect_model(tiny_checkpoint("nemotron_h", tmp_path)).stack
    assert stack.path == "model.layers"
    assert stack.kinds[:4] == ("mamba2", "moe", "attention", "mlp")
    mamba, moe, _, mlp = stack.blocks[:4]
    # Key and value of 2 heads of 8, in float32.
    assert [b.kv_bytes_per_token for b in stack.blocks[:4]] == [0, 0, 2 * 2 * 8 * 4, 0]
    convolution = (64 + 2 * 8) * 4
    recurrence = 8 * 8 * 8
    assert mamba.state_bytes == 4 * (convolution + recurrence)
    experts = 4 * 2 * 32 * 16
    assert moe.parameters - moe.active_parameters == experts // 2  # 2 of 4 experts
    assert mlp.parameters == mlp.active_parameters == 2 * 32 * 48 + 32
    assert mlp.bytes == 4 * mlp.parameters


def test_models_without_a_decoder_stack_are_refused():
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    )
    with refuses("encoder-decoder", ArchitectureError):
        find_stack(t5)
    no_stack = tiny_model("llama")
    no_stack.model.layers = nn.Sequential(*no_stack.model.layers)
    with refuses("has no block stack", ArchitectureError):
        find_stack(no_stack)


def test_skipping_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    tokens = torch.arange(10, 22)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with skip_blocks(model, [0]):
            assert not torch.equal(model(tokens).logits, before)
        assert torch.equal(model(tokens).logits, before)


# Model type, its fields, removed blocks, and fields of the cut.
FOLLOW = """
smollm3:
  before: {num_hidden_layers: 8}
  without: [0, 3]
  after: {no_rope_layers: [1, 1, 1, 1, 1, 0], num_hidden_layers: 6}
qwen2_moe:
  before: {num_hidden_layers: 6, decoder_sparse_step: 2, mlp_only_layers: [3]}
  without: [0, 5]
  after: {decoder_sparse_step: 1, mlp_only_layers: [1, 2, 3], num_hidden_layers: 4}
qwen2:
  before: {num_hidden_layers: 6, max_window_layers: 3}
  without: [1, 5]
  after: {max_window_layers: 2}
deepseek_v3:
  before: {num_hidden_layers: 8}
  without: [0, 2, 7]
  after: {first_k_dense_replace: 1, num_hidden_layers: 5}
ernie4_5_moe:
  before: {num_hidden_layers: 6, moe_layer_end_index: 4}
  without: [1, 4]
  after: {moe_layer_end_index: 2}
llama4_text:
  before: {num_hidden_layers: 6, interleave_moe_layer_step: 2}
  without: [0, 1]
  after: {moe_layers: [1, 3]}
bamba:
  before: {num_hidden_layers: 6, attn_layer_indices: [1, 4]}
  without: [0, 1]
  after: {attn_layer_indices: [2]}
recurrent_gemma:
  before: {num_hidden_layers: 6}
  without: [0, 4]
  after: {block_types: [recurrent, attention, recurrent, attention]}
jamba:
  before: {num_hidden_layers: 8, attn_layer_period: 4, attn_layer_offset: 2}
  without: [4, 5, 6, 7]
  after: {attn_layer_period: 4, attn_layer_offset: 2, num_hidden_layers: 4}
bloom:
  before: {num_hidden_layers: 6, n_layer: 6}
  without: [2]
  after: {n_layer: 5, num_hidden_layers: 5}
someone-elses:
  before: {num_hidden_layers: 4, layer_types: [a, b, c, d]}
  without: [1]
  after: {layer_types: [a, c, d]}
"""


@parametrize("model_type, row", yaml.safe_load(FOLLOW).items())
def test_per_layer_fields_follow(model_type, row):
    config = {"model_type": model_type, **row["before"]}
    before = copy.deepcopy(config)
    cut = cut_config(config, row["without"])
    assert config == before
    assert cut.items() >= row["after"].items()


# Changed fields of a llama of six blocks :: expected line.
UNKNOWN = r"""
{my_layer_scales: [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]} :: 'my_layer_scales' looks per-layer
{special_layers: [0, 3]} :: 'special_layers' looks per-layer
{layer_modes: {"0": a, "3": b}} :: 'layer_modes' looks per-layer
{router_layer_period: 3} :: 'router_layer_period' looks per-layer
{layer_types: [full_attention]} :: not a valid llama .* `layer_types` \(1\)
{num_attention_heads: four} :: not a valid llama configuration
{model_type: gpt2, n_layer: 6, scale_attn_by_inverse_layer_idx: true} :: scaled
{model_type: diffllama} :: depends on the block number
{model_type: unheard-of, num_hidden_layers: null} :: how many blocks
{model_type: unheard-of, global_attn_every_n_layers: 3} :: write layer_types out
"""


@parametrize("changes, message", cells(UNKNOWN))
def test_what_is_not_understood_is_named(changes, message):
    llama = {"model_type": "llama", "num_hidden_layers": 6, "hidden_size": 32}
    with refuses(message, ArchitectureError):
        cut_config({**llama, **yaml.safe_load(changes)}, [1])


# Family :: removed blocks :: expected line.
ILLEGAL = """
nemotron_h :: 2 6 :: at least one attention block stays
zamba2 :: 2 :: take turns with shared weights
gemma3n :: 4 :: read the keys and values of this sliding_attention block
gemma4 :: 7 :: has to be full attention in this family
rwkv :: 0 :: normalises the embeddings
rwkv :: 1 2 3 4 5 :: keep two
jamba :: 1 :: kinds repeat every 4 blocks
"""


@parametrize("family, removed, message", cells(ILLEGAL))
def test_illegal_states_are_refused_and_forbidden_to_the_solver(
    family, removed, message
):
    model = tiny_model(family)
    blocks = [int(i) for i in removed.split()]
    assert forbids(model, blocks)
    with refuses(message, ArchitectureError):
        cut_config(text_config(model).to_dict(), blocks)


# An entry without block 1 of 12 blocks and a layer behind them :: the entries that it becomes.
ENTRIES = r"""
model.layers.3.mlp :: model.layers.2.mlp
model.layers.1 ::
model.layers.11.mlp.gate :: model.layers.10.mlp.gate
model.layers.3.self_attn* :: model.layers.2.self_attn*
model.layers.1* :: model.layers.9.* model.layers.10.* model.layers.11.*
model.layers.*.mlp.gate :: model.layers.*.mlp.gate
re:.*layers\.4\.mlp.* :: re:.*layers\.3\.mlp.*
re:.*layers\.1.* :: re:.*layers\.9(?!\d).* re:.*layers\.10(?!\d).* re:.*layers\.11(?!\d).*
re:.*layers\.3(?!\d).* :: re:.*layers\.2(?!\d).*
re:.*layers\.4 :: re:.*layers\.3(?!\d)
re:model\.layers\.\d+\.mlp :: re:model\.layers\.\d+\.mlp
re:.*(layers|blocks)\.4\.mlp :: re:.*(layers|blocks)\.3\.mlp
re:.*(layers|x)\.\d+\.(a|b) :: re:.*(layers|x)\.\d+\.(a|b)
re:.*layers\.\d+\.a|.*h\.\d+\.b :: re:.*layers\.\d+\.a|.*h\.\d+\.b
vision_tower.encoder.layers.3.mlp :: vision_tower.encoder.layers.3.mlp
mtp.layers.0.mlp :: mtp.layers.0.mlp
model.layers.12.eh_proj :: model.layers.11.eh_proj
model.layers.13.eh_proj ::
"""


@parametrize("entry, expected", cells(ENTRIES))
def test_names_in_quantisation_lists(entry, expected):
    assert rename_pattern(entry, renumber_blocks(12, [1], 1)) == expected.split()


@parametrize(
    "pattern",
    [
        "model\\.layers\\.[0-3]\\.mlp",
        "model\\.layers\\.(?:\\d|1[01])\\.mlp",
        "(model\\.layers|blocks)\\.3\\.mlp",
        "(model\\.(layers|blocks))\\.3\\.mlp",
        "(model\\.layers\\.)3\\.mlp",
        "(layers\\.3\\.mlp|layers\\.4\\.mlp)",
        "layers\\.\\d+\\.mlp|layers\\.3\\.attn",
    ],
)
def test_a_pattern_that_cannot_be_renumbered_is_refused(pattern):
    with refuses("cannot be renumbered exactly", ArchitectureError):
        rename_pattern(f"re:{pattern}", renumber_blocks(12, [1]))


def test_inspection_reads_no_weights(tmp_path):
    source = tiny_checkpoint("nemotron_h", tmp_path / "source")
    shown = inspect_model(source)
    real = find_stack(tiny_model("nemotron_h"))
    assert shown.stack.kinds == real.kinds
    # The router's bias is stored, but is not a parameter.
    extra = [4 * 4 if kind == "moe" else 0 for kind in real.kinds]
    expected = [b.bytes + more for b, more in zip(real.blocks, extra, strict=True)]
    assert [b.bytes for b in shown.stack.blocks] == expected
    assert shown.other_bytes > 0
    assert shown.refusal == ""
    assert "at least one attention block stays" in shown.rules()[0]
    _, *runs, total = shown.table()
    # Adjacent blocks of one kind and cost share a row; the rows name every block once, in order.
    named = []
    for row in runs:
        first, _, last = row[0].partition("-")
        blocks = real.blocks[int(first) : int(last or first) + 1]
        assert {(b.kind, f"{b.parameters:,}") for b in blocks} == {(row[1], row[2])}
        named += [b.index for b in blocks]
    assert named == list(range(len(real)))
    assert total[4] == f"{sum(expected):,}"
    (source / "model.safetensors").unlink()
    assert inspect_model(source).stack.kinds == real.kinds


def test_inspection_says_why_a_model_is_refused(tmp_path):
    source = tiny_checkpoint(
        "gpt2", tmp_path / "a", scale_attn_by_inverse_layer_idx=True
    )
    assert "block number" in inspect_model(source).refusal
    with edit_config(source) as config:
        config["model_type"] = "none-such"
    with refuses("does not recognize this architecture", ModelError):
        inspect_model(source)


def test_a_forward_set_by_others_comes_back(spy):
    replay = tiny_replay("llama")
    calls = spy(replay.blocks[1], "forward")
    ids = random_tokens((12, 12)).input_ids
    with torch.no_grad():
        replay.record(ids)
        assert not calls
        replay.model(input_ids=ids, use_cache=False)
    assert len(calls) == 1


def test_a_block_that_returns_no_stream_is_refused(monkeypatch):
    class Odd(nn.Module):
        def forward(self, hidden_states):
            return {"hidden": hidden_states}

    class Model(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Odd()])

        def forward(self, input_ids, use_cache):
            return self.layers[0](torch.zeros(1, 4, 2))

    blocks_of = lambda model: list(model.layers)  # noqa: E731
    monkeypatch.setattr("isingcut.models.replay.stack_modules", blocks_of)
    with refuses("Odd", ArchitectureError):
        Replay(Model())


LAST = {
    "llama": 3,
    "qwen2_moe": 1,
    "gemma3": 5,
    "mamba2": 0,
    "nemotron_h": 2,
    "gpt2": 0,
}


@parametrize("family, stays", LAST.items())
def test_the_last_block_is_proven_and_found_again(family, stays, tmp_path):
    tiny_checkpoint(family, tmp_path / "source")
    model = tiny_model(family)
    kinds = find_stack(model).kinds
    removed = [i for i in range(len(kinds)) if i != stays]
    assert prove_cut(model, removed, tmp_path).difference <= 1e-5
    shown = inspect_model(tmp_path / "out")
    assert shown.stack.kinds == (kinds[stays],)
    assert not shown.refusal


def test_a_run_down_to_one_block_is_patched_and_evaluated(
    text, tmp_path, no_speed, refusal, typed
):
    model = tiny_checkpoint("llama", tmp_path / "two", num_hidden_layers=2)
    out = tmp_path / "run"
    further = {"calibration": text, "samples": 4, "length": 32, "patch_tokens": 1000}
    works("run", model, *flags({"remove": 1, "keep": 0, "out": out, **further}))
    assert load_json(out / "model/isingcut.json").patch.cuts
    evaluation = load_json(out / "evaluation.json")
    assert (evaluation.before.blocks, evaluation.after.blocks) == (2, 1)
    said = typed("inspect", out / "model").out
    assert "its one block stays: none can be removed" in said
    further["out"] = tmp_path / "further"
    for removal in ({"remove": 1}, {"budget": "params=10%"}):
        line = refusal("run", out / "model", *flags({**further, **removal}))
        assert line.endswith(
            "has a single block, which must stay; use a deeper model\n"
        )


ENTRY = Entry("llama", "AutoModelForCausalLM")


@parametrize(
    "model_type, field, kinds",
    [
        ("gemma3_text", "layer_types", {"sliding_attention", "full_attention"}),
        ("deepseek_v3", "mlp_layer_types", {"dense", "sparse"}),
        ("zamba2", "layers_block_type", {"linear_attention", "hybrid"}),
        (
            "nemotron_h",
            "layers_block_type",
            {"linear_attention", "full_attention", "moe"},
        ),
    ],
)
def test_a_tiny_configuration_keeps_every_kind_of_block(model_type, field, kinds):
    config = tiny_configuration(model_type)
    assert set(getattr(config, field, kinds)) >= kinds
    assert config.num_hidden_layers <= 8
    assert config.hidden_size == 64


def cut_another(source, removed, out, **options):
    """Make a wrong cut: remove the block after each requested one."""
    return excise(source, [(i + 1) % 6 for i in removed], out, **options)


def test_a_wrong_cut_is_reported_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(conformance, "excise", cut_another)
    report = check_entry(ENTRY, tmp_path, states=1)
    assert report.outcome == "failed"
    assert "differs from the original" in report.reason


def test_what_a_library_raises_is_a_failure(tmp_path, fails):
    fails(conformance, "find_stack", KeyError("expert_layer_period"))
    report = check_entry(ENTRY, tmp_path, states=1)
    assert report.outcome == "failed"
    assert report.reason == "KeyError: 'expert_layer_period'"
