"""How evenly shuffled reading spreads what lies together in the files."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from bagpipe.data.reading_order import PARTS_PER_BATCH, WINDOW_BATCHES, Shuffled

ROWS = 256  # a record batch, and a batch


def read_rows(num_batches: int, last_rows: int = ROWS, epoch: int = 0) -> npt.NDArray[np.int64]:
    """The rows in the order of one epoch, by their place in the files."""
    starts = np.append(np.arange(num_batches), num_batches - 1 + last_rows / ROWS) * ROWS
    starts = starts.astype(np.int64)
    order = Shuffled(starts, seed=3, epoch=epoch)
    rows = np.full(starts[-1], -1)
    for begin in range(0, len(rows), ROWS):
        for piece in order.pieces(begin, min(begin + ROWS, len(rows))):
            rows[begin + piece.positions] = starts[piece.record_batch] + piece.rows
    return rows


def spread(rows: npt.NDArray[np.int64], label: npt.NDArray[np.bool_]) -> float:
    """The standard deviation of the click rate a batch, as a multiple of that of random batches."""
    rate = label.mean()
    rates = label[rows[: len(rows) // ROWS * ROWS]].reshape(-1, ROWS).mean(1)
    return float(rates.std() / np.sqrt(rate * (1 - rate) / ROWS))


@pytest.mark.parametrize(("num_batches", "last_rows"), [(1, 77), (16, ROWS), (17, 1), (203, 3)])
def test_every_row_is_read_once(num_batches: int, last_rows: int) -> None:
    rows = read_rows(num_batches, last_rows)
    assert np.array_equal(np.sort(rows), np.arange(len(rows)))
    other = read_rows(num_batches, last_rows, epoch=1)
    assert len(rows) == 1 or not np.array_equal(rows, other)


@pytest.mark.parametrize("num_batches", [16, 17, 21, 33, 200])
def test_data_sorted_by_label_come_in_even_batches(num_batches: int) -> None:
    rows = read_rows(num_batches)
    for share in (0.03, 0.25, 0.5, 0.77):
        label = np.arange(len(rows)) < share * len(rows)
        assert spread(rows, label) < 1.5  # 4 in windows of whole record batches at random


def test_days_that_are_sorted_each_come_in_nearly_even_batches() -> None:
    rows = read_rows(200)
    day = len(rows) // 10
    assert spread(rows, np.arange(len(rows)) % day < 0.25 * day) < 2


def test_a_window_holds_as_many_rows_at_most_as_it_has_record_batches() -> None:
    for num_batches in (17, 100, 211, 1100):
        order = Shuffled(np.arange(num_batches + 1) * ROWS, seed=0, epoch=0)
        window = WINDOW_BATCHES * ROWS
        sizes = np.diff([*order._window_starts, num_batches * ROWS])
        assert sizes.max() <= window
        assert sizes.min() >= window / 2 - ROWS / PARTS_PER_BATCH


def test_few_record_batches_are_mixed_wholly() -> None:
    """The order that they have had since prepared data can be shuffled."""
    batches = np.random.default_rng([3, 0, 0]).permutation(9)
    mixed = np.random.default_rng([3, 0, 1, 0]).permutation(9 * ROWS)
    expected = (batches[:, None] * ROWS + np.arange(ROWS)).reshape(-1)[mixed]
    assert np.array_equal(read_rows(9), expected)
