"""What `gpu` prints and draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bagpipe.plots import new_figure, save_figure
from benchmarks.driver_calls import describe

_IN_HBM = ("fbgemm_hbm", "fbgemm_hbm_int32", "fbgemm_hbm_fp32")
_WITH_CACHE = ("fbgemm_uvm_lru", "fbgemm_uvm_lfu", "fbgemm_uvm_lru_prefetch")


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """What Bagpipe should reach on one H200; None: no number was set."""

    over_dense: float | None = None  # at most
    in_hbm: float | None = None  # the best arm in HBM over Bagpipe, at least
    with_cache: float | None = None  # the best arm with a cache over Bagpipe, at least
    kernels_ms: float | None = None  # at most
    idle_share: float = 0.02  # at most


_TARGETS = {
    "W1": _Targets(over_dense=1.05, in_hbm=1.2, with_cache=1.85, kernels_ms=0.10),
    "W2": _Targets(over_dense=1.08, in_hbm=1.15, with_cache=1.8, kernels_ms=0.18),
    "W3": _Targets(in_hbm=1.0, with_cache=2.0),
}


def render(values: dict[str, Any]) -> tuple[Table, ...]:
    """Times of the arms, ratios with their targets, and facts."""
    return _times(values), _ratios(values), _facts(values)


def save_plot(values: dict[str, Any], path: Path) -> None:
    """Draws a bar for each arm, in the format of the path's ending.

    Raises:
        ConfigError: matplotlib is not installed, or can't write there.
    """
    steps = {name: arm["step"] for name, arm in values["arms"].items()}
    names = sorted(steps, key=lambda name: -steps[name].median_ms)
    medians = [steps[name].median_ms for name in names]
    spread = [
        [steps[name].median_ms - steps[name].low_ms for name in names],
        [steps[name].high_ms - steps[name].median_ms for name in names],
    ]
    figure = new_figure(height=0.45 * len(names) + 1.2)
    axes = figure.add_subplot()
    colours = [
        "tab:orange" if name == "bagpipe" else "tab:gray" if name == "dense" else "tab:blue"
        for name in names
    ]
    bars = axes.barh(names, medians, xerr=spread, color=colours)
    axes.bar_label(bars, [f" {median:.2f}" for median in medians], padding=4)
    axes.axvline(steps["dense"].median_ms, color="tab:gray", linestyle=":")
    axes.set(
        xlabel="ms a step", title=f"{values['workload']['name']}, {values['device']}", xscale="log"
    )
    save_figure(figure, path)


def _times(values: dict[str, Any]) -> Table:
    workload = values["workload"]
    table = Table(
        title=f"{workload['name']} on {values['device']}: {values['num_rows']:,} rows x "
        f"{workload['embedding_dim']}, batch {workload['batch_size']:,}, cache "
        f"{values['cache_share']:.1%}",
        caption="ms, median (quartiles) over turns; device memory: the peak beside what was there "
        "before",
    )
    for heading in (
        "arm",
        "step",
        "x dense",
        "x bagpipe",
        "embedding kernels alone",
        "device memory, GiB",
        "loss differs by",
    ):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in values["arms"].items():
        kernels = " + ".join(f"{kernel} {ms:.3f}" for kernel, ms in arm["kernels_ms"].items())
        difference = f"{max(arm['loss_differences']):.1e}" if arm["loss_differences"] else ""
        ratios = f"{arm['over_dense']:.2f}", f"{arm['over_bagpipe']:.2f}"
        table.add_row(
            name,
            str(arm["step"]),
            *ratios,
            kernels,
            f"{arm['device_bytes'] / 2**30:.2f}",
            difference,
        )
    return table


def _ratios(values: dict[str, Any]) -> Table:
    table = Table(title="Ratios", show_header=True)
    for heading in ("what", "found", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, found, target, at_most in _found(values):
        verdict = ""
        if target is not None:
            reached = found <= target if at_most else found >= target
            limit = f"{'at most' if at_most else 'at least'} {target:g}"
            verdict = f"{limit}: {'reached' if reached else 'missed'}"
        table.add_row(what, f"{found:.3f}", verdict)
    return table


def _found(values: dict[str, Any]) -> Iterator[tuple[str, float, float | None, bool]]:
    """Yields what was measured, the number, its target, and whether that is a bound from above."""
    arms, targets = values["arms"], _TARGETS.get(values["workload"]["name"], _Targets())
    yield "step over the dense part alone", arms["bagpipe"]["over_dense"], targets.over_dense, True
    for what, names, target in (
        ("in HBM", _IN_HBM, targets.in_hbm),
        ("UVM caching", _WITH_CACHE, targets.with_cache),
    ):
        present = [name for name in names if name in arms]
        if present:
            best = min(present, key=lambda name: float(arms[name]["over_bagpipe"]))
            yield (
                f"FBGEMM {what} (best: {best}) over Bagpipe",
                arms[best]["over_bagpipe"],
                target,
                False,
            )
    yield (
        "embedding kernels alone, ms",
        sum(arms["bagpipe"]["kernels_ms"].values()),
        targets.kernels_ms,
        True,
    )
    yield (
        "share of a step in which the device waits for rows or the host",
        values["bagpipe"]["idle_share"],
        targets.idle_share,
        True,
    )


def _facts(values: dict[str, Any]) -> Table:
    counted, floor, bandwidths = values["bagpipe"], values["floor"], values["bandwidths"]
    table = Table(title="Facts", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row(
        "unique rows; fetched; written back a step",
        f"{counted['num_uniques']:,.0f}; {counted['num_fetched']:,.0f}; "
        f"{counted['num_written_back']:,.0f}",
    )
    table.add_row(
        "hit rate; share of the cache ever filled",
        f"{counted['hit_rate']:.1%}; {counted['cache_filled']:.0%}",
    )
    waits = ", ".join(
        f"{name} {counted[f'{name}_wait_ms']:.3f}" for name in ("plan", "rows", "slots")
    )
    table.add_row("host, mostly ahead of the device, waited for, ms a step", waits)
    table.add_row("device waited between two steps, ms", f"{counted['device_idle_ms']:.3f}")
    if values["driver_calls"]:
        table.add_row(
            "driver calls of the trainer's thread a step", describe(values["driver_calls"])
        )
    table.add_row(
        "bandwidth, GB/s: device, to it, from it",
        ", ".join(f"{bandwidth / 1e9:.0f}" for bandwidth in bandwidths.values()),
    )
    for name, part in floor.items():
        table.add_row(
            f"floor {name.replace('_', ' ')}: {part['bytes'] / 1e6:.1f} MB", f"{part['ms']:.3f} ms"
        )
    table.add_row(
        "cache; tables, GiB",
        f"{values['cache_bytes'] / 2**30:.2f}; {values['table_bytes'] / 2**30:.1f}",
    )
    table.add_row(
        "oracle's own state, bytes a row", f"{values['oracle_bytes'] / values['num_rows']:.1f}"
    )
    return table
