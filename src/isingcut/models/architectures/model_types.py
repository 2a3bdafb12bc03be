"""What single model types need beside the table in `fields`, as data; `families` holds the code."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Model types in which another of these fields is that number, and how often it is in each of
# the others (a LongCat block holds two attentions, which have a cache each).
COUNTED_BY = {"longcat_flash": ("num_layers", 2)}

# Model types whose fields of those names have an entry for each modality instead.
PER_MODALITY = {
    "ernie4_5_vl_moe_text": ("moe_intermediate_size", "moe_num_experts"),
}

# Model types that cannot be cut exactly, with the reason.
DEPTH_DEPENDENT_TYPES = {
    "beam": "in which proportion a block adds to its input depends on the block number",
    "diffllama": "its differential attention starts from a weight that depends on the block number",
    "evolla": "which blocks have an adapter depends on the number of all blocks",
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
