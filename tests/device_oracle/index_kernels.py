"""Kernels that find and claim entries of the index of rows, and do nothing else."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from bagpipe.cache.triton_launch import element_kernel
from bagpipe.device_oracle.row_index_triton import claim_entry, entry_of
from bagpipe.device_oracle.state import State

_TILE = 128


def find(state: State, rows: Tensor) -> Tensor:
    """The entries of rows, as `entry_of` finds them."""
    entries = torch.empty_like(rows)
    arguments = (state.keys, rows, entries, state.num_entries, len(rows))
    _find.launch(-(-len(rows) // _TILE), arguments, {"TILE": _TILE}, 1)
    return entries


def claim(state: State, rows: Tensor) -> Tensor:
    """The entries of rows, as `claim_entry` gives them."""
    entries = torch.empty_like(rows)
    arguments = (
        *(state.keys, rows, entries, state.alert, state.entered),
        *(state.num_entries, len(rows)),
    )
    _claim.launch(-(-len(rows) // _TILE), arguments, {"TILE": _TILE}, 1)
    return entries


@element_kernel
def _find(
    keys: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    num_entries: tl.tensor,
    size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_row = place < size
    row = tl.load(rows + place, mask=is_row, other=0)
    tl.store(entries + place, entry_of(keys, row, is_row, num_entries), mask=is_row)


@element_kernel
def _claim(
    keys: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    alert: tl.tensor,
    entered: tl.tensor,
    num_entries: tl.tensor,
    size: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_row = place < size
    row = tl.load(rows + place, mask=is_row, other=0)
    entry = claim_entry(keys, row, is_row, num_entries, alert, tl.load(entered))
    tl.store(entries + place, entry, mask=is_row)
