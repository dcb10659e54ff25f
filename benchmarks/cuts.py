"""What cuts of a shard's store cost: writing them beside training, and putting rows back.

One shard has all rows of a table and its store is in memory. Parts:

1. A write of `num_written` rows: to the bare store, to the store with cuts, and while a cut is
   written that has these rows, so that their old records are kept.
2. How long no write runs while a cut begins and is committed, which go through all flags.
3. Files: all rows, then those of `nums_changed` rows written since. Their bytes over those of the
   records and row numbers, and the time over that of writing as many bytes to a file of the same
   disk. And a write of few rows every 2 ms, beside a file of all rows and without one.
4. Putting back as many rows as were written, and loading all, from files in the page cache and
   from files that are not.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from bagpipe.store.record_files import RecordFile, next_files
from bagpipe.types import Float32Array, Group, Int64Array, TableConfig
from benchmarks.measure import Progress, Result, Timing

QUICK: dict[str, Any] = {
    "num_rows": 3_000,
    "nums_changed": (100, 200),
    "num_written": 50,
    "num_repeats": 2,
}
_FEW_ROWS = 2_000
_PAUSE_S = 0.002


@dataclass(frozen=True, kw_only=True)
class CutsBench:
    """Sizes of the benchmark."""

    num_rows: int = 3_000_000
    embedding_dim: int = 48
    nums_changed: Sequence[int] = (10_000, 100_000, 400_000)
    """Rows written between two cuts; the last as many as are put back."""
    num_written: int = 20_000
    num_repeats: int = 5
    folder: str | None = None
    """Where files are written; None: where temporary files are."""


class _Bench:
    """A store whose rows were all written, and their records."""

    def __init__(self, sizes: CutsBench, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        table = TableConfig(
            name="rows",
            num_embeddings=sizes.num_rows,
            embedding_dim=sizes.embedding_dim,
            feature_names=["rows"],
        )
        self.group = Group(index=0, tables=(table,), optimizer=RowWiseAdagrad(lr=0.1))
        self.bare = MemoryStore(self.group, 0)
        self.store = CutStore(self.bare)
        self.random = np.random.default_rng(0)
        self.files: tuple[RecordFile, ...] = ()
        for rows in np.array_split(np.arange(sizes.num_rows), 64):
            self.store.write(rows, self.records(rows))

    def records(self, rows: Int64Array) -> Float32Array:
        return self.random.random((len(rows), self.group.record_width), np.float32)

    def choose(self, num_rows: int) -> Int64Array:
        return self.random.choice(self.sizes.num_rows, min(num_rows, self.sizes.num_rows), False)

    def change(self, num_rows: int) -> None:
        for rows in np.array_split(self.choose(num_rows), 32):
            self.store.write(rows, self.records(rows))

    def cut(self, *, whole: bool = False) -> dict[str, Any]:
        """Times a cut that is committed."""
        if whole:
            self.store.base, self.files = (), ()
        began = time.perf_counter()
        write = self.store.begin_cut()
        begun = time.perf_counter()
        file = write(self.folder / f"{time.monotonic_ns()}.arrow")
        written = time.perf_counter()
        self.store.committed()
        ended = time.perf_counter()
        self.files = next_files(self.files, [file])
        assert file.num_records is not None
        content_bytes = file.num_records * (8 + self.group.record_bytes)
        return {
            "num_records": file.num_records,
            "bytes": file.size_bytes,
            "bytes_over_content": file.size_bytes / max(1, content_bytes),
            "begin_ms": 1e3 * (begun - began),
            "write_s": written - begun,
            "committed_ms": 1e3 * (ended - written),
            "write_over_plain": (written - begun) / _time_plain(self.folder, file.size_bytes),
        }

    def put_back(self, *, all_rows: bool, cold: bool) -> float:
        """Times putting back, in seconds."""
        if all_rows:
            self.store.base = None
        else:
            self.change(self.sizes.nums_changed[-1])
        if cold:
            for file in self.files:
                _forget(self.folder / file.name)
        began = time.perf_counter()
        self.store.put_back(self.folder, self.files)
        return time.perf_counter() - began


def bench_cuts(sizes: CutsBench, progress: Progress) -> Result:
    """Runs all parts."""
    with tempfile.TemporaryDirectory(dir=sizes.folder) as folder:
        bench = _Bench(sizes, Path(folder))
        bench.cut()  # compiles
        bench.store.put_back(bench.folder, bench.files)
        progress("cuts", 1, 5)
        values: dict[str, Any] = {"sizes": asdict(sizes), "write": _time_writes(bench)}
        progress("cuts", 2, 5)
        values["beside"] = _time_beside(bench)
        progress("cuts", 3, 5)
        values["files"] = [bench.cut(whole=True)]
        for num_changed in sizes.nums_changed:
            bench.change(num_changed)
            values["files"].append(bench.cut())
        progress("cuts", 4, 5)
        values["put_back"] = {
            f"{what}, {where}": Timing.of(
                [
                    bench.put_back(all_rows=what == "all rows", cold=where == "cold")
                    for _ in range(sizes.num_repeats)
                ]
            )
            for what in ("rows since", "all rows")
            for where in ("cached", "cold")
        }
        progress("cuts", 5, 5)
    return Result(name="cuts", tables=_tables(values), values=values)


def _time_writes(bench: _Bench) -> dict[str, Timing]:
    """Part 1."""
    rows = bench.choose(bench.sizes.num_written)
    records, repeats = bench.records(rows), 4 * bench.sizes.num_repeats

    def timed(write: Callable[[Int64Array, Float32Array], None]) -> float:
        began = time.perf_counter()
        write(rows, records)
        return time.perf_counter() - began

    found: dict[str, list[float]] = {"bare": [], "with cuts": [], "in a cut, kept": []}
    for _ in range(repeats):
        found["bare"].append(timed(bench.bare.write))
        found["with cuts"].append(timed(bench.store.write))
        bench.store.begin_cut()
        found["in a cut, kept"].append(timed(bench.store.write))
        bench.store.abandon()
    return {name: Timing.of(seconds) for name, seconds in found.items()}


def _time_beside(bench: _Bench) -> dict[str, Timing]:
    """Writes of few rows while nothing else goes on, and beside a file of all rows."""
    alone, beside = [list[float](), list[float]()]
    with _writing(bench, alone):
        time.sleep(100 * _PAUSE_S * bench.sizes.num_repeats)
    with _writing(bench, beside):
        bench.cut(whole=True)
    return {"alone": Timing.of(alone), "beside": Timing.of(beside)}


@contextmanager
def _writing(bench: _Bench, seconds: list[float]) -> Iterator[None]:
    is_over = threading.Event()
    choices = [bench.choose(_FEW_ROWS) for _ in range(8)]
    records = bench.records(choices[0])

    def write() -> None:
        number = 0
        while not is_over.is_set() or not seconds:
            rows = choices[number % len(choices)]
            began = time.perf_counter()
            bench.store.write(rows, records)
            seconds.append(time.perf_counter() - began)
            number += 1
            time.sleep(_PAUSE_S)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _time_plain(folder: Path, num_bytes: int) -> float:
    """Seconds that writing so many bytes to a new file takes, in blocks, until they are on disk."""
    block, path = bytes(1 << 24), folder / "plain"
    began = time.perf_counter()
    with path.open("xb") as file:
        for begin in range(0, num_bytes, len(block)):
            file.write(block[: num_bytes - begin])
        file.flush()
        os.fsync(file.fileno())
    elapsed_s = time.perf_counter() - began
    path.unlink()
    return elapsed_s


def _forget(path: Path) -> None:
    """Has the page cache forget a file that is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _tables(values: dict[str, Any]) -> tuple[Table, ...]:
    sizes = values["sizes"]
    times = Table(title=f"{sizes['num_rows']:,} rows of dimension {sizes['embedding_dim']}, ms")
    for column in ("", "median [quartiles]", "most"):
        times.add_column(column, justify="left" if not column else "right")
    for part in ("write", "beside", "put_back"):
        for name, timing in values[part].items():
            times.add_row(f"{part}: {name}", str(timing), f"{timing.max_ms:.1f}")
    files = Table(title="Files")
    for column in ("rows", "MB", "over content", "write, s", "over plain", "begin, ms", "end, ms"):
        files.add_column(column, justify="right")
    for file in values["files"]:
        files.add_row(
            f"{file['num_records']:,}",
            f"{file['bytes'] / 1e6:.1f}",
            f"{file['bytes_over_content']:.4f}",
            f"{file['write_s']:.3f}",
            f"{file['write_over_plain']:.2f}",
            f"{file['begin_ms']:.1f}",
            f"{file['committed_ms']:.1f}",
        )
    return times, files
