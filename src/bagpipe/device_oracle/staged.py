"""A batch's ids on their way to the device: packed where they are read, copied by one planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.overlap import Buffer, Staging
from bagpipe.device_oracle.state import State
from bagpipe.lookups import GroupLookups, group_lookups
from bagpipe.types import Group, Jagged

_SIZES_WORDS = 4  # two int64


@dataclass(frozen=True, kw_only=True)
class StagedIds:
    """One group's part of a batch. Its words lie in pinned memory where the device is a GPU."""

    batch: Jagged
    lookups: GroupLookups
    buffer: Buffer
    is_wide: bool
    """Whether ids have 64 bits, else 32."""

    @property
    def num_bags(self) -> int:
        """Bags of all features."""
        return self.batch.batch_size * len(self.lookups.feature_starts)

    @property
    def sizes(self) -> Tensor:
        """The numbers of lookups and of samples: (2,) int64."""
        return self._words(0, _SIZES_WORDS).view(torch.int64)

    @property
    def ids(self) -> Tensor:
        """(L,) int64 or int32, feature-major."""
        words = self._words(_SIZES_WORDS, self._ids_end)
        return words.view(torch.int64) if self.is_wide else words

    @property
    def bag_offsets(self) -> Tensor:
        """(F * B + 1,) int32; only of jagged bags."""
        return self._words(self._ids_end, self._ids_end + self.num_bags + 1)

    @property
    def weights(self) -> Tensor:
        """(L,) float32; only of a batch with per-sample weights."""
        begin = self._ids_end + (0 if self.lookups.bag_offsets is None else self.num_bags + 1)
        return self._words(begin, begin + self.lookups.num_lookups).view(torch.float32)

    @property
    def _ids_end(self) -> int:
        return _SIZES_WORDS + (1 + self.is_wide) * self.lookups.num_lookups

    def _words(self, begin: int, end: int) -> Tensor:
        return self.buffer.whole[begin:end].view(torch.int32)


def stage(group: Group, batch: Jagged, staging: Staging) -> StagedIds:
    """Packs a group's part of a batch. The batch may change afterwards. Any thread may call it.

    Args:
        group: The tables.
        batch: The batch's ids.
        staging: Where the buffer comes from. It goes back once the device has copied it.

    Raises:
        DataError: The batch lacks a feature, or its arrays do not fit together.
    """
    lookups = group_lookups(group, batch)
    length = lookups.num_lookups
    is_wide = not np.can_cast(batch.values.dtype, np.int32)
    num_bags = batch.batch_size * len(group.features)
    has_offsets, has_weights = lookups.bag_offsets is not None, lookups.weights is not None
    num_words = _SIZES_WORDS + (1 + is_wide) * length
    num_words += has_offsets * (num_bags + 1) + has_weights * length
    staged = StagedIds(
        batch=batch, lookups=lookups, buffer=staging.take(num_words, 1), is_wide=is_wide
    )
    # By numpy: torch would wake its threads for it.
    staged.sizes.numpy()[:] = length, batch.batch_size
    ids, end = staged.ids.numpy(), 0
    for start, stop in _runs(lookups):
        begin, end = end, end + stop - start
        ids[begin:end] = batch.values[start:stop]
    if lookups.bag_offsets is not None:
        staged.bag_offsets.numpy()[:] = lookups.bag_offsets
    if lookups.weights is not None:
        staged.weights.numpy()[:] = lookups.weights
    return staged


def _runs(lookups: GroupLookups) -> Iterator[tuple[int, int]]:
    """Where the group's ids lie in the batch's values; neighbours in one piece."""
    run = (0, 0)
    for start, length in zip(
        lookups.feature_starts.tolist(), lookups.feature_lengths.tolist(), strict=True
    ):
        if start == run[1]:
            run = (run[0], start + length)
        else:
            yield run
            run = (start, start + length)
    yield run


def write(state: State, staged: StagedIds) -> None:
    """Copies a batch to where `enter` reads it, on the current stream, without waiting."""
    lookups, capacity, ids = staged.lookups, state.capacity, staged.ids
    if capacity.is_wide and not staged.is_wide:
        ids = ids.long()
    state.ids[: len(ids)].copy_(ids, non_blocking=True)
    state.sizes.copy_(staged.sizes, non_blocking=True)
    if capacity.is_jagged:
        offsets = state.bag_offsets[: staged.num_bags + 1]
        if lookups.bag_offsets is None:
            torch.arange(len(offsets), out=offsets)
        else:
            offsets.copy_(staged.bag_offsets, non_blocking=True)
    if capacity.is_weighted:
        if lookups.weights is None:
            state.lookup_weights.fill_(1.0)
        else:
            state.lookup_weights[: len(ids)].copy_(staged.weights, non_blocking=True)
