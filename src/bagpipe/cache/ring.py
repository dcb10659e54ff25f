"""Rings of plans on the device, from which kernels read the plan of whatever step it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RingLayout:
    """How plans lie in rings.

    What is made with a plan is in arrays (K, capacity), what is made when its batch enters in
    arrays (R, capacity). Step t is in place t % K, or t % R.
    """

    headers: Tensor
    """(K, H) int64, the counts of each plan."""
    columns: tuple[int, int, int]
    """Where in a header the numbers of unique rows, pieces and long rows are."""
    num_batches: int
    """R."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Where kernels find out which step it is, so that a graph can hold them for any step."""

    layout: RingLayout
    clock: Tensor
    """(1,) int64, the step."""
    typical: tuple[int, int, int]
    """About as many unique rows, pieces and long rows are expected. There may be more."""
    rates: Tensor
    """(2,) float32, the learning rate and the share by which weights shrink."""


@dataclass(frozen=True, kw_only=True)
class RowRings:
    """One message's rows of many steps: those of step t are in place t % K.

    Rows of the arrays may lie further apart than they are long.
    """

    send: Tensor
    """(K, capacity) int32, the rows that are sent."""
    send_counts: Tensor
    """(K, num_trainers) int64."""
    receive_counts: Tensor
    """(K, num_trainers) int64."""
    firsts: Tensor
    """(K,) int64, the row from which on others' are received."""


@dataclass(frozen=True, kw_only=True)
class RowsByClock(RowRings):
    """A message for whatever step it is."""

    clock: Tensor
    """(1,) int64, the step."""
