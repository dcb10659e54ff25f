"""Weights as torch sees them: tensors of their data type, which records hold in words of 4
bytes.
"""

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
"""The last word of a counter of random bits for rounding. Initial weights have their group's index
there, which is smaller."""
COLUMNS_A_BLOCK: Final = 8
"""One Philox block gives 16 bits to so many weights: word k, lower half first, to the columns 2 k
and 2 k + 1.

The counter of weight `column` of unique row `unique` of a step is (unique, step, column // 8,
ROUNDING): a row's place among the batch's unique rows is the same whatever the cache, and no step
has two rows at one place. """


def empty_weights(group: Group, num_rows: int, device: torch.device) -> Tensor:
    """(num_rows, D), with a column more where two weights share a word and D is odd."""
    dtype = TORCH_DTYPES[group.data_type]
    return torch.empty(num_rows, group.weight_words, device=device).view(dtype)


def words_of(weights: Tensor) -> Tensor:
    """The same memory as words, float32: what records hold."""
    return weights if weights.dtype == torch.float32 else weights.view(torch.float32)


def weights_in(records: Tensor, group: Group) -> Tensor:
    """The weights (n, D) that `records` (n, record_width) hold, in their own type and the same
    memory.
    """
    words = records[:, : group.weight_words]
    return words.view(TORCH_DTYPES[group.data_type])[:, : group.embedding_dim]


def rounding_seed(seed: int, group: Group) -> int:
    """The Philox key of a group: 64 bits, other ones for each group of a model, as all get the same
    seed.
    """
    return int((seed + group.index * 0x9E3779B97F4A7C15) % 2**64)
