"""From the options of `bagpipe bench` to the sizes of each benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bagpipe.bench.curve_bench import CurveBench
from bagpipe.bench.gpu_workloads import Workload, make_workload
from bagpipe.bench.oracle_bench import OracleBench
from bagpipe.bench.step_bench import StepBench
from bagpipe.bench.trainers_rank import TrainersBench

_QUICK_ORACLE: dict[str, Any] = {
    "batch_size": 64,
    "max_rows": 300,
    "cache_share": 0.5,
    "lookaheads": (1, 4),
    "num_warmup": 8,
    "num_measured": 3,
}
_QUICK_STEP: dict[str, Any] = {
    "batch_sizes": (32,),
    "max_rows": 300,
    "embedding_dim": 8,
    "cache_share": 0.5,
    "lookahead": 3,
    "num_rounds": 2,
    "round_samples": 160,
    "warmup_samples": 320,
    "pause_s": 0.0,
    "bottom": (16, 8),
    "top": (16, 1),
}
_QUICK_TRAINERS: dict[str, Any] = {"pause_s": 0.05}
_QUICK_CURVE: dict[str, Any] = {
    "batch_size": 64,
    "max_rows": 300,
    "cache_shares": (0.02, 0.5, 0.8, 1.0),
    "lookaheads": (1, 5),
    "num_steps": 40,
}


def oracle_sizes(options: Mapping[str, Any], *, quick: bool) -> OracleBench:
    """Sizes of `bench oracle`; of several batch sizes the first."""
    names = {"batch_sizes": "batch_size", "rounds": "num_measured"}
    return OracleBench(
        **(_QUICK_ORACLE if quick else {}) | _renamed(options, names, leave=("arms", "steps"))
    )


def step_sizes(options: Mapping[str, Any], *, quick: bool) -> StepBench:
    """Sizes of `bench step`; of several lookaheads the first."""
    names = {"lookaheads": "lookahead", "rounds": "num_rounds"}
    return StepBench(
        **(_QUICK_STEP if quick else {})
        | _renamed(options, names, leave=("steps", "dedup_threads"))
    )


def curve_sizes(options: Mapping[str, Any], *, quick: bool) -> CurveBench:
    """Sizes of `bench curve`; of several batch sizes the first."""
    names = {"batch_sizes": "batch_size"}
    leave = ("arms", "rounds", "cache_share", "steps", "dedup_threads")
    return CurveBench(**(_QUICK_CURVE if quick else {}) | _renamed(options, names, leave=leave))


def gpu_sizes(workload: str, options: Mapping[str, Any], *, quick: bool) -> Workload:
    """The workload of `bench gpu`; of several batch sizes and lookaheads the first. ConfigError:
    there is no such workload.
    """
    names = {"batch_sizes": "batch_size", "lookaheads": "lookahead", "steps": "turn_steps"}
    return make_workload(
        workload, _renamed(options, names, leave=("arms", "cache_share")), quick=quick
    )


def trainers_sizes(workload: str, options: Mapping[str, Any], *, quick: bool) -> TrainersBench:
    """The workload of `bench trainers` and its trainers; of several batch sizes and lookaheads the
    first. ConfigError: as above.
    """
    own = {
        name: options[name]
        for name in ("arms", "num_trainers", "device", "scaling", "graph")
        if name in options
    }
    names = {"batch_sizes": "batch_size", "lookaheads": "lookahead", "steps": "turn_steps"}
    made = make_workload(
        workload, _renamed(options, names, leave=(*own, "cache_share")), quick=quick
    )
    return TrainersBench(workload=made, **own, **(_QUICK_TRAINERS if quick else {}))


def _renamed(
    options: Mapping[str, Any], names: Mapping[str, str], leave: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Options under a benchmark's own names, those in `leave` left out; where it wants one value of
    a list, the first.
    """
    return {
        names.get(name, name): value[0] if names.get(name) in ("batch_size", "lookahead") else value
        for name, value in options.items()
        if name not in leave
    }
