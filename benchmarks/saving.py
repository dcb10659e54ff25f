"""How fast an own loop is saved and restored, beside the disk alone.

The table holds so many GB of records, all of them written. Arms take turns, on the same bytes:

- write: plain writes of 16 MB, then fsync, as `dd conv=fsync`;
- save: `bagpipe.save`;
- read: the file that was written, which the page cache was asked to forget;
- restore: `bagpipe.restore`, of files that it was asked to forget.

The first turn restores into memory that was never used, which costs page faults, and counts apart.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

import bagpipe
from benchmarks.measure import Progress, Result

QUICK: dict[str, Any] = {"table_gb": 0.001, "num_rounds": 2}
_BLOCK_BYTES = 1 << 24
_BLOCK_ROWS = 65_536
_Seconds = dict[str, tuple[float, float]]
"""Seconds, and CPU seconds, of each arm."""


@dataclass(frozen=True, kw_only=True)
class SavingBench:
    """Sizes of the benchmark."""

    table_gb: float = 2.0
    embedding_dim: int = 64
    num_rounds: int = 5


def bench_saving(sizes: SavingBench, progress: Progress, folder: str | None = None) -> Result:
    """Saves and restores in turns with plain writes and reads, on the disk of `folder`."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        saved, restored = _embeddings(sizes), _embeddings(sizes)
        _fill(saved)
        rounds = []
        for number in range(sizes.num_rounds):
            rounds.append(_round(Path(place), saved, restored))
            progress("rounds", number + 1, sizes.num_rounds)
    num_bytes = _num_bytes(saved)
    table = Table(title=f"{num_bytes / 1e9:.2f} GB: MB/s (share of the disk's; CPU seconds)")
    for name in ("round", "write", "save", "read", "restore"):
        table.add_column(name)
    for number, seconds in enumerate(rounds, 1):
        table.add_row(
            str(number),
            _speed(seconds, "write", num_bytes),
            _share(seconds, "save", "write", num_bytes),
            _speed(seconds, "read", num_bytes),
            _share(seconds, "restore", "read", num_bytes),
        )
    again = rounds[1:] or rounds
    shares = {
        arm: median(each[disk][0] / each[arm][0] for each in again)
        for arm, disk in (("save", "write"), ("restore", "read"))
    }
    return Result(
        name="saving",
        tables=(table,),
        values={"num_bytes": num_bytes, "seconds_and_cpu": rounds, "median_shares": shares},
    )


def _embeddings(sizes: SavingBench) -> bagpipe.EmbeddingBagCollection:
    dim = sizes.embedding_dim
    num_rows = max(1, int(sizes.table_gb * 1e9) // (4 * dim + 4))
    table = bagpipe.TableConfig(
        name="t", num_embeddings=num_rows, embedding_dim=dim, feature_names=["f"]
    )
    return bagpipe.EmbeddingBagCollection([table], optimizer=bagpipe.RowWiseAdagrad(lr=0.1))


def _fill(embeddings: bagpipe.EmbeddingBagCollection) -> None:
    (store,) = embeddings.stores
    num_rows, width = store.group.num_rows, store.group.record_width
    records = np.random.default_rng(0).random((_BLOCK_ROWS, width), np.float32)
    for begin in range(0, num_rows, _BLOCK_ROWS):
        rows = np.arange(begin, min(num_rows, begin + _BLOCK_ROWS))
        store.write(rows, records[: len(rows)])


def _num_bytes(embeddings: bagpipe.EmbeddingBagCollection) -> int:
    """Of the rows' numbers and records, as a checkpoint has them."""
    (group,) = embeddings.groups
    return group.num_rows * (8 + 4 * group.record_width)


def _round(
    place: Path,
    saved: bagpipe.EmbeddingBagCollection,
    restored: bagpipe.EmbeddingBagCollection,
) -> _Seconds:
    plain, run = place / "plain", place / "run"
    write = _timed(lambda: _write(plain, _num_bytes(saved)))
    _forget(plain)
    read = _timed(lambda: _read(plain))
    plain.unlink()
    save = _timed(lambda: bagpipe.save(run, saved, overwrite=True))
    for file in run.rglob("*"):
        if file.is_file():
            _forget(file)
    restore = _timed(lambda: bagpipe.restore(run, restored))
    shutil.rmtree(run)
    return {"write": write, "save": save, "read": read, "restore": restore}


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def _write(path: Path, num_bytes: int) -> None:
    block = memoryview(np.random.default_rng(0).bytes(_BLOCK_BYTES))
    with path.open("wb", buffering=0) as file:
        for begin in range(0, num_bytes, _BLOCK_BYTES):
            file.write(block[: num_bytes - begin])
        os.fsync(file.fileno())


def _read(path: Path) -> None:
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def _forget(path: Path) -> None:
    """Asks the page cache to forget a file; a file system in memory can't."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _speed(seconds: _Seconds, arm: str, num_bytes: int) -> str:
    elapsed, cpu = seconds[arm]
    return f"{num_bytes / elapsed / 1e6:.0f} ({cpu:.2f} s)"


def _share(seconds: _Seconds, arm: str, disk: str, num_bytes: int) -> str:
    elapsed, cpu = seconds[arm]
    share = seconds[disk][0] / elapsed
    return f"{num_bytes / elapsed / 1e6:.0f} ({share:.2f}; {cpu:.2f} s)"
