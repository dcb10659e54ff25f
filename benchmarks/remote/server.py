"""The server's process of `remote`: prints port and instance, and serves until its input ends."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from bagpipe.native.memory import keep_freed_memory
from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Shard
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from benchmarks.network.server import EPOCH, SEED, serve
from benchmarks.remote.settings import End


def main() -> None:
    """Serves all tables of its argument's benchmark."""
    keep_freed_memory()  # as servers do
    end = End.told(sys.argv[1])
    group = end.bench.group
    shard = Shard([group], SEED, 0, 1, [CutStore(MemoryStore(group, SEED))])
    instance = shard.begin(EPOCH, 1)
    run_folder = Path(end.folder) if end.folder else None
    with closing(ShardServer(shard, end.host, 0, run_folder=run_folder)) as server:
        serve(server.port, instance)


if __name__ == "__main__":
    main()
