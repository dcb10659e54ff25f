"""The unique rows of a batch and the order of its backward sums, found when they are needed.

An arm without lookahead does in the step what the oracle plans ahead: on a CPU with the oracle's
own loops, on CUDA by one sort and torch operations on its result. Both give the `DevicePlan` that
the kernels of the cache read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bagpipe.cache.device_plan import DevicePlan
from bagpipe.optimizers import SGD
from bagpipe.oracle.dedup import DedupedGroup, dedup
from bagpipe.plan import MAX_PIECE_LENGTH
from bagpipe.types import Int32Array, Jagged, TableConfig, group_tables


def plan_of(
    deduped: DedupedGroup, lookups: Int32Array, *, step: int, batch_size: int, num_features: int
) -> DevicePlan:
    """A plan on the CPU that calls unique rows by their numbers.

    Args:
        deduped: the batch's unique rows and their bags.
        lookups: for each lookup its place in what the lookup reads, (L,) int32.
        step: of the plan.
        batch_size: samples.
        num_features: features a sample.
    """
    return DevicePlan(
        step=step,
        batch_size=batch_size,
        num_features=num_features,
        lookup_slots=torch.from_numpy(lookups),
        bag_offsets=None if deduped.bag_offsets is None else torch.from_numpy(deduped.bag_offsets),
        bag_scales=None,
        unique_slots=torch.from_numpy(deduped.unique_rows.astype(np.int32)),
        bags=torch.from_numpy(deduped.bags),
        piece_offsets=torch.from_numpy(deduped.piece_offsets),
        long_uniques=torch.from_numpy(deduped.long_uniques),
        long_offsets=torch.from_numpy(deduped.long_offsets),
    )


def plan_uniques_on_cpu(slots: Tensor, num_slots: int, *, step: int) -> DevicePlan:
    """Plans the unique ones of `slots` (n,) int32, each with its places as bags of one feature."""
    (group,) = group_tables(
        [
            TableConfig(
                name="slots", num_embeddings=num_slots, embedding_dim=1, feature_names=["slot"]
            )
        ],
        SGD(lr=0),
    )
    deduped = dedup(group, Jagged(keys=("slot",), values=slots.numpy(), batch_size=len(slots)))
    return plan_of(deduped, deduped.inverse, step=step, batch_size=len(slots), num_features=1)


def plan_uniques(
    rows: Tensor,
    output_rows: Tensor,
    *,
    step: int,
    batch_size: int,
    num_features: int,
    bag_offsets: Tensor | None = None,
) -> DevicePlan:
    """Plans the unique rows of a batch, ascending, on the device of `rows`.

    The host waits for the device once, for all sizes.

    Args:
        rows: the row of each lookup, (L,) int32.
        output_rows: the output row that each lookup feeds, (L,) int32.
        step: of the plan.
        batch_size: samples.
        num_features: features a sample.
        bag_offsets: (F * B + 1,) int32; None: each bag has one id.

    Returns:
        A plan whose `unique_slots` are the unique rows and whose `lookup_slots` are places among
        them.
    """
    ordered, order = torch.sort(rows, stable=True)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    of_ordered = is_first.cumsum(0) - 1
    inverse = torch.empty_like(rows)
    inverse[order] = of_ordered.to(torch.int32)
    # Sizes are unknown on the host until `tolist`, so all arrays are as long as they can become.
    numbers = torch.arange(len(rows) + 1, device=rows.device)
    begins = torch.searchsorted(of_ordered, numbers)  # (L + 1,), L beyond the last unique row
    counts = begins.diff()
    rests = (counts - MAX_PIECE_LENGTH).clamp(min=0)  # bags beyond the first piece
    num_pieces = (rests + MAX_PIECE_LENGTH - 1) // MAX_PIECE_LENGTH  # further ones
    sizes = torch.stack([is_first.sum(), (rests > 0).sum(), num_pieces.sum()])
    num_uniques, num_longs, num_further = sizes.tolist()
    begins, counts, rests, num_pieces = (
        each[:num_uniques] for each in (begins, counts, rests, num_pieces)
    )
    lengths, long_uniques, long_offsets = _further_pieces(rests, num_pieces, num_longs, num_further)
    first_ends, rest_ends = (counts - rests).cumsum(0), rests.cumsum(0)
    places = torch.arange(len(rows), device=rows.device) - begins[of_ordered]  # within the row
    in_first = (first_ends - (counts - rests))[of_ordered] + places
    in_rest = first_ends[-1:] + (rest_ends - rests)[of_ordered] + places - MAX_PIECE_LENGTH
    bags = torch.empty_like(output_rows)
    bags[torch.where(places < MAX_PIECE_LENGTH, in_first, in_rest)] = output_rows[order]
    return DevicePlan(
        step=step,
        batch_size=batch_size,
        num_features=num_features,
        lookup_slots=inverse,
        bag_offsets=bag_offsets,
        bag_scales=None,
        unique_slots=ordered[begins],
        bags=bags,
        piece_offsets=_with_zero(torch.cat([counts - rests, lengths]).cumsum(0)).to(torch.int32),
        long_uniques=long_uniques.to(torch.int32),
        long_offsets=long_offsets.to(torch.int32),
    )


def _further_pieces(
    rests: Tensor, num_pieces: Tensor, num_longs: int, num_further: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces beyond the first ones, from the bags and pieces that each row has there (U,).

    Returns:
        The pieces' lengths, the rows that have any, and these rows' offsets in the pieces.
    """
    ends = num_pieces.cumsum(0)
    numbers = torch.arange(num_further, device=rests.device)
    row = torch.searchsorted(ends, numbers, right=True)  # of each further piece
    lengths = (rests[row] - (numbers - (ends - num_pieces)[row]) * MAX_PIECE_LENGTH).clamp(
        max=MAX_PIECE_LENGTH
    )
    long_uniques = torch.searchsorted(
        (rests > 0).cumsum(0), torch.arange(1, num_longs + 1, device=rests.device)
    )
    return lengths, long_uniques, _with_zero(ends[long_uniques])


def output_rows_of(
    batch_size: int, num_features: int, bag_offsets: Int32Array | None
) -> Int32Array:
    """The output row b * F + f that each lookup feeds, feature-major: (L,) int32."""
    bags = np.arange(num_features * batch_size, dtype=np.int32)
    rows = bags % batch_size * num_features + bags // batch_size
    return rows if bag_offsets is None else np.repeat(rows, np.diff(bag_offsets))


def _with_zero(ends: Tensor) -> Tensor:
    return torch.cat([ends.new_zeros(1), ends])
