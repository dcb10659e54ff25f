"""The benchmark `cutting`: a tiny run with cuts, its server in this process."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Shard
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from benchmarks.cli import app
from benchmarks.cutting.bench import _summary, _tables
from benchmarks.cutting.settings import QUICK, CuttingBench
from benchmarks.cutting.trainer import measure_cuts
from benchmarks.network.server import EPOCH, SEED
from benchmarks.recovery.bench import _parts
from benchmarks.recovery.run import Died
from benchmarks.recovery.settings import PARTS, Event
from benchmarks.remote.settings import End, RemoteBench

# on a new machine the first one compiles most loops
pytestmark = pytest.mark.timeout(400)

REMOTE = RemoteBench(**QUICK)


def test_cuts_of_a_run_are_taken_apart(tmp_path: Path) -> None:
    bench, group = CuttingBench.of(REMOTE), REMOTE.group
    shard = Shard([group], SEED, 0, 1, [CutStore(MemoryStore(group, SEED))])
    instance = shard.begin(EPOCH, 1)
    with closing(ShardServer(shard, run_folder=tmp_path)) as server:
        end = End(
            bench=REMOTE,
            host="127.0.0.1",
            port=server.port,
            instance=instance,
            folder=str(tmp_path),
        )
        found = measure_cuts(end)
    assert len(found.cuts) == bench.num_cuts == 2
    first, second = found.cuts
    # all that the batches used: the first cut has no base
    assert first.num_records >= first.rows_used > 0
    # all that is in the cache is flushed, whether it has changed or not
    assert second.num_records >= max(second.rows_used, second.rows_flushed) > 0
    assert min(first.flush_s, first.take_s, first.written_s) > 0
    assert len(found.in_process_s) == 2
    summary = _summary(bench, None, asdict(found))
    for cut in summary["cuts"]:
        assert 1 <= cut["bytes_over_records"] < 1.1
        assert cut["cost_s"] == cut["flush_s"] + cut["take_s"] + cut["slower_s"]
    assert [table.row_count for table in _tables(bench, [summary])] == [1, 1]


def test_a_recovery_is_told_in_its_parts() -> None:
    died = Died(killed_s=10.0, noticed_s=10.5, ended_s=11.0)
    told = {
        name: Event(name=name, at_s=12.0 + number, pid=1, rank=0, step=-1)
        for number, name in enumerate(PARTS[2:])
    }
    assert _parts(died, told) == dict.fromkeys(PARTS, 1.0) | {
        "noticed": 0.5,
        "ended": 0.5,
        "in all": 6.0,
    }


@pytest.mark.soak
def test_a_trainer_and_the_server_are_killed(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["recovery", "--quick", "--folder", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.stderr
    assert all(victim in result.output for victim in ("trainer", "server"))
    assert list(tmp_path.iterdir()) == []


def test_a_victim_that_there_is_not_is_refused() -> None:
    result = CliRunner().invoke(app, ["recovery", "--kill", "cat"])
    assert result.exit_code == 2
    assert "--kill cat: is unknown; there are trainer, oracle, server, launcher" in result.stderr
