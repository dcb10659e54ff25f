"""What runs on the device: it never waits for it, and Triton chooses as torch operations do."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagpipe.device_oracle import entering, planning, victims
from bagpipe.device_oracle.state import (
    EVICTED,
    FETCHED,
    NEVER,
    NO_KEY,
    NUM_USED_SLOTS,
    SPARE,
    Capacity,
    State,
    Window,
    make_state,
)
from bagpipe.optimizers import SGD
from bagpipe.types import TableConfig, group_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_one(
    num_slots: int,
    *,
    is_jagged: bool = False,
    is_weighted: bool = False,
    knows_all_rows: bool = True,
    max_uniques: int = 300,
) -> State:
    table = TableConfig(
        name="t",
        num_embeddings=50_000,
        embedding_dim=4,
        feature_names=["f"],
        pooling="sum" if is_weighted else "mean",
    )
    (group,) = group_tables([table], SGD(lr=1.0))
    capacity = Capacity(
        max_lookups=600,
        max_bags=200,
        max_uniques=max_uniques,
        is_jagged=is_jagged,
        is_weighted=is_weighted,
        is_wide=False,
    )
    window = Window(
        num_slots=num_slots, lookahead=4, prefetch_depth=2, knows_all_rows=knows_all_rows
    )
    return make_state(group, window, capacity, DEVICE)


class NothingWaits(TorchDispatchMode):
    """Refuses operations that bring a value to the host, or one from it: no graph can hold them."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        assert "_local_scalar_dense" not in name, "a value is read on the host"
        assert "nonzero" not in name, "a size depends on values"
        assert "aten.lift_fresh" not in name, "a value is made on the host"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("knows_all_rows", [True, False])
@pytest.mark.parametrize("kind", ["one-hot", "jagged", "weighted"])
def test_entering_and_planning_wait_for_nothing(kind: str, knows_all_rows: bool) -> None:
    state = make_one(
        1_000,
        is_jagged=kind == "jagged",
        is_weighted=kind == "weighted",
        knows_all_rows=knows_all_rows,
    )
    state.sizes.copy_(torch.tensor([200, 200]))
    if kind == "jagged":
        state.bag_offsets.copy_(torch.arange(201))
    with NothingWaits():
        entering.enter(state)
        planning.plan(state)
    assert (int(state.entered), int(state.planned)) == (1, 1)
    with pytest.raises(AssertionError, match="read on the host"), NothingWaits():
        state.alert[state.alert[0]]


def use_small_groups(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Sums over groups of two tiles, so that small arrays have groups before their last one."""
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(pytest.importorskip("bagpipe.device_oracle.sums_triton"), "GROUP", 2)


@pytest.mark.parametrize("number", [0, 1, 37, 299])
@pytest.mark.parametrize("num_slots", [300, 4_096, 9_999])
def test_triton_chooses_the_slots_that_torch_operations_do(
    num_slots: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("bagpipe.device_oracle.victims_triton")
    use_small_groups(monkeypatch, triton)
    state, generator = make_one(num_slots), torch.Generator().manual_seed(num_slots + number)

    def drawn(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (num_slots,), generator=generator).to(DEVICE, torch.int32)

    state.planned.fill_(5_000)
    state.settled.fill_(4_990)
    state.last_uses[:num_slots] = drawn(0, 4_991)
    state.last_uses[:num_slots] -= 5_000 * (drawn(0, 3) == 0)  # long ago
    next_uses = drawn(5_000, 5_000 + num_slots)
    state.next_uses[:num_slots] = next_uses.masked_fill(drawn(0, 9) == 0, NEVER)
    state.rows_of_slots[:num_slots] = drawn(0, 50_000).masked_fill(drawn(0, 200) == 0, 50_000)
    wanted = torch.tensor(number, device=DEVICE)
    found = triton.choose_victims(state, wanted)
    expected = victims.choose_victims(state, wanted)
    torch.testing.assert_close(found[:number], expected[:number], rtol=0, atol=0)


def batch_of_many_tiles(state: State, seed: int) -> None:
    """Writes a batch of 590 lookups where it enters, of which one row has every other one."""
    generator = torch.Generator().manual_seed(seed)
    ids = (50_000 * torch.rand(590, generator=generator) ** 6).int()
    ids[::2] = 7  # more than a piece and a tile
    state.ids[:590] = ids
    state.sizes.copy_(torch.tensor([590, 200]))
    offsets = torch.randint(0, 591, (199,), generator=generator).sort().values
    state.bag_offsets[1:-1] = offsets
    state.bag_offsets[-1] = 590
    state.lookup_weights.copy_(torch.arange(600))


def known_of(state: State, rows: torch.Tensor) -> list[torch.Tensor]:
    """What the index knows of rows, which are all in it: (n,) slots or evictions, (n,) places."""
    keys = state.keys
    if keys is None:
        return [state.slots_of_rows[rows], state.places_of_rows[rows]]
    entries = (keys == rows[:, None]).nonzero()[:, 1]
    assert len(entries) == len(rows) == (keys != NO_KEY).sum()
    return [state.slots_of_rows[entries], state.places_of_rows[entries]]


@pytest.mark.parametrize("knows_all_rows", [True, False])
def test_triton_does_with_many_tiles_what_torch_operations_do(
    knows_all_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    enters = pytest.importorskip("bagpipe.device_oracle.entering_triton")
    plans = pytest.importorskip("bagpipe.device_oracle.planning_triton")
    launching = pytest.importorskip("bagpipe.cache.triton_launch")
    for module in (enters, plans):
        use_small_groups(monkeypatch, module)
        monkeypatch.setattr(module, "_TILE", launching.Tiling(elements=128, per_thread=4).of(1))
    states = []
    for enter, plan in ((enters.enter, plans.plan), (entering.enter, planning.plan)):
        state = make_one(300, is_jagged=True, is_weighted=True, knows_all_rows=knows_all_rows)
        for step in range(2):
            batch_of_many_tiles(state, step)
            enter(state)
            plan(state)
        states.append(state)
    found, expected = states
    for step in range(2):
        _, _, _, number, num_pieces, num_long = expected.headers[step].tolist()
        assert (number > 200, num_long) == (True, 1)
        lengths = dict.fromkeys(("inverse", "bags", "bag_weights", "kept_weights"), 590)
        lengths |= {"headers": 6, "piece_offsets": num_pieces + 1, "long_uniques": num_long}
        lengths |= {"long_offsets": num_long + 1, "unique_rows": 300, "kept_offsets": 201}
        header = expected.plan_headers[step].tolist()
        lengths |= {"plan_headers": NUM_USED_SLOTS + 1, "unique_slots": number}
        lengths |= dict.fromkeys(("evict_rows", "evict_slots"), header[EVICTED])
        lengths |= dict.fromkeys(("fetch_rows", "fetch_slots"), header[FETCHED])
        assert (header[EVICTED] > 100) == (step > 0)
        for name, length in lengths.items():
            one, other = getattr(found, name)[step], getattr(expected, name)[step]
            torch.testing.assert_close(one[:length], other[:length], rtol=0, atol=0)
    rows = torch.unique(expected.unique_rows[expected.unique_rows < expected.num_rows]).long()
    for one, other in zip(known_of(found, rows), known_of(expected, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for name in ("rows_of_slots", "next_uses", "last_uses"):
        one, other = getattr(found, name)[:-SPARE], getattr(expected, name)[:-SPARE]
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter tells what is read")
def test_triton_reads_one_offset_of_a_batch_without_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until a batch has samples, there may be room for fewer bags than there are features."""
    enters = pytest.importorskip("bagpipe.device_oracle.entering_triton")
    interpreter = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    load, read = interpreter.create_masked_load, set[int]()

    def note(builder: Any, addresses: Any, mask: Any, *others: Any) -> Any:
        read.update(addresses.data[mask.data.astype(bool)].tolist())
        return load(builder, addresses, mask, *others)

    monkeypatch.setattr(interpreter, "create_masked_load", note)
    state, memory = make_one(1_000, is_jagged=True), torch.zeros(9, dtype=torch.int32)
    enters.enter(replace(state, num_features=3, bag_offsets=memory[:2]))
    assert int(state.entered) == 1
    assert [place for place in range(9) if memory[place:].data_ptr() in read] == [0]


def test_no_size_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant is found by types, so one that was made for a size of 1 would serve all sizes."""
    enters = pytest.importorskip("bagpipe.device_oracle.entering_triton")
    plans = pytest.importorskip("bagpipe.device_oracle.planning_triton")
    index = pytest.importorskip("bagpipe.device_oracle.row_index_triton")
    launching = pytest.importorskip("bagpipe.cache.triton_launch")
    launch, sizes = launching.Kernel.launch, set[str]()

    def note(kernel: Any, programs: int, arguments: Any, *others: Any) -> None:
        names = signature(kernel.function).parameters
        sizes.update(
            name for name, value in zip(names, arguments, strict=False) if isinstance(value, int)
        )
        launch(kernel, programs, arguments, *others)

    monkeypatch.setattr(launching.Kernel, "launch", note)
    state = make_one(1_000, is_jagged=True, is_weighted=True, knows_all_rows=False)
    enters.enter(state)
    plans.plan(state)
    index.rebuild(state, state)
    assert {"size", "room", "num_rows", "max_further", "num_tiles", "max_near"} <= sizes
    assert sizes <= set(launching.VARYING)
