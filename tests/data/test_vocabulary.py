"""Ids by hash and by dictionary against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.naive import frequency_ids, hash_id

from bagpipe.data import vocabulary
from bagpipe.data.vocabulary import DictionaryVocabulary, HashVocabulary, KeyCounter

KEYS = st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=60)


@given(keys=KEYS, num_embeddings=st.integers(1, 2**31 - 1))
def test_hash_ids_equal_the_plain_formula(keys: list[int], num_embeddings: int) -> None:
    ids = HashVocabulary(num_embeddings).ids(np.array(keys, np.int64))
    assert ids.dtype == np.int32
    assert ids.tolist() == [hash_id(key, num_embeddings) for key in keys]


@given(
    parts=st.lists(KEYS, max_size=6),
    min_count=st.integers(1, 4),
    limit=st.none() | st.integers(1, 6),
    unseen=KEYS,
)
def test_dictionary_equals_a_counter(
    parts: list[list[int]], min_count: int, limit: int | None, unseen: list[int]
) -> None:
    counter = KeyCounter()
    for part in parts:
        counter.add(np.array(part, np.int64))
    keys = [key for part in parts for key in part]
    expected = frequency_ids(keys, min_count)
    vocabulary = DictionaryVocabulary(*counter.counts(), min_count=min_count, max_embeddings=limit)
    kept = {key: id for key, id in expected.items() if limit is None or id < limit}
    assert vocabulary.num_embeddings == len(kept) + 1
    asked = np.array(keys + unseen, np.int64)
    assert vocabulary.ids(asked).tolist() == [kept.get(key, 0) for key in keys + unseen]


def test_counter_merges_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_LEAST_PENDING", 4)
    random = np.random.default_rng(0)
    parts = [random.integers(0, 20, 5) for _ in range(50)]
    counter = KeyCounter()
    for part in parts:
        counter.add(part)
    keys, counts = np.unique(np.concatenate(parts), return_counts=True)
    assert counter.counts()[0].tolist() == keys.tolist()
    assert counter.counts()[1].tolist() == counts.tolist()


def test_known_keys_keep_their_ids_and_new_ones_come_behind() -> None:
    keys, counts = np.array([2, 4, 7, 9]), np.array([3, 1, 5, 5])
    known = np.array([7, 1]), np.array([10, 20])
    found = DictionaryVocabulary(keys, counts, min_count=2, max_embeddings=4, known=known)
    assert found.keys.tolist() == [7, 1, 9]  # 4 is too rare, and there is no room for 2
    assert found.counts.tolist() == [15, 20, 5]
    assert (found.num_known, found.num_embeddings) == (3, 4)
    assert found.ids(np.array([1, 2, 4, 7, 9])).tolist() == [2, 0, 0, 1, 3]
