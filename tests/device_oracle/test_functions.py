"""What runs on the device: it never waits for it, and Triton chooses as torch operations do."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagpipe.device_oracle import entering, planning, victims
from bagpipe.device_oracle.state import NEVER, Capacity, State, Window, make_state
from bagpipe.optimizers import SGD
from bagpipe.types import TableConfig, group_tables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_one(num_slots: int, *, is_jagged: bool = False, is_weighted: bool = False) -> State:
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
        max_uniques=300,
        is_jagged=is_jagged,
        is_weighted=is_weighted,
        is_wide=False,
    )
    window = Window(num_slots=num_slots, lookahead=4, prefetch_depth=2)
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


@pytest.mark.parametrize("kind", ["one-hot", "jagged", "weighted"])
def test_entering_and_planning_wait_for_nothing(kind: str) -> None:
    state = make_one(1_000, is_jagged=kind == "jagged", is_weighted=kind == "weighted")
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


def test_triton_enters_a_batch_of_many_tiles_as_torch_operations_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("bagpipe.device_oracle.entering_triton")
    launching = pytest.importorskip("bagpipe.cache.triton_launch")
    use_small_groups(monkeypatch, triton)
    monkeypatch.setattr(triton, "_TILE", launching.Tiling(elements=32, per_thread=1).of(1))
    num_lookups, generator = 590, torch.Generator().manual_seed(3)
    ids = (50_000 * torch.rand(num_lookups, generator=generator) ** 6).int()
    ids[::2] = 7  # more than a piece, and more than a tile
    offsets = torch.randint(0, num_lookups + 1, (200,), generator=generator).sort().values
    entered = []
    for function in (triton.enter, entering.enter):
        state = make_one(1_000, is_jagged=True, is_weighted=True)
        state.ids[:num_lookups] = ids
        state.sizes.copy_(torch.tensor([num_lookups, 200]))
        state.bag_offsets[1:-1] = offsets[1:]
        state.bag_offsets[-1] = num_lookups
        state.lookup_weights.copy_(torch.arange(600))
        function(state)
        entered.append(state)
    found, expected = entered
    _, _, _, number, num_pieces, num_long = expected.headers[0].tolist()
    assert (number > 200, num_long) == (True, 1)
    torch.testing.assert_close(found.headers[0], expected.headers[0], rtol=0, atol=0)
    lengths = dict.fromkeys(("inverse", "bags", "bag_weights", "kept_weights"), num_lookups)
    lengths |= {"piece_offsets": num_pieces + 1, "long_uniques": num_long}
    lengths |= {"long_offsets": num_long + 1, "unique_rows": 300, "kept_offsets": 201}
    for name, length in lengths.items():
        one, other = getattr(found, name)[0], getattr(expected, name)[0]
        torch.testing.assert_close(one[:length], other[:length], rtol=0, atol=0)


def test_no_size_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant is found by types, so one that was made for a size of 1 would serve all sizes."""
    enters = pytest.importorskip("bagpipe.device_oracle.entering_triton")
    plans = pytest.importorskip("bagpipe.device_oracle.planning_triton")
    launching = pytest.importorskip("bagpipe.cache.triton_launch")
    launch, sizes = launching.Kernel.launch, set[str]()

    def note(kernel: Any, programs: int, arguments: Any, *others: Any) -> None:
        names = signature(kernel.function).parameters
        sizes.update(
            name for name, value in zip(names, arguments, strict=False) if isinstance(value, int)
        )
        launch(kernel, programs, arguments, *others)

    monkeypatch.setattr(launching.Kernel, "launch", note)
    state = make_one(1_000, is_jagged=True, is_weighted=True)
    enters.enter(state)
    plans.plan(state)
    assert {"size", "room", "num_rows", "max_further", "num_tiles"} <= sizes
    assert sizes <= set(launching.VARYING)
