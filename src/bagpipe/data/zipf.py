"""Draws from the finite Zipf distribution in constant time, however many ranks it has.

P(rank k) ~ k**-s for k = 1..n; s = 0 is the uniform distribution. The HEAD_RANKS most frequent
ranks, and all others as one outcome, are drawn from an alias table, which holds probabilities to
2**-32 (M. D. Vose, "A linear algorithm for generating random numbers with a given distribution",
IEEE TSE 17, 1991). The others are then drawn by rejection-inversion: the integral of x**-s is
inverted and the result rounded, and few draws are rejected (W. Hörmann, G. Derflinger,
"Rejection-inversion to generate variates from monotone discrete distributions", ACM TOMACS 6,
1996). The tail's mass is that integral, with a relative error below s (s + 1) / HEAD_RANKS**2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, log, log1p
from typing import Final

import numpy as np

from bagpipe.data.hashing import GOLDEN, mix64, unit
from bagpipe.native.jit import jit
from bagpipe.types import Float64Array, Int32Array, UInt32Array

HEAD_RANKS: Final = 2_048
_TINY: Final = 1e-8
_WORD: Final = np.uint64(32)
_LOW: Final = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Zipf:
    """The tables of one distribution, for `draw_rank`; h = min(num_ranks, HEAD_RANKS)."""

    # (h,), or (h + 1,) with a tail: below it a column stands for its own rank, else for its alias
    thresholds: UInt32Array
    aliases: Int32Array  # as many
    # (5,) num_ranks, exponent, both ends of the integral, and the distance within which a draw is
    # accepted at once
    tail: Float64Array

    @classmethod
    def make(cls, num_ranks: int, exponent: float) -> Zipf:
        """The distribution over ranks 0 to `num_ranks` - 1."""
        head = min(num_ranks, HEAD_RANKS)
        masses = np.arange(1, head + 1, dtype=np.float64) ** -exponent
        if num_ranks > head:
            tail_mass = _integral(num_ranks + 0.5, exponent) - _integral(head + 0.5, exponent)
            masses = np.append(masses, tail_mass)
        thresholds, aliases = _alias_table(masses / masses.sum())
        return cls(
            thresholds=thresholds,
            aliases=aliases,
            tail=np.array(_tail(num_ranks, float(exponent), head)),
        )


@jit
def draw_rank(
    state: np.uint64, thresholds: UInt32Array, aliases: Int32Array, tail: Float64Array
) -> int:
    """A rank, from 0 for the most frequent one, that depends on `state` only."""
    bits = mix64(state)
    column = np.int64(((bits >> _WORD) * np.uint64(len(thresholds))) >> _WORD)
    rank = int(column if (bits & _LOW) < np.uint64(thresholds[column]) else aliases[column])
    return rank if rank < HEAD_RANKS else _draw_tail(state + GOLDEN, tail)


@jit
def _draw_tail(state: np.uint64, tail: Float64Array) -> int:
    exponent, first, last, at_once = tail[1], tail[2], tail[3], tail[4]
    while True:
        y = last + unit(mix64(state)) * (first - last)
        x = _inverse_integral(y, exponent)
        rank = min(max(int(x + 0.5), HEAD_RANKS + 1), int(tail[0]))
        if rank - x <= at_once or y >= _integral(rank + 0.5, exponent) - exp(-exponent * log(rank)):
            return rank - 1
        state += GOLDEN


@jit
def _tail(num_ranks: int, exponent: float, head: int) -> tuple[float, float, float, float, float]:
    first = _integral(head + 1.5, exponent) - (head + 1.0) ** -exponent
    last = _integral(num_ranks + 0.5, exponent)
    area = _integral(head + 2.5, exponent) - (head + 2.0) ** -exponent
    at_once = head + 2.0 - _inverse_integral(area, exponent)
    return float(num_ranks), exponent, first, last, at_once


@jit
def _integral(x: float, exponent: float) -> float:
    """(x**(1 - s) - 1) / (1 - s), the integral of t**-s from 1 to x."""
    log_x = log(x)
    t = (1.0 - exponent) * log_x
    return log_x * (expm1(t) / t if abs(t) > _TINY else 1.0 + t / 2.0)


@jit
def _inverse_integral(y: float, exponent: float) -> float:
    t = max(y * (1.0 - exponent), -1.0)
    return exp(y * (log1p(t) / t if abs(t) > _TINY else 1.0 - t / 2.0))


@jit
def _alias_table(probabilities: Float64Array) -> tuple[UInt32Array, Int32Array]:
    """Vose's method: column i is drawn uniformly and stands for i or its alias."""
    n = len(probabilities)
    scaled = probabilities * n
    aliases = np.arange(n).astype(np.int32)
    stack = np.empty(n, np.int64)  # columns below 1 grow from the left, the others from the right
    num_small, first_large = 0, n
    for i in range(n):
        if scaled[i] < 1.0:
            stack[num_small] = i
            num_small += 1
        else:
            first_large -= 1
            stack[first_large] = i
    while num_small > 0 and first_large < n:
        num_small -= 1
        small, large = stack[num_small], stack[first_large]
        aliases[small] = large
        scaled[large] -= 1.0 - scaled[small]
        if scaled[large] < 1.0:
            first_large += 1
            stack[num_small] = large
            num_small += 1
    thresholds = np.empty(n, np.uint32)
    for i in range(n):
        thresholds[i] = np.uint32(min(max(scaled[i], 0.0) * 4294967296.0, 4294967295.0))
    return thresholds, aliases
