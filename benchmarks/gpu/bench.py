"""A training step on one GPU: Bagpipe against FBGEMM and against no embedding work at all.

All arms train the same batches with the same captured dense part, from the same rows and
parameters. Their losses must agree over the first steps. `turns` says how they take turns.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.fbgemm import FBGEMM_ARMS
from benchmarks.gpu.tables import render, save_plot
from benchmarks.gpu.turns import Turns
from benchmarks.measure import Progress, Result, disagreements
from benchmarks.workloads import Workload

ALWAYS = ("bagpipe", "dense")
ARMS = (*ALWAYS, "served", *FBGEMM_ARMS, "torch_cpu")


def bench_gpu(
    workload: Workload, arms: Sequence[str], progress: Progress, plot: Path | None = None
) -> Result:
    """Runs the arms on one GPU; at tiny sizes also without one.

    Args:
        workload: what is trained.
        arms: some of `ARMS`.
        progress: is told how far it is.
        plot: where to save a bar chart; None: nowhere.

    Returns:
        Tables, values, and notes. The notes name the arms that can't run here, those that failed,
        and those that do not compute the same as Bagpipe.
    """
    on_cuda = torch.cuda.is_available()
    names, notes = _available([name for name in arms if name not in ALWAYS], on_cuda)
    folder = Path(tempfile.mkdtemp(prefix="bagpipe-bench-"))
    try:
        turns = Turns(workload, names, torch.device("cuda" if on_cuda else "cpu"), folder, progress)
        values = turns.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if plot is not None:
        save_plot(values, plot)
    notes += [
        f"arm {name} failed and is left out: {error}" for name, error in turns.failures.items()
    ]
    notes += disagreements({name: arm["loss_differences"] for name, arm in values["arms"].items()})
    return Result(name="gpu", tables=render(values), values=values, notes=tuple(notes))


def _available(names: Sequence[str], on_cuda: bool) -> tuple[list[str], list[str]]:
    """The arms that can run here, and a sentence on those that can't."""
    left, notes = list(names), []
    if not on_cuda:
        notes.append(
            "no CUDA device: arms run on the CPU, to see that they work; the numbers mean nothing"
        )
        left = [name for name in left if name in ("served", "fbgemm_hbm", "torch_cpu")]
    of_fbgemm = [name for name in left if name in FBGEMM_ARMS]
    try:
        import fbgemm_gpu  # noqa: F401
    except ImportError as error:
        left = [name for name in left if name not in of_fbgemm]
        if of_fbgemm:
            notes.append(
                f"left out {', '.join(of_fbgemm)}: {error}; pip install fbgemm-gpu (without a GPU "
                "fbgemm-gpu-cpu), of the version that belongs to this torch"
            )
    return left, notes
