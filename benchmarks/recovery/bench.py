"""`recovery`: from a process's death to the next step of training, part by part.

Two trainers under torchrun train over a server that they start on their host, with an oracle
process. All rows are written first, so a server that has died loads all of them, while one that
lives puts back those written since the checkpoint. The first checkpoint has all rows, and many
steps pass while it is written, so each death comes behind a later one. The processes are killed one
after the other, each some steps behind a checkpoint. Where torchrun itself is killed, its trainers
end by themselves and it is started again at once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from bagpipe.errors import ConfigError
from benchmarks.measure import Progress, Result
from benchmarks.recovery.run import Died, Run
from benchmarks.recovery.settings import PARTS, Event, RecoveryBench


def bench_recovery(bench: RecoveryBench, progress: Progress, folder: str | None = None) -> Result:
    """Kills each victim once.

    Args:
        bench: what is measured.
        progress: is told how far it is.
        folder: where the run's folder is made, which has the checkpoints; None: where temporary
            files are.

    Returns:
        What was found; a run that does not go on ends it early, and a note says why.

    Raises:
        ConfigError: The run does not go on before the first death, or there is nobody to kill.
    """
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    progress("deaths", 0, len(bench.victims))
    with tempfile.TemporaryDirectory(prefix="bagpipe-", dir=folder) as made:
        run = Run(bench, Path(made))
        try:
            before_s = run.await_filled()
            took = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in before_s.items())
            notes.append(f"before the first death: {took}")
            for number, victim in enumerate(bench.victims, start=1):
                run.await_checkpoint()
                checkpoint_bytes = run.checkpoint_bytes()
                died = run.kill(victim)
                parts = _parts(died, run.await_first_step(died.ended_s))
                found.append(
                    {"victim": victim, "checkpoint_bytes": checkpoint_bytes, "parts_s": parts}
                )
                progress("deaths", number, len(bench.victims))
        except ConfigError as error:
            if not found:
                raise
            notes.append(str(error))
        finally:
            run.close()
    return Result(
        name="recovery",
        tables=(_table(bench, found),),
        values={
            "sizes": asdict(bench),
            "num_rows": bench.group.num_rows,
            "before_s": before_s,
            "deaths": found,
        },
        notes=tuple(notes),
    )


def _parts(died: Died, told: dict[str, Event]) -> dict[str, float]:
    """Seconds of each of `PARTS`, and in all."""
    moments = [died.killed_s, died.noticed_s, died.ended_s]
    moments += [told[name].at_s for name in PARTS[2:]]
    parts = {
        name: later - earlier
        for name, earlier, later in zip(PARTS, moments[:-1], moments[1:], strict=True)
    }
    return parts | {"in all": moments[-1] - moments[0]}


def _table(bench: RecoveryBench, found: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title=f"{bench.table_gb:g} GB of records, {bench.num_trainers} trainers: seconds from "
        "SIGKILL to the next step"
    )
    for column in ("killed", *PARTS, "in all"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for each in found:
        table.add_row(each["victim"], *(f"{seconds:.2f}" for seconds in each["parts_s"].values()))
    return table
