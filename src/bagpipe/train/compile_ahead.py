"""Compiles the loops that take longest in processes beside a machine's first run.

They work while the run opens its data and makes its model. Without them the first batch meets one
uncompiled loop after the other on its way through the pipeline, and one core compiles for a minute.
Threads would not help: numba compiles under a lock. So each process calls, on a handful of rows,
what a part of the pipeline calls, which puts machine code on disk, where the run finds it. Nothing
depends on them: what they did not compile, because they failed, were too slow or had other types,
the run compiles itself.

Started for one trainer only; several compile for themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from bagpipe.native.jit import compiling_elsewhere, is_on_disk
from bagpipe.optimizers import SGD
from bagpipe.oracle.dedup import DedupedGroup, dedup
from bagpipe.oracle.eviction import loops
from bagpipe.oracle.eviction.cacher import Cacher
from bagpipe.oracle.linker import BatchUses, LinkedGroup, Linker, roomy_ring
from bagpipe.oracle.merge import merge
from bagpipe.store import MemoryStore, array
from bagpipe.types import Group, Jagged, TableConfig

_LIMIT_S = 300.0
"""How long a run waits for them at most."""


@contextmanager
def compiled_ahead() -> Iterator[Callable[[], None]]:
    """Starts processes for what is not compiled yet; yields what waits for them.

    They end with the context at the latest.
    """
    processes = [_start(part) for part in _parts_to_compile()]

    def wait() -> None:
        deadline = time.monotonic() + _LIMIT_S
        with compiling_elsewhere():
            for process in processes:
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    return

    try:
        yield wait if processes else _do_nothing
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compile_planning() -> None:
    """Compiles what plans a cache, which is half of all there is to compile.

    Its batches are made as if they had been linked: what de-duplicates and links is another part.
    """
    cacher = Cacher(_group(), num_slots=8, max_lookahead=4, prefetch_depth=1)
    cacher.linker.next_uses.fill(-1)
    for step in range(3):
        batch = DedupedGroup(
            unique_rows=np.arange(2 * step, 2 * step + 2),
            inverse=np.arange(2, dtype=np.int32),
            bag_offsets=None,
            bag_scales=None,
            bags=np.arange(2, dtype=np.int32),
            piece_offsets=np.arange(3, dtype=np.int32),
            long_uniques=np.empty(0, np.int32),
            long_offsets=np.zeros(1, np.int32),
        )
        cacher.admit(
            LinkedGroup(
                batch=merge(cacher.group, [batch]),
                uses=BatchUses(step=step, first=2 * step, bounds=np.array([0, 2])),
                previous=np.full(2, -1, np.int32),
            )
        )
    for _ in range(3):
        cacher.plan()


def compile_the_rest() -> None:
    """Compiles what de-duplicates and links a batch, and what fetches and writes rows."""
    group = _group()
    linker = Linker(group)
    ids = Jagged(keys=("a",), values=np.array([1, 2, 1], np.int32), batch_size=3)
    roomy_ring(np.empty(2, np.int32), 0, 1, 3)
    rows = linker.link(merge(group, [dedup(group, ids)])).batch.unique_rows
    store = MemoryStore(group, 0)
    records = np.empty((len(rows), group.record_width), np.float32)
    store.fetch(rows, records)
    store.write(rows, records)
    store.close()


_PARTS: dict[str, tuple[Callable[[], None], Callable[..., object]]] = {
    "planning": (compile_planning, loops.plan),
    "rest": (compile_the_rest, array._scatter),
}
"""What compiles each part, and the loop in it that is compiled last."""


def _parts_to_compile() -> list[str]:
    if len(os.sched_getaffinity(0)) < 2 or not sys.executable:
        return []
    return [name for name, (_, last) in _PARTS.items() if not is_on_disk(last)]


def _start(part: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, part],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _group() -> Group:
    table = TableConfig(name="a", num_embeddings=8, embedding_dim=4, feature_names=["a"])
    return Group(index=0, tables=(table,), optimizer=SGD(lr=0.1))


def _do_nothing() -> None:
    pass


if __name__ == "__main__":
    _PARTS[sys.argv[1]][0]()
