"""Checkpoints as hubs hold them, and models that need an image: text goes to the decoder inside."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from isingcut.evaluation.quality import quality
from isingcut.formats.architectures.blocks import language_model
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.safetensors_files import StoredTensor
from isingcut.healing.training.student import install
from isingcut.models.load import find_auto_class
from isingcut.models.verify import random_tokens, reload
from odd_models import composite_checkpoint, prove_cut
from shared import (
    ArchitectureError,
    VerificationError,
    cells,
    load_json,
    parametrize,
    refuses,
)
from sweep.images import invent_images
from sweep.shrink import tiny_configuration
from tiny import (
    Replay,
    TokenSet,
    cut_config,
    excise,
    find_stack,
    inspect_model,
    random_model,
    replay_of,
    skip_blocks,
    streamed,
    tiny_checkpoint,
    tiny_model,
    verify,
)


@parametrize("family", ["qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "hunyuan_vl"])
def test_a_flat_configuration_stays_flat(family, tmp_path):
    model = composite_checkpoint(family, tmp_path / "source", flat=True)
    assert prove_cut(model, [0, 2], tmp_path).difference == 0.0
    before, after = (
        load_json(tmp_path / name / "config.json") for name in ("source", "out")
    )
    assert "text_config" not in after
    assert (before.num_hidden_layers, after.num_hidden_layers) == (6, 4)
    assert after.vision_config == before.vision_config
    assert len(inspect_model(tmp_path / "out").stack) == 4


def test_the_decoders_fields_are_cut_where_they_are_read():
    text = {"vocab_size": 300, "num_hidden_layers": 4}
    named = {
        "model_type": "unlimited_ocr",
        "language_config": text,
        "vision_config": {},
    }
    assert cut_config(named, [1])["language_config"]["num_hidden_layers"] == 3
    partly = {"model_type": "qwen2_vl", "text_config": {"num_hidden_layers": 6}, **text}
    assert cut_config(partly, [1])["text_config"]["num_hidden_layers"] == 5
    nothing = cut_config({"model_type": "qwen2_vl"}, [1])
    assert nothing["text_config"]["num_hidden_layers"] == 79


@parametrize("family", ["llama4", "mllama", "emu3", "dots3_note"])
def test_the_class_that_was_saved_is_the_one_that_loads(family):
    config = AutoConfig.for_model(family)
    names = AutoModelForImageTextToText._model_mapping[type(config)].__name__
    config.architectures = [names]
    assert find_auto_class(config) is AutoModelForImageTextToText


def test_the_right_number_of_blocks_wins_unless_far_too_small(tmp_path):
    def stored(prefix, count, size):
        return [
            StoredTensor(f"{prefix}.{i}.w", tmp_path, "F32", (1,), 0, size)
            for i in range(count)
        ]

    def checkpoint(count, *tensors):
        return Checkpoint(
            tmp_path, {"num_hidden_layers": count}, {t.name: t for t in tensors}
        )

    blocks = stored("model.layers", 6, 100)
    assert checkpoint(6, *stored("vq.up", 3, 300), *blocks).prefix == "model.layers."
    # A configuration with too few blocks must not match a smaller stack of that many parts.
    few = checkpoint(3, *stored("projector", 3, 10), *blocks)
    assert few.prefix == "model.layers."


def test_blocks_that_text_does_not_run_are_named(tmp_path):
    model = composite_checkpoint("mllama", tmp_path / "source")
    with refuses("does not run the blocks 3 ", ArchitectureError):
        replay_of(model)
    assert prove_cut(model, [0], tmp_path).difference == 0.0


def test_a_period_beside_the_list_it_stands_for_says_nothing(tmp_path):
    # Zamba 1: its configuration class has the period of Jamba's attention, but no other period.
    model = random_model(AutoModelForCausalLM, tiny_configuration("zamba"))
    model.save_pretrained(tmp_path / "source")
    assert (
        "take turns with shared weights"
        in inspect_model(tmp_path / "source").rules()[0]
    )
    assert prove_cut(model, [0, 3], tmp_path).difference == 0.0


def test_what_does_not_run_on_text_is_not_proven_either(tmp_path):
    excise(tiny_checkpoint("llama", tmp_path / "source"), [1], tmp_path / "out")
    model = tiny_model("llama")
    model.lm_head.forward = lambda hidden: SimpleNamespace().image_outputs
    one_line = "does not run on text alone, .* measured or verified: AttributeError"
    with refuses(one_line, ArchitectureError):
        verify(model, [1], tmp_path / "out")
    with refuses(one_line, ArchitectureError):
        replay_of(model)


INSIDE = """
blip :: BlipTextLMHeadModel
blip-2 :: OPTForCausalLM
instructblip :: OPTForCausalLM
kosmos-2 :: Kosmos2TextForCausalLM
"""


@parametrize("family, name", cells(INSIDE))
def test_a_cut_is_proven_on_the_language_model_inside_and_on_the_whole(
    family, name, tmp_path
):
    model = composite_checkpoint(family, tmp_path / "source")
    proof = prove_cut(model, [0, 3], tmp_path, images=invent_images)
    assert proof.inputs == "text and an image"
    assert proof.difference <= 1e-5
    (remark,) = proof.remarks
    inside = f"the {name} inside the {type(model).__name__}"
    assert remark == f"the text was given to {inside}"
    with refuses(r"without blocks \[0, 4\] on text:", VerificationError):
        verify(model, [0, 4], tmp_path / "out")


def cut_of(family, folder):
    """Write a model and its cut without blocks 0 and 3; return both, loaded."""
    model = composite_checkpoint(family, folder / "source")
    excise(folder / "source", [0, 3], folder / "out")
    return model, reload(folder / "out", dtype=torch.float32)


def test_what_a_cut_does_to_images_alone_is_noticed(tmp_path, stub):
    model, cut = cut_of("blip", tmp_path)
    attention = cut.text_decoder.bert.encoder.layer[1].crossattention
    torch.nn.init.zeros_(attention.output.dense.weight)
    stub("isingcut.models.verify._open_cut", (cut, False))
    with refuses(r"\[0, 3\] on text and an image:", VerificationError):
        verify(model, [0, 3], tmp_path / "out", images=invent_images)


def test_an_encoder_decoder_inside_is_refused():
    small = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 100}
    config = AutoConfig.for_model(
        "instructblip", text_config={"model_type": "t5", "num_layers": 2, **small}
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with refuses("holds an encoder-decoder", ArchitectureError):
        find_stack(model)


@torch.no_grad()
@parametrize("family", ["blip", "blip-2", "kosmos-2", "llama4"])
def test_streamed_blocks_compute_what_those_in_memory_do(family, tmp_path):
    model = composite_checkpoint(family, tmp_path / "source")
    tokens = random_tokens(model, 2, 12)
    parts = streamed(tmp_path / "source")
    both = [replay.record(tokens) for replay in (Replay(model), parts)]
    streams = [recording.entered for recording in both]
    with skip_blocks(model, [2]):
        expected = language_model(model)(input_ids=tokens, use_cache=False).logits
        for i in (0, 1, 3, 4, 5):
            streams = [r.block(i, s) for r, s in zip(both, streams, strict=True)]
        for recording, stream in zip(both, streams, strict=True):
            assert torch.equal(recording.logits(stream[0], 0), expected[0])
    assert prove_cut(parts, [0, 3], tmp_path).difference <= 1e-5


def test_quality_and_distillation_read_the_language_model_inside(tmp_path):
    model, cut = cut_of("blip-2", tmp_path)
    tokens = TokenSet.from_rows(random_tokens(model, 2, 12).tolist())
    found = quality(model, cut, tokens)
    assert quality(model.language_model, cut.language_model, tokens) == found
    install(cut, cut, model)
    mask = torch.ones_like(tokens.input_ids)
    summed = cut(input_ids=tokens.input_ids, attention_mask=mask)["loss"].detach()
    assert float(summed) == pytest.approx(found.kl * tokens.tokens, rel=1e-4)
