"""Two prompts with an image each, made by rule: tiny models have no processor.

Images have the size that the configuration states, in the forms that transformers' models take.
The prompt has as many image tokens as the model computes features of an image. The right form is
found by trial, because the model fails with any other.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import BatchFeature

from isingcut.errors import ModelError
from isingcut.models.verify import parameters, try_images

_TOKENS = (
    "image_token_id",
    "image_token_index",
    "image_token",
    "img_context_token_id",
    "video_token_id",
)
# Mask that marks the place of an image, instead of a token (Kosmos-2).
_PLACES = "image_embeds_position_mask"
_MARKS = (
    ("vision_start_token_id", "boi_token_id", "boi_token_index"),
    ("vision_end_token_id", "eoi_token_id", "eoi_token_index"),
)
_CHANNELS = ("num_channels", "in_channels", "in_chans", "num_image_channels")
_SIDES = ("image_size", "resolution", "force_image_size")
_MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size")
# Numbers of tiles per image, for models that take more than one.
_TILES = (1, 2, 3, 5)
# Number of words before and after an image.
WORDS = 6


def invent_images(model, folder, words, **ignored):
    """Return two prompts that a model accepts, for `models.verify.verify`.

    Args:
        model: a model that takes images.
        folder: not used.
        words: (2, T) token ids to put around the images.

    Raises:
        ModelError: the model accepts no prompt; the message is the error of the likeliest one.
    """
    token = _image_token(model)
    reason = ""
    for pixels in image_forms(model):
        try:
            return try_images(model, partial(_prompts, model, words, token, pixels))
        except ModelError as error:
            reason = reason or str(error)
    raise ModelError(reason or "no way is known to make one of its configuration")


def _prompts(model, words, token, pixels):
    placed = token is not None or _PLACES in parameters(model.forward)
    count = _features(model, pixels) if placed else 0
    return {**_prompt(model, words, token, count), **pixels}


def _image_token(model):
    config = model.config
    if (
        isinstance(table := getattr(config, "vocabulary_map", None), dict)
        and "<image>" in table
    ):
        return int(table["<image>"])
    return first_number(config, _TOKENS)


def _features(model, pixels):
    """Return the number of feature vectors, and so of image tokens, of one image."""
    if "aspect_ratio_ids" in pixels:
        return 1  # mllama: the text attends to the image.
    names = ("get_image_features", "get_video_features")
    places = (model, getattr(model, "model", model))
    found = (getattr(place, name, None) for name in names for place in places)
    features = next(filter(None, found), None) or model.get_image_features
    given = BatchFeature(pixels).to(model.device, model.dtype)
    return _rows(features(**given, return_dict=True)) // 2


def _rows(found):
    """Return the number of feature vectors in the image features that a model returned."""
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    if isinstance(found, (list, tuple)) and not hasattr(found, "pooler_output"):
        return sum(map(_rows, found))
    for name in ("pooler_output", "deepstack_features", "last_hidden_state"):
        value = getattr(found, name, None)
        if value is not None:
            # Pairs (block, features) for several text blocks: count those of the first.
            return _rows(value[0][1] if name == "deepstack_features" else value)
    return 0


def _prompt(model, words, token, count):
    """Return the inputs of both rows: words, the image tokens between their marks, words.

    With a ``count`` of 0 there are only words: the blocks then attend to the image.
    """
    words = words[0, : 2 * WORDS].tolist()
    marks = (first_number(model.config, names) for names in _MARKS)
    before, after = ([mark] * (mark is not None and count > 0) for mark in marks)
    image = [words[0] if token is None else token] * count
    row = [*words[:WORDS], *before, *image, *after, *words[WORDS:]]
    ids = torch.tensor([row, row])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = WORDS + len(before)
    there = torch.zeros_like(ids)
    there[:, start : start + count] = 1
    names = {"mm_token_type_ids", "token_type_ids", _PLACES}
    return {**inputs, **dict.fromkeys(names & {*parameters(model.forward)}, there)}


def first_number(config, names):
    """Return the first of these fields that is a number; of height and width, the height."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("height")
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _vision(config):
    """Return the vision configuration: the first inner one with a patch or image size."""
    parts = [part for part in vars(config).values() if hasattr(part, "to_dict")]
    sizes = ("patch_size", "patch_embed_hidden_size", *_SIDES)
    named = [p for p in parts if first_number(p, sizes) is not None]
    deeper = (found for part in parts if (found := _vision(part)) is not part)
    return named[0] if named else next(deeper, config)


def image_forms(model):
    """Yield two images in each form that models of transformers take, with the inputs they need."""
    beside = {}
    if "qformer_input_ids" in parameters(model.forward):
        # Text for the Q-Former between the image and the text model.
        beside["qformer_input_ids"] = torch.arange(2 * WORDS).view(2, WORDS)
    if "image_merge_sizes" in parameters(model.forward):
        beside["image_merge_sizes"] = torch.tensor([_merge(model)] * 2)
    for pixels in _pixels(model):
        yield {**pixels, **beside}


def _pixels(model):
    names = parameters(model.forward)
    vision = _vision(model.config)
    patch = first_number(vision, ("patch_size",)) or 14
    channels = first_number(vision, _CHANNELS) or 3
    merge = _merge(model)
    flat = channels * patch * patch
    side = 2 * merge  # In patches: each image has 2 x 2 features after merging.
    n = side * side
    for grid, row in (
        ("image_grid_thw", [1, side, side]),
        ("image_grid_hw", [side] * 2),
    ):
        if grid in names:
            frames = (
                first_number(vision, ("temporal_patch_size", "patch_temporal")) or 1
            )
            for shape in (
                (2 * n, frames * flat),
                (2 * n, flat),
                (2 * n, channels, patch, patch),
                (1, 2 * n, channels, patch, patch),
            ):
                yield {"pixel_values": _noise(*shape), grid: torch.tensor([row, row])}
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(
        2, n, 2
    )
    patches = {"pixel_values": _noise(2, n, flat)}
    if "image_position_ids" in names:
        yield {**patches, "image_position_ids": places.flip(-1)}
    if "spatial_shapes" in names:
        shapes = torch.tensor([[side, side]] * 2)
        mask = torch.ones((2, n), dtype=torch.long)
        yield {**patches, "spatial_shapes": shapes, "pixel_attention_mask": mask}
    if "flattened_patches" in names:
        width = first_number(vision, ("patch_embed_hidden_size",)) or flat
        yield {"flattened_patches": torch.cat((places + 1.0, _noise(2, n, width)), -1)}
    small = side * patch
    whole = first_number(vision, _SIDES) or small
    # Models that are given the sizes accept small images, and attention is quadratic in the size.
    sized = "image_sizes" in names
    for size in dict.fromkeys([small, whole] if sized else [whole, small]):
        sizes = {"image_sizes": torch.tensor([[size, size]] * 2)}
        for extra in ({}, sizes) if sized else ({},):
            yield {"pixel_values": _noise(2, channels, size, size), **extra}
            for tiles in _TILES:
                pixels = {"pixel_values": _noise(2, tiles, channels, size, size)}
                yield {**pixels, **extra}
                if "pixel_attention_mask" in names:
                    mask = torch.ones((2, tiles), dtype=torch.bool)
                    yield {**pixels, **extra, "pixel_attention_mask": mask}
        if "aspect_ratio_ids" in names:
            tiles = first_number(vision, ("max_num_tiles",)) or 4
            mask = torch.zeros((2, 1, tiles), dtype=torch.long)
            mask[..., 0] = 1
            yield {
                "pixel_values": _noise(2, 1, tiles, channels, size, size),
                "aspect_ratio_ids": torch.ones((2, 1), dtype=torch.long),
                "aspect_ratio_mask": mask,
                "cross_attention_mask": mask[:, None].expand(2, 2 * WORDS + 1, 1, -1),
            }


def _merge(model):
    """Return the number of patches along a side of one feature."""
    vision = _vision(model.config)
    return first_number(vision, _MERGES) or first_number(model.config, _MERGES) or 2


def _noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
