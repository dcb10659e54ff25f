"""What the host learns of a step: all of it, by few calls, and for as long as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.device_oracle.test_device_oracle import (
    make_planner,
    one_table,
    plan_on_device,
    skewed,
)
from torch.overrides import TorchFunctionMode

from bagpipe.device_oracle import answers
from bagpipe.device_oracle import oracle as oracle_module
from bagpipe.device_oracle.planner import MadePlan, Planner
from bagpipe.device_oracle.read_back import read_back
from bagpipe.device_oracle.source import Places, plan_stream
from bagpipe.device_oracle.state import BATCH_SIZE, NUM_LOOKUPS, STEP, State
from bagpipe.errors import PlanError
from bagpipe.feed.stream import DEFAULT_ADAPTER
from bagpipe.oracle import checked
from bagpipe.types import Jagged


def made_plans(planner: Planner, batches: list[Jagged]) -> Iterator[MadePlan[None]]:
    return planner.plan(((planner.stage([batch]), None) for batch in batches), lambda: True)


def test_rows_beyond_those_that_were_asked_for_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps move more and fewer rows than those before."""
    monkeypatch.setattr(answers, "_SMALLEST", 2)
    monkeypatch.setattr(answers, "_STEPS_OF_ROOM", 4)
    asked, ask = list[tuple[int, ...]](), answers.Answers.ask

    def note(self: answers.Answers, *arguments: Any) -> None:
        ask(self, *arguments)
        asked.append(self._sizes)

    monkeypatch.setattr(answers.Answers, "ask", note)
    batches = [batch for size in (2, 64, 2, 128, 2) for batch in skewed(6, size, seed=size)]
    group = one_table(2000)
    planner = make_planner(group, num_slots=200)
    planned = list(checked([group], [200], plan_on_device(planner, batches)))
    assert len(planned) == len(batches)
    assert len(asked) > len(batches)
    assert asked != sorted(asked)  # less is asked for again


def test_a_plan_holds_what_moves_until_another_one_is_made_in_its_place() -> None:
    planner = make_planner(one_table(2000), num_slots=99)
    kept = list[tuple[Any, Any]]()
    for made in made_plans(planner, skewed(30, 64)):
        ((plan,), _) = read_back(planner, made)
        kept.append((made.plan.groups[0], plan.groups[0]))
        for held, copied in kept[-planner.num_plans :]:
            for kind in ("overlapped", "urgent"):
                for name in ("evict_rows", "evict_slots", "fetch_rows", "fetch_slots"):
                    np.testing.assert_array_equal(
                        getattr(getattr(held, kind), name), getattr(getattr(copied, kind), name)
                    )
                    torch.testing.assert_close(
                        getattr(getattr(held, f"{kind}_on_device"), name).cpu(),
                        torch.from_numpy(getattr(getattr(copied, kind), name)),
                    )


def test_a_lookup_in_another_slot_than_its_row_is_found() -> None:
    planner = make_planner(one_table(2000), num_slots=99)
    *_, made = made_plans(planner, skewed(3, 64))
    made.plan.groups[0].on_device.lookup_slots[5] += 1
    with pytest.raises(PlanError, match=r"step 2: lookup 5 is in slot \d+, and its row in slot"):
        read_back(planner, made)


class Counted(TorchFunctionMode):
    """Counts calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "most"), [("one-hot", 11), ("jagged", 12)])
def test_a_step_takes_the_planners_thread_few_calls_of_torch(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes Python's lock from the trainer's thread. On a GPU two graphs come with them.

    Those of the threads that read are not counted.
    """

    def enter(state: State) -> None:
        state.entered.add_(1)

    def plan(state: State) -> None:
        step = int(state.planned)
        header = state.plan_headers[step % state.window.num_plans]
        header.zero_()
        header[STEP], header[NUM_LOOKUPS], header[BATCH_SIZE] = step, 8, 8
        header[3:12] = 1 + step % 7  # what varies from step to step
        state.planned.add_(1)

    def free(function: Any) -> Any:
        def run(state: State) -> None:
            with torch._C.DisableTorchFunction():
                function(state)

        return run

    functions = oracle_module.Functions(free(enter), free(plan), lambda state, old: None)
    monkeypatch.setattr(oracle_module, "functions_for", lambda device: functions)
    planner = make_planner(one_table(2000), num_slots=99)
    offsets = np.arange(9, dtype=np.int32) if kind == "jagged" else None
    batch = Jagged(keys=("f",), values=np.arange(8), offsets=offsets, batch_size=8)
    places, options = Places(64), planner.options
    plans = plan_stream(planner, places, None, [batch] * 64, options, DEFAULT_ADAPTER)
    for _ in range(40):
        next(plans)
    with Counted() as counted:
        for _ in range(10):
            next(plans)
    plans.close()
    assert len(counted.names) <= 10 * most, counted.names
