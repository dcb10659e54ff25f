"""Runs that are disturbed by every kind of fault end as undisturbed ones, to the last bit.

The rules are those of docs/protocol.md. `make soak` runs 2,000 cases of each kind of shard.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.model.cases import first_wrong
from tests.model.real import real_shard
from tests.model.world import naive_shard

NUM_TRACES = 10  # planning them takes most of the time
SOAK_CASES, SOAK_CHUNK = 2_000, 50


@pytest.mark.parametrize("kind", ["naive", "real"])
def test_a_disturbed_run_is_as_an_undisturbed_one(kind: str, tmp_path: Path) -> None:
    run_cases(range(40), kind, tmp_path, num_traces=NUM_TRACES)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["naive", "real"])
@pytest.mark.parametrize("first", range(0, SOAK_CASES, SOAK_CHUNK))
def test_many_disturbed_runs(first: int, kind: str, tmp_path: Path) -> None:
    run_cases(range(first, first + SOAK_CHUNK), kind, tmp_path, num_traces=40)


def run_cases(seeds: range, kind: str, folder: Path, *, num_traces: int) -> None:
    for seed in seeds:
        files = folder / str(seed)
        files.mkdir()
        make_shard = naive_shard if kind == "naive" else real_shard(files)
        wrong = first_wrong(range(seed, seed + 1), make_shard=make_shard, num_traces=num_traces)
        assert wrong is None
