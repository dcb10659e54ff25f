"""The unique rows of several trainers' shares and who uses them, against dicts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import reference, strategies

from bagpipe.optimizers import SGD
from bagpipe.oracle import dedup
from bagpipe.oracle.merge import merge
from bagpipe.topology import MAX_TRAINERS
from bagpipe.types import Jagged, TableConfig, group_tables


@given(st.data(), st.sampled_from([1, 2, 40, 2**40]), st.sampled_from([1, 2, 3, 8, MAX_TRAINERS]))
@settings(max_examples=strategies.examples(80), deadline=None)
def test_rows_are_numbered_shard_by_shard_in_first_use_order_with_the_set_of_their_users(
    data: st.DataObject, num_rows: int, num_trainers: int
) -> None:
    (group,) = group_tables(
        [TableConfig(name="t", num_embeddings=num_rows, embedding_dim=4, feature_names=["f"])],
        SGD(lr=1.0),
    )
    row = st.integers(0, num_rows - 1)
    ids = data.draw(
        st.lists(st.lists(row, max_size=12), min_size=num_trainers, max_size=num_trainers)
    )
    shares = [
        dedup(group, Jagged(keys=("f",), values=np.array(share, np.int64), batch_size=len(share)))
        for share in ids
    ]
    merged = merge(group, shares)
    expected: dict[int, int] = {}
    for rank, share in enumerate(ids):
        for used in share:
            expected[used] = expected.get(used, 0) | 1 << rank
    assert merged.unique_rows.tolist() == reference.in_order(expected)
    assert merged.shares == tuple(shares)
    if num_trainers == 1:  # nothing to merge: the share's own rows
        assert merged.unique_rows is shares[0].unique_rows
        assert len(merged.users) == len(merged.places[0]) == 0
        assert merged.nbytes == shares[0].nbytes
        return
    assert merged.users.tolist() == [expected[row] for row in merged.unique_rows.tolist()]
    for places, share in zip(merged.places, ids, strict=True):
        assert merged.unique_rows[places].tolist() == reference.in_order(share)
