"""The proof of a cut: errors that it detects, even well hidden ones, and its remarks."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

from isingcut.models.verify import check_generation, process_images, random_tokens
from odd_models import composite
from shared import ArchitectureError, VerificationError, load_json, parametrize, refuses
from sweep.images import invent_images
from tiny import (
    cut_config,
    excise,
    forbids,
    relative_difference,
    streamed,
    tiny_model,
    tiny_tokenizer,
    verify,
)

LOWEST = torch.finfo(torch.float32).min


def normal_logits():
    return torch.randn((2, 5, 40), generator=torch.Generator().manual_seed(0))


def cut_of(model, removed, folder):
    """Write the checkpoint of a model without some blocks; return its folder."""
    model.save_pretrained(folder / "source")
    excise(folder / "source", removed, folder / "cut")
    return folder / "cut"


@parametrize("mask", [LOWEST, -math.inf, -1e4])
def test_masked_logits_are_no_scale(mask):
    logits = normal_logits()
    logits[..., 10:35] = mask
    other = logits.clone()
    other[0, 3, 2] += 0.1
    assert relative_difference(logits, logits.clone()) == 0.0
    assert 0.05 < relative_difference(logits, other) < 0.2
    other[..., 20] = 0.0
    assert relative_difference(logits, other) >= 1.0


def test_few_huge_entries_are_no_scale():
    logits = normal_logits()
    logits[..., :19] *= 1e9
    other = logits.clone()
    other[0, 3, 30] += 0.1
    assert relative_difference(logits, other) > 0.01
    other = logits * (1 + 1e-6)
    assert relative_difference(logits, other) == pytest.approx(1e-6, rel=0.1)


@parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_on_one_side_is_infinitely_far(bad):
    logits = normal_logits()
    broken = logits.clone()
    broken[1, 2, 3] = bad
    assert relative_difference(logits, broken) == math.inf
    assert relative_difference(broken, logits) == math.inf
    assert relative_difference(broken, -broken) == math.inf
    assert relative_difference(logits, logits[..., 1:]) == math.inf
    nothing = torch.full_like(logits, math.nan)
    assert relative_difference(nothing, nothing.clone()) == math.inf


def test_a_wrong_cut_of_chameleon_is_noticed(tmp_path):
    """The logits of its image tokens are the smallest float."""
    model = composite("chameleon")
    cut = cut_of(model, [1], tmp_path)
    assert verify(model, [1], cut, images=invent_images).difference == 0.0
    with refuses("differs from the original", VerificationError):
        verify(model, [2], cut)


def test_a_cut_that_fails_where_the_original_does_not_is_wrong(tmp_path, stub):
    model = tiny_model("llama")
    cut = tiny_model("llama", num_hidden_layers=5)
    cut.lm_head = torch.nn.Linear(3, 3)
    stub("isingcut.models.verify._open_cut", (cut, False))
    with refuses("fails on text, but the original without", VerificationError):
        verify(model, [1], tmp_path)


def test_generation_is_compared_despite_masked_logits():
    model = composite("chameleon")
    model.model.layers[2].self_attn.layer_idx = 0
    with refuses("differs from generation", VerificationError):
        check_generation(model, torch.arange(12)[None] + 20, 8, "the model")


@parametrize("setting", [{"stop_strings": ["a"]}, {"prompt_lookup_num_tokens": 3}])
def test_settings_of_generation_do_not_stop_the_proof(setting, tmp_path):
    model = tiny_model("llama")
    model.generation_config.update(**setting)
    verify(model, [2], cut_of(model, [2], tmp_path))


@parametrize("above, tie", [(0.125, True), (1.0, False)])
def test_a_tie_is_found_by_the_rounding_of_its_own_logits(above, tie):
    class Rounded:
        """The two largest logits are 16 and a little more, the usual size is 4."""

        dtype = torch.bfloat16

        def generate(self, row, use_cache, **options):
            return torch.cat([row, torch.tensor([[1 + use_cache]])], 1)

        def __call__(self, input_ids, use_cache):
            logits = torch.full((1, input_ids.shape[1], 40), -4.0)
            logits[..., 10:] += torch.arange(input_ids.shape[1])[:, None] / 100
            logits[..., 1] = 16.0
            logits[..., 2] = 16.0 + above
            return SimpleNamespace(logits=logits.bfloat16())

    # One step of bfloat16 at 16 is 0.125: 0.8 % of 16, and 3 % of the usual size.
    noticed = refuses("differs from generation", VerificationError)
    with contextlib.nullcontext() if tie else noticed:
        check_generation(Rounded(), torch.arange(6)[None], 1, "the model")


# Families whose image features are added to the stream after text blocks 0, 1 and 2.
DEEPSTACK = ["cohere_compass", "qwen3_omni_moe_thinker"]


@parametrize("family", [*DEEPSTACK, "llava", "granite4_vision", "qwen3_vl"])
def test_a_cut_of_a_model_that_takes_images_is_proven_with_one(family, tmp_path):
    model = composite(family)
    removed = [0, 5] if family == "granite4_vision" else [3, 5]
    cut = cut_of(model, removed, tmp_path)
    proof = verify(model, removed, cut, images=invent_images)
    assert proof.inputs == "text and an image"
    assert proof.difference == 0.0
    assert proof.remarks == []
    # Otherwise Qwen-VL would continue the positions of the image in later text.
    assert getattr(model.model, "rope_deltas", None) is None


@parametrize("family", DEEPSTACK)
def test_blocks_that_image_features_join_behind_stay(family):
    model = composite(family)
    for removed in ([0], [1, 3]):
        assert forbids(model, removed)
        with refuses(
            r"image features \(DeepStack\) join the stream", ArchitectureError
        ):
            cut_config(model.config.to_dict(), removed)
    assert not forbids(model, [3, 4, 5])


def test_deepstack_is_found_where_only_its_class_names_it():
    config = composite("qwen3_vl").config.to_dict()
    del config["vision_config"]["deepstack_visual_indexes"]  # (8, 16, 24) by default
    with refuses("behind the first 3 blocks", ArchitectureError):
        cut_config(config, [2])


@parametrize("family", ["qwen3_vl", "granite4_vision"])
def test_only_an_image_shows_what_joins_between_blocks(family, tmp_path, stub):
    home = "isingcut.formats.architectures.families"
    stub(f"{home}.find_fixed_blocks", {})
    stub(f"{home}.move_images", None)
    model = composite(family)
    cut = cut_of(model, [1], tmp_path)
    with refuses(r"without blocks \[1\] on text and an image", VerificationError):
        verify(model, [1], cut, images=invent_images)


def test_blocks_that_image_features_join_in_front_of_stay_and_are_renumbered():
    model = composite(
        "granite4_vision",
        deepstack_layer_map=[(0, 0), (1, 1)],
        spatial_target_layers=[2, 4, 4, 9],
    )
    config = model.config.to_dict()
    cut = cut_config(config, [3, 5])
    assert cut["deepstack_layer_map"] == [[0, 0], [1, 1]]
    assert cut["spatial_target_layers"] == [2, 3, 3, 9]
    for removed in ([1], [2, 3], [4, 5]):
        assert forbids(model, removed)
        with refuses("in front of blocks 0, 1, 2, 4", ArchitectureError):
            cut_config(config, removed)


def test_places_that_the_class_adds_are_written_out():
    config = composite("granite4_vision").config.to_dict()
    config["text_config"]["num_hidden_layers"] = 24
    del config["spatial_target_layers"]  # [12, 15, 18, 21] by default
    assert cut_config(config, [13, 19])["spatial_target_layers"] == [12, 14, 17, 19]


def test_a_proof_without_an_image_says_so(tmp_path):
    model = composite("qwen3_vl")
    proof = verify(model, [3], cut_of(model, [3], tmp_path))
    assert proof.inputs == "text only"
    (remark,) = proof.remarks
    assert remark.startswith("the cut is verified on text only: the model takes images")
    assert "(the checkpoint has no processor)" in remark


def test_the_checkpoints_own_processor_makes_the_image(tmp_path):
    from transformers import CLIPImageProcessor, LlavaProcessor

    # The image token of the tiny model is the tokenizer's fourth.
    tokenizer = tiny_tokenizer()
    model = composite("llava")
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    pixels = CLIPImageProcessor(size=side, crop_size=side)
    processor = LlavaProcessor(
        pixels,
        tokenizer,
        vision.patch_size,
        image_token="<|system|>",
        num_additional_image_tokens=1,
    )
    processor.vision_feature_select_strategy = "default"
    processor.save_pretrained(tmp_path)
    inputs = process_images(model, tmp_path, random_tokens(model, 2, 24))
    said = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert "What is in this picture" in said
    assert inputs["pixel_values"].shape[-1] == vision.image_size


def test_random_text_holds_no_token_of_an_image():
    model = composite("qwen3_vl")
    config = model.config
    special = {
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
    }
    assert not special & set(random_tokens(model, 40, 100).flatten().tolist())


def test_a_run_shows_how_its_cut_was_proven(finished):
    record = load_json(finished / "model/isingcut.json")
    assert record.proof == {"inputs": "text", "difference": 0.0, "remarks": []}
    assert (
        "| proof of the cut | text: logits of the reloaded"
        in (finished / "report.md").read_text()
    )


def test_a_streamed_cut_is_proven_with_an_image(tmp_path):
    cut = cut_of(composite("qwen3_vl"), [3, 5], tmp_path)
    source = streamed(tmp_path / "source")
    proof = verify(source, [3, 5], cut, images=invent_images)
    assert proof.inputs == "text and an image"
    assert proof.difference == 0.0
