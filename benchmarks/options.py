"""Options of the benchmarks, each with one meaning wherever it stands.

A subcommand declares those that it uses, and typer refuses the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from bagpipe.errors import ConfigError

Quick = Annotated[
    bool,
    typer.Option("--quick", help="Tiny sizes, to see that it works; the numbers mean nothing."),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch", min=1, help="Samples in a batch, of each trainer.")
]
BatchSizes = Annotated[
    list[int] | None,
    typer.Option("--batch", min=1, help="Samples in a batch; may be repeated."),
]
MaxRows = Annotated[
    int | None, typer.Option("--max-rows", min=1, help="Cut each table to so many rows.")
]
Arms = Annotated[
    list[str] | None,
    typer.Option(
        "--arm",
        help="An arm to run; may be repeated. All by default. Those that the others are compared "
        "with always run: bagpipe, and dense where there is one.",
    ),
]
Lookahead = Annotated[
    int | None, typer.Option("--lookahead", min=1, help="Batches that the oracle sees ahead.")
]
Lookaheads = Annotated[
    list[int] | None,
    typer.Option("--lookahead", min=1, help="Batches that the oracle sees ahead; may be repeated."),
]
CacheShare = Annotated[
    float | None,
    typer.Option("--cache", min=0.0, max=1.0, help="Share of the rows that the cache holds."),
]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Turns of each arm.")]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, help="Steps measured, in each turn where arms take turns."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Threads that read and de-duplicate; by default as in training.",
    ),
]
WorkloadName = Annotated[
    str,
    typer.Option(
        "--workload",
        help="Tables, stream, model and cache: W1, W2, W3, W4, W4-file or small.",
    ),
]
OracleOf = Annotated[
    str | None,
    typer.Option(
        "--oracle",
        help="Where Bagpipe plans: process, thread or device; by default as in training.",
    ),
]
NumTrainers = Annotated[int | None, typer.Option("--trainers", help="How many trainers.")]
Device = Annotated[str, typer.Option(help="cpu; cuda, a device each; or cuda:0, which all share.")]
StepRows = Annotated[int | None, typer.Option("--rows", min=1, help="Rows that a step fetches.")]
Gbits = Annotated[
    list[float] | None,
    typer.Option("--gbit", min=0.01, max=100, help="Gbit/s of a link; may be repeated."),
]
Delays = Annotated[
    list[float] | None,
    typer.Option(
        "--delay", min=0.0, max=1_000, help="Delay of a link in ms, each way; may be repeated."
    ),
]
InFlight = Annotated[
    list[int] | None,
    typer.Option("--in-flight", min=1, max=64, help="Steps under way; may be repeated."),
]
DeviceTimes = Annotated[
    list[float] | None,
    typer.Option("--device-ms", help="What a step takes on the device; may be repeated."),
]
RunsFolder = Annotated[
    str | None,
    typer.Option("--folder", help="Where runs' folders are made; by default temporary files'."),
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Save the plot here (.png, .svg, .pdf).")]


def sizes_of(defaults: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """`defaults`, replaced by those `options` that were given, which are not None."""
    return dict(defaults) | {name: value for name, value in options.items() if value is not None}


def of_workload(
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    lookahead: Lookahead = None,
    rounds: Rounds = None,
    steps: Steps = None,
    threads: Threads = None,
) -> dict[str, Any]:
    """The options that replace a workload's own values, those that were given."""
    return sizes_of(
        {},
        batch_size=batch_size,
        max_rows=max_rows,
        lookahead=lookahead,
        rounds=rounds,
        turn_steps=steps,
        dedup_threads=threads,
    )


def over_links(
    batch_size: BatchSize = None,
    max_rows: MaxRows = None,
    lookahead: Lookahead = None,
    cache: CacheShare = None,
    devices_ms: DeviceTimes = None,
    gbits: Gbits = None,
    delays_ms: Delays = None,
) -> dict[str, Any]:
    """The options of one trainer over links to a shard server, those that were given."""
    return sizes_of(
        {},
        batch_size=batch_size,
        max_rows=max_rows,
        lookahead=lookahead,
        cache_share=cache,
        devices_ms=devices_ms,
        gbits=gbits,
        delays_ms=delays_ms,
    )


def takes(
    shared: Callable[..., dict[str, Any]],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a subcommand the options of `shared` beside its own.

    It is called with what `shared` makes of them as `sizes`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        theirs = inspect.signature(shared, eval_str=True).parameters
        signature = inspect.signature(command, eval_str=True)
        own = [each for name, each in signature.parameters.items() if name != "sizes"]

        @wraps(command)
        def run(**given: Any) -> None:
            sizes = shared(**{name: given.pop(name) for name in theirs})
            command(sizes, **given)

        # typer reads the one, and takes types that stand in the other for those of the command
        run.__signature__ = signature.replace(parameters=[*theirs.values(), *own])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


def chosen_arms(
    asked: Sequence[str] | None, known: Sequence[str], always: Sequence[str]
) -> tuple[str, ...]:
    """The arms to run, in the order of `known`.

    Args:
        asked: the arms that the user named; None or none of them: all.
        known: all arms.
        always: arms that run whether they are asked for or not.

    Raises:
        ConfigError: an arm that was asked for is unknown.
    """
    for name in asked or ():
        if name not in known:
            raise ConfigError(
                f"--arm {name}: is unknown; there are {', '.join(known)}, of which "
                f"{' and '.join(always)} always run{'s' if len(always) == 1 else ''}"
            )
    return tuple(name for name in known if not asked or name in asked or name in always)


def chosen(option: str, asked: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Those of `known` that the user named by `option`, in their order; all if none is named.

    Raises:
        ConfigError: one that was asked for is unknown.
    """
    for name in asked or ():
        if name not in known:
            raise ConfigError(f"{option} {name}: is unknown; there are {', '.join(known)}")
    return tuple(name for name in known if not asked or name in asked)
