"""The arm of `gpu` whose tables are in a shard server of this host, a process of its own."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import ExitStack, closing, nullcontext
from typing import Any

import torch

from bagpipe.config.servers import ServersConfig
from bagpipe.server.client import ShardServers
from bagpipe.server.control import ServerControl
from bagpipe.server.local import local_server
from bagpipe.server.start import Served
from bagpipe.types import Group
from benchmarks.gpu.arms import BagpipeArm
from benchmarks.workloads import Workload

_SEED, _EPOCH = 0, 1


class ServedArm(BagpipeArm):
    """Bagpipe, which reaches its store by shared memory that is pinned where there is a GPU."""

    def __init__(
        self, workload: Workload, group: Group, batches: Iterable[Any], *, device: torch.device
    ) -> None:
        """Starts the server; arguments are those of `BagpipeArm`."""
        servers = ServersConfig(num_shards=1)
        served = Served(groups=(group,), seed=_SEED, servers=servers)
        with ExitStack() as stack:
            server = local_server(served, 0, key=secrets.token_hex(16), lives_with=None)
            stack.enter_context(server.hold or nullcontext())
            control = ServerControl([server.address], [group], _SEED, [server.credentials])
            stack.enter_context(closing(control))
            own = ShardServers(control, [group], _EPOCH, control.begin(_EPOCH, num_ranks=1))
            stack.enter_context(own)
            super().__init__(
                workload,
                group,
                batches,
                device=device,
                name="served",
                store=lambda group, _: own.stores[group.index],
            )
            self._open = stack.pop_all()

    def close(self) -> None:
        """See `StepArm.close`; the server ends, too."""
        with self._open:
            super().close()
