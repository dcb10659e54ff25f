"""Weights as torch sees them: tensors of their data type; records hold them in 4-byte words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from bagpipe.types import DataType, Group

TORCH_DTYPES: Final[Mapping[DataType, torch.dtype]] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

ROUNDING: Final = 0x80000000
"""The last word of a counter of random bits for rounding.

Counters of initial weights have their group's index there, which is smaller.
"""
COLUMNS_A_BLOCK: Final = 8
"""How many weights one Philox block gives 16 random bits each.

Word k of a block serves columns 2 k and 2 k + 1, its lower half first. The counter for `column` of
unique row `unique` of a step is (unique, step, column // 8, ROUNDING). A row's place among the
batch's unique rows is the same whatever the cache, and no two rows of a step share a place.
"""


def empty_weights(group: Group, num_rows: int, device: torch.device) -> Tensor:
    """Undefined weights, (num_rows, D) of the group's data type.

    They have one column more if two weights share a word and D is odd.
    """
    dtype = TORCH_DTYPES[group.data_type]
    return torch.empty(num_rows, group.weight_words, device=device).view(dtype)


def words_of(weights: Tensor) -> Tensor:
    """The same memory as float32 words, which is what records hold."""
    return weights if weights.dtype == torch.float32 else weights.view(torch.float32)


def weights_in(records: Tensor, group: Group) -> Tensor:
    """The weights (n, D) in `records` (n, record_width), in their own type and the same memory."""
    words = records[:, : group.weight_words]
    return words.view(TORCH_DTYPES[group.data_type])[:, : group.embedding_dim]


def rounding_seed(seed: int, group: Group) -> int:
    """The Philox key of a group, 64 bits: all groups get the model's seed, but no two one key."""
    return int((seed + group.index * 0x9E3779B97F4A7C15) % 2**64)
