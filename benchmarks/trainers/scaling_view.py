"""What `scaling` prints and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bagpipe.plots import line_style, new_figure, save_figure

Run = Mapping[str, Any]
_NOTHING = "-"


def render(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Tables of samples a second, of all arms, of the parts of a step, and of what was planned."""
    return _scaling(runs), _arms(runs), _parts(runs), _waits(runs), _planned(runs)


def _scaling(runs: Sequence[Run]) -> Table:
    def over_n(run: Run) -> str:
        over = run["over_one"] or {}
        return _ratio({name: ratio / run["num_trainers"] for name, ratio in over.items()})

    device = runs[0]["device"] if runs else "no device"
    return _table(
        f"Bagpipe on {device}: each of N trainers beside one alone",
        "ms of a step; over N x one: samples a second over N times those of one trainer; over "
        "dense: a step over that of the dense part, averaged; targets are for GPUs of one host",
        {
            "samples a step": lambda run: f"{run['num_trainers'] * _batch(run):,}",
            "ms": lambda run: f"{_step_ms(run):.2f}",
            "samples/s": lambda run: f"{run['samples_a_second']:,.0f}",
            "over N x one": over_n,
            "target": lambda run: _target(run, "samples"),
            "over dense": lambda run: _ratio(run["arms"]["bagpipe"]["over_dense"]),
        },
        runs,
    )


def _arms(runs: Sequence[Run]) -> Table:
    several = [run for run in runs if run["num_trainers"] > 1]
    names = {name: None for run in several for name in run["arms"] if name != "bagpipe"}

    def over(name: str) -> Callable[[Run], str]:
        return lambda run: _ratio(run["arms"].get(name, {}).get("over_bagpipe"))

    return _table(
        "Each arm's step over Bagpipe's",
        "above 1 Bagpipe is faster; median and quartiles over rounds",
        {name: over(name) for name in names}
        | {"target of torchrec": lambda run: _target(run, "torchrec")},
        several,
    )


def _parts(runs: Sequence[Run]) -> Table:
    def averaging(run: Run) -> str:
        return f"{run['averaging_ms'] / _step_ms(run):.0%}"

    return _table(
        "Shares of Bagpipe's step, in a turn of its own",
        "dense: with averaging, where ranks wait for the slowest; averaging: a step of the arm "
        "dense less one of dense_alone; rows: replicas that the step before has changed; "
        "gradients: summing, sending, applying. On CUDA it is the device's time, and where one "
        "graph holds all, the dense part has lookup and gradients",
        {
            "ms": lambda run: f"{run['parts_ms']['step']:.2f}",
            "lookup": _part("lookup"),
            "dense": _part("dense"),
            "averaging": averaging,
            "rows": _part("replicas_urgent"),
            "gradients": _part("update"),
        },
        runs,
    )


def _waits(runs: Sequence[Run]) -> Table:
    return _table(
        "What the trainer's thread waits for, and what is behind compute, over a step",
        "rows of others: with those of the table above on a CPU. On CUDA the host runs ahead of "
        "the device, so its waits may cost no time; how long the device waits for replicas sent "
        "behind compute is not measured there",
        {
            "plans": _part("plan_wait_ms"),
            "fetches": _part("rows_wait_ms", "slots_wait_ms"),
            "rows of others": _part("replicas_wait_ms"),
            "behind: rows": _part("replicas_overlapped"),
            "behind: gradients": _part("sync_overlapped"),
        },
        runs,
    )


def _planned(runs: Sequence[Run]) -> Table:
    def both(what: str, counted: Callable[[Run], float], unit: float, digits: int) -> Any:
        return lambda run: " | ".join(
            f"{value / unit:,.{digits}f}" for value in (run["planned"][what], counted(run))
        )

    def arm(what: str) -> Callable[[Run], float]:
        return lambda run: float(run["arms"]["bagpipe"][what])

    return _table(
        "What a rank does in a step: as bagpipe plan predicts | as counted",
        "MB: rows and gradients sent to other ranks; rows fetched are counted over one step more",
        {
            "MB": both("sent_bytes", arm("sent_bytes"), 1e6, 3),
            "critical": both("critical_bytes", arm("critical_bytes"), 1e6, 3),
            "rows fetched": both("num_fetched", lambda run: float(run["num_fetched"]), 1, 0),
            "steps that wait": lambda run: f"{run['planned']['waiting_share']:.1%}",
        },
        runs,
    )


def save_plot(runs: Sequence[Run], path: Path) -> None:
    """Plots samples a second over one trainer's, a panel for each mode, a line for each workload.

    Args:
        runs: the runs with their comparison, those of one trainer among them.
        path: where to save the plot; its ending names the format.

    Raises:
        ConfigError: matplotlib is not installed, or can't write there.
    """
    modes = list(dict.fromkeys(run["mode"] for run in runs if run["mode"] is not None))
    names = list(dict.fromkeys(run["workload"]["name"] for run in runs))
    counts = sorted({run["num_trainers"] for run in runs})
    figure = new_figure(width=5.0 * max(1, len(modes)))
    for index, mode in enumerate(modes):
        axes = figure.add_subplot(1, len(modes), index + 1)
        for number, name in enumerate(names):
            points = [
                (run["num_trainers"], run["over_one"]["median"])
                for run in runs
                if run["workload"]["name"] == name and run["mode"] in (None, mode)
                if run["over_one"] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **line_style(number), label=name)
        axes.plot(counts, counts, color="gray", linestyle=":", label="N times one")
        axes.set(
            title=f"{mode} scaling, {runs[0]['device']}",
            xlabel="trainers",
            ylabel="samples a second over one trainer's",
            xticks=counts,
        )
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def _table(
    title: str, caption: str, columns: Mapping[str, Callable[[Run], str]], runs: Sequence[Run]
) -> Table:
    """A row for each run, which its workload, its mode and its number of trainers name."""
    table = Table(title=title, caption=caption)
    table.add_column("run", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for run in runs:
        named = (run["workload"]["name"], run["mode"] or "", str(run["num_trainers"]))
        table.add_row(" ".join(filter(None, named)), *(cell(run) for cell in columns.values()))
    return table


def _batch(run: Run) -> int:
    return int(run["workload"]["batch_size"])


def _step_ms(run: Run) -> float:
    means: list[float] = run["arms"]["bagpipe"]["means_ms"]
    return sum(means) / len(means)


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if not ratio:
        return _NOTHING
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _part(*names: str) -> Callable[[Run], str]:
    """The time of stages or waits as a share of that of their step."""

    def share(run: Run) -> str:
        parts = run["parts_ms"]
        return f"{sum(parts[name] for name in names) / parts['step']:.0%}"

    return share


def _target(run: Run, name: str) -> str:
    target = run["targets"].get(name)
    if target is None:
        return _NOTHING
    return f"{target['least']:.2f}: {'reached' if target['is_reached'] else 'missed'}"
