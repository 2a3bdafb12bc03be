"""Fields that count or index blocks: cut with them, a legality row, or an error that names them."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from isingcut.formats.architectures import cuts, families, fields
from isingcut.formats.architectures.cuts import legality
from isingcut.formats.architectures.fields import config_object
from isingcut.models.inspect import check_same_blocks
from odd_models import HUB, odd_checkpoint, odd_config, odd_model, prove_cut
from shared import ArchitectureError, ModelError, cells, load_json, parametrize, refuses
from tiny import (
    Replay,
    cut_config,
    edit_config,
    find_stack,
    forbids,
    inspect_model,
    random_model,
    relative_difference,
    replay_of,
    skip_blocks,
)

LLAMA = {"model_type": "llama", "num_hidden_layers": 6}
COMPOSITE = {
    "model_type": "llava",
    "text_config": LLAMA,
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 6},
}


@parametrize("family", HUB)
def test_the_form_that_hubs_hold_is_cut_exactly(family, tmp_path):
    model = odd_checkpoint(family, tmp_path / "source")
    with edit_config(tmp_path / "source") as config:
        hub = {"architectures": config["architectures"], **HUB[family]}
        config.clear()
        config.update(hub)
    assert inspect_model(tmp_path / "source").refusal == ""
    assert prove_cut(model, [0, 3], tmp_path).difference <= 1e-6


@parametrize("drop", [False, True])
def test_lists_padded_by_mtp_layers_are_cut_to_the_kept_blocks(drop):
    config = HUB["step3p7"]
    cut = cut_config(config, [0, 3], drop_mtp=drop)
    text = cut["text_config"]
    whole = config["text_config"]
    for name in ("rope_theta", "swiglu_limits", "swiglu_limits_shared", "layer_types"):
        assert text[name] == [
            whole[name][i] for i in (1, 2, 4, 5, 6, 7)[: 4 if drop else 6]
        ], name
    assert text["moe_layers_enum"] == ("1,2,3" if drop else "1,2,3,4,5")
    assert text["num_nextn_predict_layers"] == (0 if drop else 2)
    before = config_object(config).get_text_config(decoder=True)
    after = config_object(cut).get_text_config(decoder=True)
    assert after.mlp_layer_types == [before.mlp_layer_types[i] for i in (1, 2, 4, 5)]


def test_a_scale_that_holds_the_depth_stays_what_it_was():
    whole = {
        **LLAMA,
        "model_type": "minicpm3",
        "num_hidden_layers": 9,
        "scale_depth": 1.5,
    }
    assert cut_config(whole, [1, 2, 3, 5, 7])["scale_depth"] == pytest.approx(
        1.5 * (4 / 9) ** 0.5
    )


GLM5 = ["linear_attention", "indexed_attention", "indexed_attention"] * 2
READERS = {
    "glm_moe_dsa": {
        "indexer_types": ["full", "full", "shared", "shared", "full", "shared"]
    },
    "glm5_next": {"indexer_types": ["full", "full", "shared"] * 2, "layer_types": GLM5},
    "mistral_large4": {
        "kv_source_layers": [0, 1, 1, 3, 4, 4],
        "indexer_types": ["full", "full", "shared", "full", "full", "full"],
    },
}


@parametrize(
    "family, source, reader",
    [
        ("hy_v4", 1, 4),
        ("glm_moe_dsa", 4, 5),
        ("glm5_next", 1, 2),
        ("mistral_large4", 1, 2),
    ],
)
def test_a_block_that_reads_an_earlier_one_goes_before_it_does(family, source, reader):
    model = odd_model(family, **READERS.get(family, {}))
    readers = range(source + 1, reader + 1)
    assert forbids(model, [source, *readers[:-1]])
    assert not forbids(model, [source, *readers])
    assert not forbids(model, readers)
    with refuses(f"keep {source} for {reader} ", ArchitectureError):
        cut_config(model.config.to_dict(), [source, *readers[:-1]])
    with refuses("more than the residual stream", ArchitectureError):
        Replay(model)


PLACES = {"ple_layer_ids": [1, 2, 5], "eos_token_id": 2}


def test_a_block_that_computes_with_its_place_in_a_list_keeps_it():
    config = odd_config("qwen4_exp_text", **PLACES).to_dict()
    assert cut_config(config, [2, 4])["ple_layer_ids"] == [1, 2]
    with refuses("depends on how many of ple_layer_ids come before", ArchitectureError):
        cut_config(config, [1])
    rows = legality(config, find_stack(odd_model("qwen4_exp_text", **PLACES)))
    assert {"keep 0 for 1", "keep 1 for 4"} <= {row.name for row in rows}


def test_what_a_block_hands_on_and_no_other_reads_does_not_hinder_measuring():
    model = odd_model("glm_moe_dsa", indexer_types=["full"] * 6).requires_grad_(False)
    tokens = torch.arange(10, 26)[None]
    recording = replay_of(model).record(tokens)
    stream = recording.entered
    for i in (0, 2, 3, 5):
        stream = recording.block(i, stream)
    with torch.no_grad(), skip_blocks(model, [1, 4]):
        expected = model(tokens, use_cache=False).logits[0]
    assert relative_difference(expected, recording.logits(stream[0], 0)) <= 1e-5


@parametrize("family", ["kimi_linear", "bailing_hybrid", "glm5_next", "olmo_hybrid"])
def test_linear_attention_is_told_by_what_it_does(family, tmp_path):
    model = odd_checkpoint(family, tmp_path)
    stack = inspect_model(tmp_path).stack
    text = model.config.get_text_config(decoder=True)
    for block, kind in zip(stack.blocks, text.layer_types, strict=True):
        linear = kind == "linear_attention"
        assert block.kind.split("+")[0] == (
            "linear-attention" if linear else "attention"
        )
        assert (block.kv_bytes_per_token == 0) == linear
        assert (block.state_bytes > 0) == linear
    assert "keep attention" in {
        row.name for row in legality(model.config.to_dict(), stack)
    }


def test_the_first_block_of_modernbert_stays():
    with refuses("without a norm before its attention", ArchitectureError):
        cut_config(odd_config("modernbert-decoder").to_dict(), [0])


def test_the_decoder_of_an_encoder_decoder_has_its_own_number_of_blocks(tmp_path):
    config = AutoConfig.for_model(
        "blenderbot",
        d_model=32,
        encoder_layers=2,
        decoder_layers=4,
        decoder_ffn_dim=48,
        vocab_size=262,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    model = random_model(AutoModelForCausalLM, config)
    assert len(find_stack(model)) == 4
    model.save_pretrained(tmp_path / "source")
    assert prove_cut(model, [1, 2], tmp_path).difference <= 1e-6
    cut = load_json(tmp_path / "out/config.json")
    assert (cut.decoder_layers, cut.encoder_layers) == (2, 2)


def test_a_type_that_cannot_be_cut_says_so_before_its_numbers_are_compared(tmp_path):
    odd_checkpoint("hrm_text", tmp_path)
    with refuses("its two stacks of blocks run several times", ModelError):
        inspect_model(tmp_path)


@parametrize("family", ["beam", "minicpm3", "modernbert-decoder"])
def test_what_no_table_says_shows_in_a_smaller_model_without_weights(
    family, monkeypatch
):
    model = odd_model(family)
    config = model.config.to_dict()
    stack = find_stack(model)
    monkeypatch.setattr(fields, "DEPTH_POWERS", {})
    monkeypatch.setattr(families, "STAY", {})
    monkeypatch.setattr(cuts, "UNCUTTABLE", {})
    with refuses("block 1 would change as block 0", ArchitectureError):
        check_same_blocks(config, stack, [])


# Further fields of a configuration :: expected line.
UNKNOWN = """
LLAMA :: {num_nextn_predict_layers: 2, clamps: [0, 0, 0, 0, 0, 0, 0, 0]} :: 'clamps' looks per-layer
LLAMA :: {num_dense_blocks: 2} :: 'num_dense_blocks' looks per-layer
LLAMA :: {sparse: {block_ids: [2, 5]}} :: 'block_ids' looks per-layer
LLAMA :: {moe_block_enum: "2,3,5"} :: 'moe_block_enum' looks per-layer
COMPOSITE :: {injected_layers: [[0, 2], [1, 4]]} :: 'injected_layers' looks per-layer
COMPOSITE :: {bridge: {target_block_ids: [0, 2]}} :: 'target_block_ids' looks per
LLAMA :: {model_type: beam} :: beam cannot be cut exactly
"""


@parametrize("base, more, message", cells(UNKNOWN))
def test_a_field_that_counts_or_indexes_blocks_is_named_wherever_it_stands(
    base, more, message
):
    config = {"LLAMA": LLAMA, "COMPOSITE": COMPOSITE}[base]
    with refuses(message, ArchitectureError):
        cut_config({**config, **yaml.safe_load(more)}, [1])


def test_what_counts_blocks_of_another_stack_is_left_alone():
    vision = {
        **COMPOSITE["vision_config"],
        "tower_layers": [0, 2],
        "injected_layers": [1, 3],
    }
    more = {
        "vision_feature_layer": [-2, 3],
        "image_token_ids": [1, 2],
        "projector_layers": 2,
    }
    cut = cut_config({**COMPOSITE, **more, "vision_config": vision}, [1])
    assert cut["vision_config"] == vision
    assert {key: cut[key] for key in more} == more
    assert cut["text_config"]["num_hidden_layers"] == 5
