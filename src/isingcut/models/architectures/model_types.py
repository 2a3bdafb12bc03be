"""What single model types need beside the table in `fields`, as data; `families` holds the code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from isingcut.models.architectures import fields

Entry = TypeVar("Entry")

# Model types in which another of `fields.COUNT` is the number of blocks than the first they have,
# and how often it is in each of the others (a LongCat block holds two attentions, a cache each).
COUNTED_BY = {"longcat_flash": ("num_layers", 2)}

# Model types whose fields of those names have an entry for each modality instead.
PER_MODALITY = {
    "ernie4_5_vl_moe": ("moe_intermediate_size", "moe_num_experts"),
}

# Model types that cannot be cut exactly, with the reason.
UNCUTTABLE = {
    "beam": "in which proportion a block adds to its input depends on the block number",
    "blt": "its blocks stand in three stacks that hand patches of bytes to one another",
    "diffllama": "its differential attention starts from a weight that depends on the block number",
    "diffusion_gemma": "each block of its decoder is shared with an encoder, which has as many",
    "dory": "some of its blocks run several times in one pass",
    "evolla": "which blocks have an adapter depends on the number of all blocks",
    "hrm_text": "its two stacks of blocks run several times in one pass",
    "idefics": "a cross-attention block of its own stands before every n-th block",
    "inkling2": "every n-th block adds up the outputs of those before it",
    "inkling2_loop": "every n-th block adds up the outputs of those before it",
    "minimax": "its linear attention decays at a rate that depends on the block number",
    "reformer": "its blocks pass on two streams, so that none of them can be skipped",
    "xlm": "its attentions, its feed-forwards and its norms stand in lists of their own",
    "zaya": "the router of each block reads what the router of the block before it computed",
}

# Blocks that have to stay (-1: the last), with the reason.
STAY = {
    "gpt_neox_japanese": (
        -1,
        "only the last block of this family has a bias after its attention",
    ),
    "modernbert-decoder": (
        0,
        "the first block of this family is the one without a norm before its attention",
    ),
    "rwkv": (0, "the first block of RWKV normalises the embeddings for all others"),
}

# Model types of which no block can stay alone, with the reason.
TWO_STAY = {"rwkv": "transformers divides by one less than the number of blocks of RWKV"}


def of_type(table: Mapping[str, Entry], model_type: Any) -> Entry | None:
    """The entry of a model type; where a model is multimodal, also that of its decoder's type."""
    name = str(model_type)
    return table.get(name) or table.get(name.removesuffix("_text"))


def counted_by(model_type: Any) -> tuple[str, ...]:
    """The fields that say how many blocks a model of this type has: the first that is there."""
    return (*(of_type(COUNTED_BY, model_type) or ())[:1], *fields.COUNT)


@dataclass(frozen=True)
class DepthShaped:
    """A weight with one slice per block outside the blocks.

    Args:
        pattern: matches the end of the tensor's name.
        axis: the axis that holds N slices of equal width.
    """

    pattern: re.Pattern[str]
    axis: int


DEPTH_SHAPED = {
    "gemma3n_text": (
        DepthShaped(re.compile(r"(^|\.)embed_tokens_per_layer\.weight$"), 1),
        DepthShaped(re.compile(r"(^|\.)per_layer_model_projection\.weight$"), 0),
    ),
    "gemma4_text": (
        DepthShaped(re.compile(r"(^|\.)embed_tokens_per_layer\.weight$"), 1),
        DepthShaped(re.compile(r"(^|\.)per_layer_model_projection\.weight$"), 0),
    ),
}
