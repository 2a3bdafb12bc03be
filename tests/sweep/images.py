"""Two prompts with an image each, made by rule: tiny models have no processor.

Pixels are as large as the configuration says, in the forms that transformers' models take them, and
there are as many image tokens in the prompt as the model makes features of them. The model itself
says which form is right: with another one it fails.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isingcut.errors import ModelError
from isingcut.models.cutting.verify import ImageInputs, move_inputs, parameters, try_images

_TOKENS = (
    "image_token_id",
    "image_token_index",
    "image_token",
    "img_context_token_id",
    "video_token_id",
)
# Where an image stands, told by a mask instead of a token (Kosmos-2).
_PLACES = "image_embeds_position_mask"
_CHANNELS = ("num_channels", "in_channels", "in_chans", "num_image_channels")
_SIDES = ("image_size", "resolution", "force_image_size")
_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size")
# Tiles of one image, where a model takes more than one.
_TILES = (1, 2, 3, 5)
# Words before and behind an image.
WORDS = 6


def invent_images(model: Any, folder: Path, words: Tensor, **ignored: Any) -> ImageInputs:
    """Two prompts that a model takes; for `models.cutting.verify.verify`.

    Args:
        model: it takes images.
        folder: not used.
        words: (2, T) token ids to put around the images.

    Raises:
        ModelError: it takes none of the prompts; what went wrong with the likeliest.
    """
    token = _image_token(model)
    reason = ""
    for pixels in image_forms(model):
        try:
            return try_images(model, partial(_prompts, model, words, token, pixels))
        except ModelError as error:
            reason = reason or str(error)
    raise ModelError(reason or "no way is known to make one of its configuration")


def _prompts(model: Any, words: Tensor, token: int | None, pixels: ImageInputs) -> ImageInputs:
    placed = token is not None or _PLACES in parameters(model.forward)
    count = _features(model, pixels) if placed else 0
    return {**_prompt(model, words, token, count), **pixels}


def _image_token(model: Any) -> int | None:
    config = model.config
    if isinstance(table := getattr(config, "vocabulary_map", None), dict) and "<image>" in table:
        return int(table["<image>"])
    return first_number(config, _TOKENS)


def _features(model: Any, pixels: ImageInputs) -> int:
    """How many feature vectors the model makes of one image: so many tokens stand for it."""
    if "aspect_ratio_ids" in pixels:
        return 1  # The text attends to the image: mllama.
    names = ("get_image_features", "get_video_features")
    places = (model, getattr(model, "model", model))
    found = (getattr(place, name, None) for name in names for place in places)
    features: Any = next(filter(None, found), None) or model.get_image_features
    return _rows(features(**move_inputs(model, pixels), return_dict=True)) // 2


def _rows(found: Any) -> int:
    """Feature vectors in what a model makes of its images."""
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    if isinstance(found, (list, tuple)) and not hasattr(found, "pooler_output"):
        return sum(map(_rows, found))
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        value = getattr(found, name, None)
        if value is not None:
            # Of features for several text blocks, (block, features), the first.
            return _rows(value[0][1] if name == "deepstack_features" else value)
    return 0


def _prompt(model: Any, words: Tensor, token: int | None, count: int) -> ImageInputs:
    """Token ids of both rows: words, the image between its marks, words.

    Where nothing stands for an image in the text, the words alone: the blocks look at it.
    """
    words = words[:1, : 2 * WORDS].cpu()
    marks = [
        [] if mark is None else [mark]
        for mark in (
            first_number(
                model.config, ("vision_start_token_id", "boi_token_id", "boi_token_index")
            ),
            first_number(model.config, ("vision_end_token_id", "eoi_token_id", "eoi_token_index")),
        )
    ]
    before, after = marks if count else ([], [])
    stands = int(words[0, 0]) if token is None else token
    image = torch.tensor([[*before, *[stands] * count, *after]], dtype=torch.long)
    ids = torch.cat((words[:, :WORDS], image, words[:, WORDS:]), dim=1).expand(2, -1).clone()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = parameters(model.forward)
    start = WORDS + len(before)
    there = torch.zeros_like(ids)
    there[:, start : start + count] = 1
    for name in ("mm_token_type_ids", "token_type_ids", _PLACES):
        if name in accepted:
            inputs[name] = there
    return inputs


def first_number(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these fields that a configuration has; of a height and a width, the height."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("height")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _vision(config: Any) -> Any:
    """The configuration of the part that sees: the first one inside with the size of a patch."""
    parts = [part for part in vars(config).values() if hasattr(part, "to_dict")]
    sizes = ("patch_size", "patch_embed_hidden_size", *_SIDES)
    named = [p for p in parts if first_number(p, sizes) is not None]
    deeper = (found for part in parts if (found := _vision(part)) is not part)
    return named[0] if named else next(deeper, config)


def image_forms(model: Any) -> Iterator[ImageInputs]:
    """Two images in the forms that models of transformers take, and what goes with them."""
    beside = {}
    if "qformer_input_ids" in parameters(model.forward):
        # A question to the part between the image and the text.
        beside["qformer_input_ids"] = torch.arange(2 * WORDS).view(2, WORDS)
    if "image_merge_sizes" in parameters(model.forward):
        beside["image_merge_sizes"] = torch.tensor([_merge(model)] * 2)
    for pixels in _pixels(model):
        yield {**pixels, **beside}


def _pixels(model: Any) -> Iterator[ImageInputs]:
    names, vision = parameters(model.forward), _vision(model.config)
    patch = first_number(vision, ("patch_size",)) or 14
    channels = first_number(vision, _CHANNELS) or 3
    merge = _merge(model)
    whole = first_number(vision, _SIDES)
    flat = channels * patch * patch
    side = 2 * merge  # In patches; so each image has 2 x 2 features where patches are merged.
    n = side * side
    for grid in ("image_grid_thw", "image_grid_hw"):
        if grid in names:
            row = [1, side, side] if grid.endswith("thw") else [side, side]
            frames = first_number(vision, ("temporal_patch_size", "patch_temporal")) or 1
            for shape in (
                (2 * n, frames * flat),
                (2 * n, flat),
                (2 * n, channels, patch, patch),
                (1, 2 * n, channels, patch, patch),
            ):
                yield {"pixel_values": _noise(*shape), grid: torch.tensor([row, row])}
    if "image_position_ids" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, n, 2)
        yield {"pixel_values": _noise(2, n, flat), "image_position_ids": places.flip(-1)}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": _noise(2, n, flat),
            "spatial_shapes": torch.tensor([[side, side]] * 2),
            "pixel_attention_mask": torch.ones((2, n), dtype=torch.long),
        }
    if "flattened_patches" in names:
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, n, 2)
        width = first_number(vision, ("patch_embed_hidden_size",)) or flat
        yield {"flattened_patches": torch.cat((places + 1.0, _noise(2, n, width)), dim=-1)}
    small = side * patch
    # A model that is told the sizes takes small images, and attention is square in them.
    order = [small, whole or small] if "image_sizes" in names else [whole or small, small]
    for size in dict.fromkeys(order):
        sizes = {"image_sizes": torch.tensor([[size, size]] * 2)} if "image_sizes" in names else {}
        for extra in ({}, sizes) if sizes else ({},):
            yield {"pixel_values": _noise(2, channels, size, size), **extra}
            for tiles in _TILES:
                pixels = {"pixel_values": _noise(2, tiles, channels, size, size), **extra}
                yield pixels
                if "pixel_attention_mask" in names:
                    yield {
                        **pixels,
                        "pixel_attention_mask": torch.ones((2, tiles), dtype=torch.bool),
                    }
        if "aspect_ratio_ids" in names:
            tiles = first_number(vision, ("max_num_tiles",)) or 4
            mask = torch.zeros((2, 1, tiles), dtype=torch.long)
            mask[..., 0] = 1
            yield {
                "pixel_values": _noise(2, 1, tiles, channels, size, size),
                "aspect_ratio_ids": torch.ones((2, 1), dtype=torch.long),
                "aspect_ratio_mask": mask,
                "cross_attention_mask": mask[:, None].expand(2, 2 * WORDS + 1, 1, tiles),
            }


def _merge(model: Any) -> int:
    """Patches along a side of what becomes one feature."""
    vision = _vision(model.config)
    return first_number(vision, _MERGES) or first_number(model.config, _MERGES) or 2


def _noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
