"""Running sums over tiles in Triton, without a pass of their own.

A program writes its tile's count. In a later kernel each program sums those of the tiles before
its own, and within the tile it knows the running sum. So that no program reads all counts, those
of GROUP tiles are also summed as they are written. Sums are of integers: their order decides
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import device_function

GROUP = 128


@dataclass(frozen=True, kw_only=True)
class TileCounts:
    """What tiles count, of one or several kinds."""

    tiles: Tensor  # (kinds * tiles,) int32
    groups: Tensor  # (kinds * groups,) int32, zeros at first


def num_groups(num_tiles: int) -> int:
    """How many groups of tiles there are."""
    return -(-num_tiles // GROUP)


def make_counts(num_tiles: int, num_kinds: int, zeros: Tensor) -> TileCounts:
    """Makes room for counts.

    Args:
        num_tiles: How many tiles there are.
        num_kinds: How many counts each has.
        zeros: (num_kinds * num_groups(num_tiles),) int32, zeros; is kept.
    """
    tiles = torch.empty(num_kinds * num_tiles, dtype=torch.int32, device=zeros.device)
    return TileCounts(tiles=tiles, groups=zeros)


@device_function
def put_count(
    tiles: tl.tensor,
    groups: tl.tensor,
    num_tiles: tl.tensor,
    count: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Writes the count of this program's tile."""
    tile, num_groups = tl.program_id(0), (num_tiles + GROUP - 1) // GROUP
    tl.store(tiles + KIND * num_tiles + tile, count)
    tl.atomic_add(groups + KIND * num_groups + tile // GROUP, count, mask=count > 0, sem="relaxed")


@device_function
def sum_before(
    tiles: tl.tensor,
    groups: tl.tensor,
    num_tiles: tl.tensor,
    tile: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """The sum of the counts of the tiles before `tile`; of all, if that is `num_tiles`."""
    index, group, num_groups = tl.arange(0, GROUP), tile // GROUP, (num_tiles + GROUP - 1) // GROUP
    in_group = tiles + KIND * num_tiles + group * GROUP + index
    found = tl.load(in_group, mask=index < tile % GROUP, other=0)
    for start in range(0, group, GROUP):
        is_before = start + index < group
        found += tl.load(groups + KIND * num_groups + start + index, mask=is_before, other=0)
    return tl.sum(found, axis=0)
