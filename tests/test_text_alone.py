"""Models that need an image: text goes to the causal language model inside them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, VerificationError
from isingcut.evaluation.quality import quality
from isingcut.healing.training.student import install
from isingcut.models.architectures.blocks import (
    find_stack,
    image_needed,
    skipped,
    stack_modules,
    text_model,
)
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.verify import random_tokens, reload, verify, verify_streamed
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import StreamedReplay, open_model
from odd_models import composite, composite_checkpoint
from sweep.images import invent_images

INSIDE = {
    "blip": "BlipTextLMHeadModel",
    "blip-2": "OPTForCausalLM",
    "instructblip": "OPTForCausalLM",
    "instructblipvideo": "OPTForCausalLM",
    "kosmos-2": "Kosmos2TextForCausalLM",
}


@pytest.mark.parametrize("family", INSIDE)
def test_a_cut_is_proven_on_the_language_model_inside_and_on_the_whole(family, tmp_path):
    model = composite_checkpoint(family, tmp_path / "source")
    excise(tmp_path / "source", [0, 3], tmp_path / "out")
    proof = verify(model, [0, 3], tmp_path / "out", images=invent_images)
    assert (proof.inputs, proof.distinguishes) == ("text and an image", True)
    assert proof.difference <= 1e-5
    (remark,) = proof.remarks
    assert remark.startswith(f"{type(model).__name__} does not run on text alone (")
    assert remark.endswith(f"text was given to the {INSIDE[family]} inside it")
    with pytest.raises(VerificationError, match=r"without blocks \[0, 4\] on text:"):
        verify(model, [0, 4], tmp_path / "out")


def test_what_a_cut_does_to_images_alone_is_noticed(tmp_path):
    model = composite_checkpoint("blip", tmp_path / "source")
    excise(tmp_path / "source", [0, 3], tmp_path / "out")
    cut = reload(tmp_path / "out", dtype=torch.float32)
    attention = cut.text_decoder.bert.encoder.layer[1].crossattention
    torch.nn.init.zeros_(attention.output.dense.weight)
    with pytest.raises(VerificationError, match=r"\[0, 3\] on text and an image:"):
        verify(model, [0, 3], tmp_path / "out", cut=cut, images=invent_images)


def test_llama_4_is_proven_on_text_and_the_reason_is_said(tmp_path):
    # With transformers 5.24 the class fails on whatever it is given, behind its last block.
    model = composite_checkpoint("llama4", tmp_path / "source")
    excise(tmp_path / "source", [0, 3], tmp_path / "out")
    proof = verify(model, [0, 3], tmp_path / "out", images=invent_images)
    assert (proof.inputs, proof.distinguishes, proof.difference) == ("text only", True, 0.0)
    inside, images = proof.remarks
    assert inside.endswith("text was given to the Llama4ForCausalLM inside it")
    assert images.startswith("the cut is verified on text only")
    assert "image_outputs" in images


@pytest.mark.parametrize("family", ["kosmos-2.5", "qwen2_vl"])
def test_a_model_that_runs_on_text_is_given_it_whole(family):
    model = composite(family)
    assert text_model(model) is model
    assert image_needed(model) == ""


def test_an_encoder_decoder_inside_is_refused():
    small = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "vocab_size": 100}
    config = AutoConfig.for_model(
        "instructblip", text_config={"model_type": "t5", "num_layers": 2, **small}
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ArchitectureError, match="holds an encoder-decoder"):
        find_stack(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["blip", "blip-2", "kosmos-2", "llama4"])
def test_streamed_blocks_compute_what_those_in_memory_do(family, tmp_path):
    model = composite_checkpoint(family, tmp_path / "source")
    tokens = random_tokens(model, 2, 12)
    store = open_model(tmp_path / "source", dtype=torch.float32, device=torch.device("cpu"))
    stack = find_stack(model)
    resident = Replay(model, stack_modules(model, stack)).record(tokens)
    streamed = StreamedReplay(*store)
    recording = streamed.record(tokens)
    streams = [resident.entered, recording.entered]
    with skipped(model, stack, [2]):
        expected = text_model(model)(input_ids=tokens, use_cache=False).logits
        for i in (0, 1, 3, 4, 5):
            streams = [r.block(i, s) for r, s in zip((resident, recording), streams, strict=True)]
        for replayed, stream in zip((resident, recording), streams, strict=True):
            assert torch.equal(replayed.logits(stream[0], 0), expected[0])
    excise(tmp_path / "source", [0, 3], tmp_path / "out")
    assert verify_streamed(streamed, [0, 3], tmp_path / "out").remarks[0].endswith("inside it")


def test_quality_and_distillation_read_the_language_model_inside(tmp_path):
    model = composite_checkpoint("blip-2", tmp_path / "source")
    excise(tmp_path / "source", [0, 3], tmp_path / "out")
    cut = reload(tmp_path / "out", dtype=torch.float32)
    tokens = TokenSet.from_rows(random_tokens(model, 2, 12).tolist())
    found = quality(model, cut, tokens)
    assert quality(model.language_model, cut.language_model, tokens) == found
    install(cut, cut, model)
    mask = torch.ones_like(tokens.input_ids)
    summed = cut(input_ids=tokens.input_ids, attention_mask=mask)["loss"].detach()
    assert float(summed) == pytest.approx(found.kl * tokens.tokens, rel=1e-4)
