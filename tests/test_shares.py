"""A rank's samples of a global batch, and telling them from others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bagpipe.errors import DataError
from bagpipe.jagged import is_share, same_ids, share_of
from bagpipe.types import Jagged

BATCH_SIZE = 7


def batch_of(*, is_multi_hot: bool, is_weighted: bool) -> Jagged:
    random = np.random.default_rng(3)
    lengths = (
        random.integers(0, 4, 2 * BATCH_SIZE) if is_multi_hot else np.ones(2 * BATCH_SIZE, np.int64)
    )
    values = random.permutation(int(lengths.sum()))
    return Jagged(
        keys=("user", "item"),
        values=values,
        batch_size=BATCH_SIZE,
        offsets=np.cumsum([0, *lengths]) if is_multi_hot else None,
        weights=random.random(len(values), dtype=np.float32) if is_weighted else None,
    )


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("is_multi_hot", [False, True])
@pytest.mark.parametrize("num_trainers", [1, 2, 3, 8])
def test_shares_are_told_from_others(
    num_trainers: int, is_multi_hot: bool, is_weighted: bool
) -> None:
    batch = batch_of(is_multi_hot=is_multi_hot, is_weighted=is_weighted)
    shares = [share_of(batch, rank, num_trainers) for rank in range(num_trainers)]
    for rank, share in enumerate(shares):
        for ids in shares:
            assert is_share(ids, batch, rank, num_trainers) == same_ids(ids, share)
        strangers = [
            replace(share, keys=("item", "user")),
            replace(share, values=share.values + 1),
            replace(share, weights=None if is_weighted else np.ones(len(share.values), np.float32)),
        ]
        if is_weighted:
            strangers.append(replace(share, weights=share.weights + 1))
        for stranger in strangers[: None if len(share.values) else 1]:
            assert not is_share(stranger, batch, rank, num_trainers)


def test_inconsistent_arrays_are_refused() -> None:
    batch = batch_of(is_multi_hot=False, is_weighted=False)
    share = share_of(batch, 0, 2)
    with pytest.raises(DataError, match="13 ids for 2 features x 7 samples"):
        is_share(share, replace(batch, values=batch.values[1:]), 0, 2)
    with pytest.raises(DataError, match="5 ids for 2 features x 3 samples"):
        is_share(replace(share, values=share.values[1:]), batch, 0, 2)


@pytest.mark.parametrize("share_size", [0, 2])
def test_offsets_of_bags_of_one_id_need_not_be_written_down(share_size: int) -> None:
    """A share of such bags alone, or an empty one, may come without, though the batch's others have
    more ids.
    """
    lengths = np.ones((2, 2 * share_size + 1), np.int64)
    lengths[:, share_size:] = 3
    offsets = np.cumsum([0, *lengths.ravel()])
    batch = Jagged(
        keys=("user", "item"),
        values=np.arange(offsets[-1]),
        batch_size=2 * share_size + 1,
        offsets=offsets,
    )
    share = share_of(batch, 0, 2)
    assert share.batch_size == share_size
    assert is_share(replace(share, offsets=None), batch, 0, 2)
    assert not is_share(replace(share_of(batch, 1, 2), offsets=None), batch, 1, 2)
