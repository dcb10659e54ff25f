"""What `trainers` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from benchmarks.driver_calls import describe


def render(values: dict[str, Any]) -> tuple[Table, ...]:
    """A table of the arms' times and bytes, and one of facts."""
    return _arms(values), _facts(values)


def _arms(values: dict[str, Any]) -> Table:
    workload = values["workload"]
    table = Table(
        title=f"{workload['name']}: {values['num_trainers']} trainers on {values['device']}, "
        f"{values['num_rows']:,} rows x {workload['embedding_dim']}, "
        f"batch {workload['batch_size']:,} each, cache {values['cache_share']:.1%} in all",
        caption="step: ms, median and quartiles; ratios: the same, over rounds; MB: embedding "
        "traffic of a rank in a step",
    )
    for heading in (
        "arm",
        "step",
        "over bagpipe",
        "over dense",
        "MB sent",
        "of it critical",
        "loss differs by",
    ):
        table.add_column(
            heading, justify="left" if heading == "arm" else "right", no_wrap=heading == "arm"
        )
    for name, arm in values["arms"].items():
        difference = f"{max(arm['loss_differences']):.1e}" if arm["loss_differences"] else ""
        sent = f"{arm['sent_bytes'] / 1e6:.3f}", f"{arm['critical_bytes'] / 1e6:.3f}"
        table.add_row(
            name,
            str(arm["step"]),
            _ratio(arm["over_bagpipe"]),
            _ratio(arm["over_dense"]),
            *sent,
            difference,
        )
    return table


def _facts(values: dict[str, Any]) -> Table:
    table = Table(title="Facts", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    if values["speedup_over_one"] is not None:
        table.add_row(
            f"samples a second, {values['num_trainers']} trainers over one of the same batch each",
            _ratio(values["speedup_over_one"]),
        )
    table.add_row(
        "gradients of the dense part, MB sent by a rank in a step, beside those above",
        f"{values['dense_bytes'] / 1e6:.3f}",
    )
    if values["driver_calls"]:
        table.add_row(
            "bagpipe: driver calls of rank 0's trainer a step", describe(values["driver_calls"])
        )
    for name, arm in values["arms"].items():
        counted = arm["counters"]
        if counted is not None:
            waits = ", ".join(
                f"{what} {counted[f'{what}_wait_ms']:.2f}"
                for what in ("plan", "rows", "slots", "replicas")
            )
            table.add_row(f"{name}: rank 0 waited for, ms a step", waits)
            fetched = f"{counted['num_fetched']:,.0f} ({counted['num_fetched_urgent']:,.0f})"
            rows = f"{counted['num_uniques']:,.0f}; {fetched}"
            table.add_row(f"{name}: unique rows of rank 0; fetched (late) a step", rows)
            table.add_row(
                f"{name}: share of the caches ever filled", f"{counted['cache_filled']:.0%}"
            )
    return table


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
