"""How long the oracle on the device takes, alone and beside the dense part of a step.

A window is filled and planned with a workload's ids, as in training. Then, each by itself:

- `enter` and `plan` on the device's clock, as graphs on a GPU;
- where the index of rows is a map, `enter` as it forgets rows, which it does now and then;
- the planner's whole way of a step, its waits for the device included, and its CPU;
- the dense part alone, and with both functions beside it on another stream: how much longer it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from rich.table import Table

from bagpipe.device_oracle import Planner
from bagpipe.feed.stream import StreamOptions
from bagpipe.types import Jagged
from benchmarks.clocks import clock_of, seconds_a_call
from benchmarks.dense import SharedDense
from benchmarks.measure import Progress, Result
from benchmarks.prepared_stream import synthetic_source
from benchmarks.workloads import NUM_DENSE, Workload

_NUM_BATCHES = 12
"""Different batches, which come again and again."""
_NUM_BEFORE = 12
"""Steps behind a full window that are not measured: capacities grow, and graphs are captured."""
_NUM_CALLS = 20


def bench_planner(workload: Workload, progress: Progress, *, row_map: bool = False) -> Result:
    """Plans on the GPU, or without one on the CPU, to see that it works.

    Args:
        workload: What to plan.
        progress: Is told how far it is.
        row_map: Whether the index of rows is a map, as for tables of billions of rows.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values = _measure_planner(workload, device, progress, row_map)
    table = Table(title=f"{workload.name}: the oracle on the device, ms a step")
    for column in ("what", "found"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, text in (
        ("enter_ms", "enter, on the device"),
        ("forgetting_ms", "enter that forgets rows, if the index of rows is a map"),
        ("plan_ms", "plan, on the device"),
        ("way_ms", "the planner's way of a step, its waits included"),
        ("cpu_ms", "CPU of it"),
        ("dense_ms", "the dense part alone"),
        ("beside_ms", "the dense part with both beside it"),
    ):
        table.add_row(text, f"{values[name]:.3f}")
    table.add_row("device memory of the oracle, GiB", f"{values['nbytes'] / 2**30:.2f}")
    return Result(name="planner", tables=(table,), values=values)


def _batches(workload: Workload) -> list[Jagged]:
    source = synthetic_source(workload, _NUM_BATCHES)
    return [batch.sparse for batch in source.batches(batch_size=workload.batch_size)]


def _measure_planner(
    workload: Workload, device: torch.device, progress: Progress, row_map: bool
) -> dict[str, Any]:
    batches = _batches(workload)
    num_steps = workload.lookahead + _NUM_BEFORE + workload.turn_steps
    planner = Planner(
        StreamOptions(
            groups=(workload.group,),
            num_slots=(workload.cache_rows,),
            lookahead=workload.lookahead,
            prefetch_depth=workload.prefetch_depth,
        ),
        device,
        know_all_rows=[not row_map],
    )

    def stream() -> Iterator[tuple[Any, None]]:
        for step in range(num_steps + workload.lookahead):
            yield planner.stage([batches[step % len(batches)]]), None

    began, cpu_began = 0.0, 0.0
    made = planner.plan(stream(), lambda: True)
    for step in range(num_steps):
        next(made)
        planner.capture_if_due()
        if step == num_steps - workload.turn_steps - 1:
            began, cpu_began = time.perf_counter(), time.process_time()
        progress("planning", step + 1, num_steps)
    way, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    (oracle,) = planner.oracles
    staged = [planner.stage([batch])[0] for batch in batches]
    num_entered = 0

    def enter() -> None:
        nonlocal num_entered
        oracle.enter(staged[num_entered % len(staged)])
        num_entered += 1

    clock = clock_of(device)
    for _ in range(_NUM_CALLS + row_map * oracle.window.batches_between):
        enter()
        clock.tick()
        oracle.plan()
        clock.tick()
    seconds = clock.seconds()
    values = {
        "way_ms": 1e3 * way / workload.turn_steps,
        "cpu_ms": 1e3 * cpu / workload.turn_steps,
        "enter_ms": 1e3 * statistics.median(seconds[::2]),
        "forgetting_ms": 1e3 * max(seconds[::2]) if row_map else 0.0,
        "plan_ms": 1e3 * statistics.median(seconds[1::2]),
        "nbytes": planner.nbytes,
        "num_capacities": oracle.num_capacities,
    }
    return values | _measure_beside(workload, device, enter, oracle.plan)


def _measure_beside(
    workload: Workload, device: torch.device, *functions: Callable[[], None]
) -> dict[str, float]:
    dense = SharedDense(workload, device)
    numbers = torch.zeros(workload.batch_size, NUM_DENSE, device=device)
    labels = torch.zeros(workload.batch_size, device=device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def step() -> None:
        dense.step(numbers, labels)

    def beside() -> None:
        with nullcontext() if side is None else torch.cuda.stream(side):
            for function in functions:
                function()
        step()
        if side is not None:  # the functions of the next step come behind this one
            side.wait_stream(torch.cuda.current_stream(device))

    return {
        "dense_ms": 1e3 * seconds_a_call(device, step, _NUM_CALLS),
        "beside_ms": 1e3 * seconds_a_call(device, beside, _NUM_CALLS),
    }
