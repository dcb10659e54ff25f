"""In which order the rows of a split are read: front to back, or shuffled within bounds that keep
reading local.

Shuffled, the record batches are put in a random order, and the rows of every WINDOW_BATCHES that
follow each other are mixed. A split of at most one window is so mixed wholly; a larger one comes
close to it, while each moment reads from one window only. All of it is a pure function of (seed,
epoch), and any position is found without what comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bagpipe.types import Int64Array

WINDOW_BATCHES: Final = 16


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of one record batch, and where they go in a batch."""

    record_batch: int
    rows: Int64Array | slice
    positions: Int64Array | slice


class FrontToBack:
    """The order of the files. `starts` (R + 1,) is the first row of each of the R record batches,
    then the number of rows.
    """

    def __init__(self, starts: Int64Array) -> None:
        self._starts = starts

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """What makes up the rows at positions [begin, end) of the order."""
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
    """The order of one epoch; see the module. Memory: 8 bytes a row of one window."""

    def __init__(self, starts: Int64Array, *, seed: int, epoch: int) -> None:
        self._key = (seed, epoch)
        self._order = np.random.default_rng([*self._key, 0]).permutation(len(starts) - 1)
        self._starts = np.concatenate([[0], np.cumsum(np.diff(starts)[self._order])]).astype(
            np.int64
        )
        self._window_starts = self._starts[list(range(0, len(self._order), WINDOW_BATCHES))]
        self._window = -1
        self._mixed = np.empty(0, np.int64)

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """What makes up the rows at positions [begin, end) of the order."""
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
        """`rows` (n,) are positions in the order of record batches; the first goes to `base`. Each
        piece's rows ascend.
        """
        order = np.argsort(rows)
        rows = rows[order]
        cuts = np.searchsorted(rows, self._starts)
        for place in np.flatnonzero(np.diff(cuts)):
            chosen = slice(cuts[place], cuts[place + 1])
            yield Piece(
                record_batch=int(self._order[place]),
                rows=rows[chosen] - self._starts[place],
                positions=order[chosen] + base,
            )

    def _mix(self, window: int, num_rows: int) -> npt.NDArray[np.int64]:
        if window != self._window:
            self._mixed = np.random.default_rng([*self._key, 1, window]).permutation(num_rows)
            self._window = window
        return self._mixed
