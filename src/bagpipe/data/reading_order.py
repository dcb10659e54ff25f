"""The order in which the rows of a split are read: front to back, or shuffled.

Shuffling keeps reading local. A split of at most WINDOW_BATCHES record batches is mixed as a whole.
A larger one is read in windows of that many rows, each mixed, so that at any moment only one window
is being read. The split is cut into as many stretches as a window has parts. From each stretch a
window gets one random part, a quarter of a record batch. So whatever changes along the split (the
label in data sorted by it, the day, the user) has nearly its share of the whole in each window.

All of it is a pure function of (seed, epoch), and any position is found without going through what
comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bagpipe.types import Int64Array

WINDOW_BATCHES: Final = 16
PARTS_PER_BATCH: Final = 4


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one record batch, and where they go in a batch."""

    record_batch: int
    rows: Int64Array | slice
    positions: Int64Array | slice


class FrontToBack:
    """The order of the files.

    `starts` (R + 1,) has the first row of each of the R record batches, then the number of rows.
    """

    def __init__(self, starts: Int64Array) -> None:
        self._starts = starts

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces that make up positions [begin, end) of the order."""
        index = int(np.searchsorted(self._starts, begin, side="right")) - 1
        position = begin
        while position < end:
            first, last = int(self._starts[index]), int(self._starts[index + 1])
            stop = min(last, end)
            yield Piece(
                record_batch=index,
                rows=slice(position - first, stop - first),
                positions=slice(position - begin, stop - begin),
            )
            position, index = stop, index + 1


class Shuffled:
    """The order of one epoch; see the module. Memory is 8 bytes per row of one window."""

    def __init__(self, starts: Int64Array, *, seed: int, epoch: int) -> None:
        self._key = (seed, epoch)
        num_batches = len(starts) - 1
        random = np.random.default_rng([*self._key, 0])
        if num_batches <= WINDOW_BATCHES:
            parts_per_batch, order = 1, random.permutation(num_batches)
            windows = np.zeros(num_batches, np.int64)
        else:
            parts_per_batch = PARTS_PER_BATCH
            most = parts_per_batch * WINDOW_BATCHES
            order, windows = _spread(num_batches * parts_per_batch, most, random)
        firsts, sizes = _cut(np.diff(starts), parts_per_batch)
        self._batches = order // parts_per_batch  # (P,) for each part in its order: its batch,
        self._firsts = firsts[order]  # (P,) its first row in that,
        self._starts = np.concatenate([[0], np.cumsum(sizes[order])])  # (P + 1,) its position
        self._window_starts = self._starts[:-1][np.diff(windows, prepend=-1) > 0]
        self._window = -1
        self._mixed = np.empty(0, np.int64)

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """The pieces that make up positions [begin, end) of the order."""
        ends = np.append(self._window_starts[1:], self._starts[-1])
        position = begin
        while position < end:
            window = int(np.searchsorted(self._window_starts, position, side="right")) - 1
            stop = min(int(ends[window]), end)
            first = int(self._window_starts[window])
            rows = self._mix(window, int(ends[window]) - first)[position - first : stop - first]
            yield from self._pieces_of(rows + first, position - begin)
            position = stop

    def _pieces_of(self, rows: Int64Array, base: int) -> Iterator[Piece]:
        """The pieces that hold `rows` (n,), positions in the order of parts.

        They fill the batch from position `base` on. The rows of a piece ascend.
        """
        order = np.argsort(rows)
        rows = rows[order]
        cuts = np.searchsorted(rows, self._starts)
        for place in np.flatnonzero(np.diff(cuts)):
            chosen = slice(cuts[place], cuts[place + 1])
            yield Piece(
                record_batch=int(self._batches[place]),
                rows=rows[chosen] - self._starts[place] + self._firsts[place],
                positions=order[chosen] + base,
            )

    def _mix(self, window: int, num_rows: int) -> npt.NDArray[np.int64]:
        if window != self._window:
            self._mixed = np.random.default_rng([*self._key, 1, window]).permutation(num_rows)
            self._window = window
        return self._mixed


def _spread(
    num_parts: int, most: int, random: np.random.Generator
) -> tuple[Int64Array, Int64Array]:
    """An order of the parts (P,), and the window of each (P,), which has at most `most` parts.

    The parts are cut into stretches, as many as a window has parts. Each stretch deals its parts to
    windows that are evenly far apart, in a random order.
    """
    num_windows = -(-num_parts // most)
    num_stretches = -(-num_parts // num_windows)
    parts = np.arange(num_parts)
    stretches = parts * num_stretches // num_parts
    shuffled = random.permutation(num_parts)
    shuffled = shuffled[np.argsort(stretches[shuffled], kind="stable")]  # within each stretch
    ranks = parts - np.searchsorted(stretches, stretches)
    sizes = np.bincount(stretches)[stretches]
    # A stretch with fewer parts than there are windows skips some, at random.
    offsets = random.integers(1 << 16, size=num_stretches)[stretches]
    windows = ((ranks << 16) + offsets) * num_windows // (sizes << 16)
    by_window = np.argsort(windows, kind="stable")
    return shuffled[by_window], windows[by_window]


def _cut(sizes: Int64Array, parts_per_batch: int) -> tuple[Int64Array, Int64Array]:
    """Cuts record batches of `sizes` (R,) into parts.

    Returns:
        Each part's first row in its record batch (P,), and its number of rows (P,).
    """
    bounds = sizes[:, None] * np.arange(parts_per_batch + 1) // parts_per_batch
    return bounds[:, :-1].reshape(-1), np.diff(bounds, axis=1).reshape(-1)
