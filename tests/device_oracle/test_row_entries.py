"""Entries of the index of rows as a map: how they are found, claimed, kept and forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.device_oracle.test_device_oracle import DEVICE
from tests.device_oracle.test_functions import known_of, make_one

from bagpipe.device_oracle import row_index
from bagpipe.device_oracle.alerts import INDEX_FULL
from bagpipe.device_oracle.state import NO_KEY, SPARE, State, Window

WAYS = pytest.mark.parametrize("way", ["torch", "triton"])


def number_of_keys(state: State) -> int:
    assert state.keys is not None
    assert (state.keys[state.num_entries :] == NO_KEY).all()  # nobody has a spare entry
    return int((state.keys != NO_KEY).sum())


def functions_of(way: str) -> Any:
    """`find` and `claim` of a way: (state, rows) -> entries."""
    if way == "torch":
        return [
            lambda state, rows, one=one: one(state, rows, torch.ones_like(rows, dtype=torch.bool))
            for one in (row_index.find, row_index.claim)
        ]
    kernels = pytest.importorskip("tests.device_oracle.index_kernels")
    return [kernels.find, kernels.claim]


def make_map(num_slots: int = 300, **options: Any) -> State:
    return make_one(num_slots, knows_all_rows=False, **options)


@WAYS
def test_rows_of_one_home_have_entries_of_their_own_around_the_end(way: str) -> None:
    find, claim = functions_of(way)
    state = make_map()
    size = state.num_entries
    candidates = np.arange(300_000, dtype=np.uint64)
    upper = (candidates * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    homes = (upper * np.uint64(size)) >> np.uint64(32)
    rows = torch.from_numpy(candidates[homes >= size - 2].astype(np.int64)[:60]).to(DEVICE)
    entries = torch.cat([claim(state, part) for part in rows.split(40)])
    assert state.keys is not None
    assert number_of_keys(state) == len(set(find(state, rows).tolist())) == 60
    assert int(find(state, rows).max()) < size
    torch.testing.assert_close(state.keys[find(state, rows)], rows)
    if way == "triton":  # where entries stay, and rows have such homes
        torch.testing.assert_close(find(state, rows), entries)
        assert int((entries < 58).sum()) == 58
    assert int(find(state, rows + 1).min()) >= size


@WAYS
def test_rows_that_come_at_once_have_entries_of_their_own(way: str) -> None:
    find, claim = functions_of(way)
    number = 400_000 if DEVICE.type == "cuda" else 400
    state, generator = make_map(number), torch.Generator().manual_seed(3)
    rows = torch.randint(0, 2**40, (number + number // 2,), generator=generator).unique()
    rows = rows[torch.randperm(len(rows), generator=generator)].to(DEVICE)
    for part in rows.split(len(rows) // 3):
        claim(state, part)
    assert state.keys is not None
    assert number_of_keys(state) == len(rows)
    torch.testing.assert_close(state.keys[find(state, rows)], rows)


@WAYS
def test_a_row_that_is_claimed_again_keeps_what_is_known_of_it(way: str) -> None:
    find, claim = functions_of(way)
    state, rows = make_map(), torch.arange(40, 80, device=DEVICE)
    state.forgotten.fill_(6)
    entries = claim(state, rows)
    state.slots_of_rows[entries] = rows.int() + 1
    state.places_of_rows[entries] = rows.int() + 2
    claim(state, rows - 20)
    entries = find(state, rows)
    torch.testing.assert_close(state.slots_of_rows[entries].long(), rows + 1)
    torch.testing.assert_close(state.places_of_rows[entries].long(), rows + 2)
    assert (state.places_of_rows[find(state, rows[:20] - 20)] == -1).all()


def test_rows_that_are_near_and_too_many_are_told() -> None:
    rebuild = pytest.importorskip("bagpipe.device_oracle.row_index_triton").rebuild
    _, claim = functions_of("triton")
    state = make_map()
    entries = claim(state, torch.arange(200, device=DEVICE))
    state.slots_of_rows[entries] = 0  # near, since each is in a slot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Window, "max_near", lambda window, max_uniques: 200)
        rebuild(state, state)
        assert int(state.alert[0]) == 0
        patch.setattr(Window, "max_near", lambda window, max_uniques: 199)
        rebuild(state, state)
        assert int(state.alert[0]) == INDEX_FULL


def filled(state: State, rows: torch.Tensor) -> None:
    """Writes something of each kind down for rows that have an entry, in the midst of a stream."""
    generator = torch.Generator().manual_seed(5)

    def drawn(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (len(rows),), generator=generator).to(DEVICE)

    assert state.keys is not None
    entries = (state.keys == rows[:, None]).nonzero()[:, 1]
    room = state.capacity.max_uniques
    state.planned.fill_(40)
    state.batches.copy_(torch.arange(len(state.batches)) + 40 - state.window.num_plans)
    evicted = -2 - drawn(0, 40)
    state.slots_of_rows[entries] = torch.where(drawn(0, 2) > 0, drawn(0, 300), evicted).int()
    places = (torch.randperm(len(state.batches) * room, generator=generator)).to(DEVICE)
    places = places[: len(rows)]
    there = drawn(0, 4) > 0
    state.unique_rows.view(-1)[places] = torch.where(there, rows, rows + 1).int()
    state.places_of_rows[entries] = places.masked_fill(drawn(0, 4) == 0, -1).int()


@pytest.mark.parametrize("grows", [False, True])
def test_triton_keeps_and_forgets_the_rows_that_torch_operations_do(
    grows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("bagpipe.device_oracle.row_index_triton")
    launching = pytest.importorskip("bagpipe.cache.triton_launch")
    monkeypatch.setattr(triton, "_TILE", launching.Tiling(elements=256, per_thread=4).of(1))
    known, rows = [], torch.arange(500, device=DEVICE) * 97
    for way, rebuild in (("torch", row_index.rebuild), ("triton", triton.rebuild)):
        state = make_map()
        functions_of(way)[1](state, rows)
        filled(state, rows)
        old, state = state, make_map(max_uniques=350) if grows else state
        rebuild(state, old)
        assert state.keys is not None
        kept = state.keys[state.keys != NO_KEY].sort().values
        known.append([kept, state.forgotten, *known_of(state, kept)])
        assert 300 < len(kept) < 450
        assert int(state.alert[0]) == 0
        is_unknown = state.slots_of_rows[state.keys == NO_KEY][:-SPARE]
        assert (is_unknown == -2 - state.forgotten).all()
    for found, expected in zip(*known, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
