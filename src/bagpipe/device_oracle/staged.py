"""A batch's ids on their way to the device: packed where they are read, copied by one planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.overlap import Buffer, Staging
from bagpipe.device_oracle.cuts import Cuts
from bagpipe.device_oracle.state import SIZES_WORDS, State
from bagpipe.lookups import GroupLookups, group_lookups
from bagpipe.types import Group, Jagged


@dataclass(frozen=True, kw_only=True)
class StagedIds:
    """One group's part of a batch. Its words lie in pinned memory where the device is a GPU."""

    batch: Jagged
    lookups: GroupLookups
    buffer: Buffer
    num_lookups: int
    num_bags: int  # of all features
    is_wide: bool
    """Whether ids have 64 bits, else 32."""
    given: Tensor
    """Sizes and ids (feature-major) as the first words of `State.given`, in one piece."""
    bag_offsets: Tensor | None  # (num_bags + 1,) int32; only of jagged bags
    weights: Tensor | None  # (L,) float32; only of a batch with per-sample weights


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
    ids_end = SIZES_WORDS + (1 + is_wide) * length
    offsets_end = ids_end + (0 if lookups.bag_offsets is None else num_bags + 1)
    num_words = offsets_end + (0 if lookups.weights is None else length)
    buffer = staging.take(num_words, 1)
    # By numpy, which lets other threads go on while it copies: torch would wake its threads for it.
    words = buffer.whole.numpy().view(np.int32)
    words[:SIZES_WORDS].view(np.int64)[:] = length, batch.batch_size
    ids = words[SIZES_WORDS:ids_end].view(np.int64 if is_wide else np.int32)
    end = 0
    for start, stop in _runs(lookups):
        begin, end = end, end + stop - start
        ids[begin:end] = batch.values[start:stop]
    bag_offsets, weights = None, None
    if lookups.bag_offsets is not None:
        words[ids_end:offsets_end] = lookups.bag_offsets
        bag_offsets = buffer.whole[ids_end:offsets_end].view(torch.int32)
    if lookups.weights is not None:
        words[offsets_end:num_words].view(np.float32)[:] = lookups.weights
        weights = buffer.whole[offsets_end:num_words]
    return StagedIds(
        batch=batch,
        lookups=lookups,
        buffer=buffer,
        num_lookups=length,
        num_bags=num_bags,
        is_wide=is_wide,
        given=buffer.whole[:ids_end].view(torch.int32),
        bag_offsets=bag_offsets,
        weights=weights,
    )


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


def write(state: State, cuts: Cuts, staged: StagedIds) -> None:
    """Copies a batch to where `enter` reads it, on the current stream, without waiting."""
    capacity, length = state.capacity, staged.num_lookups
    if capacity.is_wide == staged.is_wide:
        num_words = SIZES_WORDS + (1 + staged.is_wide) * length
        cuts.of_input("given", num_words).copy_(staged.given, non_blocking=True)
    else:
        sizes, ids = staged.given[:SIZES_WORDS], staged.given[SIZES_WORDS:]
        state.sizes.copy_(sizes.view(torch.int64), non_blocking=True)
        state.ids[:length].copy_(ids.long(), non_blocking=True)
    if capacity.is_jagged:
        offsets = cuts.of_input("bag_offsets", staged.num_bags + 1)
        if staged.bag_offsets is None:
            torch.arange(staged.num_bags + 1, out=offsets)
        else:
            offsets.copy_(staged.bag_offsets, non_blocking=True)
    if capacity.is_weighted:
        if staged.weights is None:
            state.lookup_weights.fill_(1.0)
        else:
            weights = cuts.of_input("lookup_weights", length)
            weights.copy_(staged.weights, non_blocking=True)
