"""The subcommands about shard servers, and about checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bagpipe.cli.common import JsonFile
from benchmarks.options import (
    Arms,
    BatchSize,
    Delays,
    Gbits,
    InFlight,
    MaxRows,
    NumTrainers,
    Plot,
    Quick,
    Rounds,
    RunsFolder,
    StepRows,
    Steps,
    chosen_arms,
    over_links,
    sizes_of,
    takes,
)
from benchmarks.showing import measure

if TYPE_CHECKING:
    from benchmarks.measure import Progress, Result


def network(
    quick: Quick = False,
    max_rows: MaxRows = None,
    rows: StepRows = None,
    gbits: Gbits = None,
    delays_ms: Delays = None,
    in_flight: InFlight = None,
    arms: Arms = None,
    json_file: JsonFile = None,
) -> None:
    """Fetch from a shard server, over loopback and over links that are made (as root)."""

    def run(progress: Progress) -> Result:
        from benchmarks.network.bench import bench_network
        from benchmarks.network.settings import ALWAYS, ARMS, QUICK, NetworkBench

        sizes = sizes_of(
            QUICK if quick else {},
            table_rows=max_rows,
            step_rows=rows,
            gbits=gbits,
            delays_ms=delays_ms,
            in_flight=in_flight,
            arms=chosen_arms(arms, ARMS, ALWAYS),
        )
        return bench_network(NetworkBench(**sizes), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


@takes(over_links)
def remote(
    sizes: dict[str, Any],
    quick: Quick = False,
    arms: Arms = None,
    rounds: Rounds = None,
    steps: Steps = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Train over a link to a shard server (as root), against ways that do not look ahead."""

    def run(progress: Progress) -> Result:
        from benchmarks.remote.bench import bench_remote
        from benchmarks.remote.settings import ALWAYS, ARMS, QUICK, RemoteBench

        settings = sizes_of(
            QUICK if quick else {},
            **sizes,
            num_rounds=rounds,
            measured_steps=steps,
            arms=chosen_arms(arms, ARMS, ALWAYS),
        )
        return bench_remote(RemoteBench(**settings), progress, plot)

    measure(run, "cpu", quick=quick, json_file=json_file, plot=plot)


def cuts(quick: Quick = False, json_file: JsonFile = None) -> None:
    """Write a shard's rows to checkpoints beside training, and put them back."""

    def run(progress: Progress) -> Result:
        from benchmarks.cuts import QUICK, CutsBench, bench_cuts

        return bench_cuts(CutsBench(**QUICK if quick else {}), progress)

    measure(run, "cpu", quick=quick, json_file=json_file)


@takes(over_links)
def cutting(
    sizes: dict[str, Any],
    quick: Quick = False,
    rounds: Annotated[int | None, typer.Option("--cuts", min=1, help="How many cuts.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps between two cuts.")] = None,
    folder: RunsFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Train over a shard server with cuts: near it, and as root over links."""

    def run(progress: Progress) -> Result:
        from benchmarks.cutting.bench import bench_cutting
        from benchmarks.cutting.settings import CUTTING, QUICK, CuttingBench
        from benchmarks.remote.settings import RemoteBench

        settings = sizes_of(
            QUICK if quick else CUTTING, **sizes, num_rounds=rounds, measured_steps=steps
        )
        return bench_cutting(CuttingBench.of(RemoteBench(**settings)), progress, folder)

    measure(run, "cpu", quick=quick, json_file=json_file)


def recovery(
    quick: Quick = False,
    table_gb: Annotated[
        float | None, typer.Option("--gb", min=0.0, help="GB of records, all of them written.")
    ] = None,
    victims: Annotated[
        list[str] | None,
        typer.Option("--kill", help="Whom to kill; may be repeated. All in turn by default."),
    ] = None,
    num_trainers: NumTrainers = None,
    batch_size: BatchSize = None,
    folder: RunsFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Kill processes of a run under torchrun, and time what passes until the next step."""

    def run(progress: Progress) -> Result:
        from benchmarks.recovery.bench import bench_recovery
        from benchmarks.recovery.settings import QUICK, RecoveryBench

        sizes = sizes_of(
            QUICK if quick else {},
            table_gb=table_gb,
            victims=victims or None,
            num_trainers=num_trainers,
            batch_size=batch_size,
        )
        return bench_recovery(RecoveryBench(**sizes), progress, folder)

    measure(run, "cpu", quick=quick, json_file=json_file)


def saving(
    quick: Quick = False,
    table_gb: Annotated[
        float | None, typer.Option("--gb", min=0.001, help="GB of records, all of them written.")
    ] = None,
    rounds: Rounds = None,
    folder: RunsFolder = None,
    json_file: JsonFile = None,
) -> None:
    """Save and restore an own loop, beside plain writes and reads of the same bytes."""

    def run(progress: Progress) -> Result:
        from benchmarks.saving import QUICK, SavingBench, bench_saving

        sizes = sizes_of(QUICK if quick else {}, table_gb=table_gb, num_rounds=rounds)
        return bench_saving(SavingBench(**sizes), progress, folder)

    measure(run, "cpu", quick=quick, json_file=json_file)
