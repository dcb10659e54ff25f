"""Which oracle process a trainer uses: its own, or one that the trainers of a host share.

The first rank of the host starts it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from bagpipe.cache.pinned import CudaRegistrar, PinnedMemory
from bagpipe.distributed.alone import Peers
from bagpipe.errors import ConfigError
from bagpipe.feed.process import OracleProcess, SharedOracle
from bagpipe.feed.stream import BatchAdapter, StreamOptions
from bagpipe.native.main_script import check_main_is_guarded
from bagpipe.types import UInt8Array

_NAME = "the oracle process"
_STARTED, _FAILED = "started ", "failed "


def _as_values(generator: torch.Generator) -> tuple[Any, ...]:
    """What a generator is sent as, by value.

    torch would send its state in shared memory, which is gone before the process has opened it.
    """
    return _from_values, (str(generator.device), generator.get_state().numpy().tobytes())


def _from_values(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


ForkingPickler.register(torch.Generator, _as_values)  # a DataLoader that shuffles has one


def start_oracle(
    batches: Iterable[Any],
    options: StreamOptions,
    adapter: BatchAdapter,
    peers: Peers,
    *,
    num_places: int,
    device: torch.device,
    at_close: list[Callable[[], None]],
) -> SharedOracle[Any]:
    """Starts the process on a host's first rank and joins it on the others; all must call it.

    Args:
        batches: read by the process; only the first rank's are.
        num_places: how many items the process may have handed out at a time.
        device: what reads the plans, where the process put them.
        at_close: gets what gives their memory back, to be called when nothing reads them any more.

    Raises:
        ConfigError: the first rank can't start the process; on all ranks of the host. Or the script
            that was started would run a second time in it.
        BackgroundError: the first rank is gone.
    """
    check_main_is_guarded('oracle="process"', 'plan in threads (oracle="thread")')
    pinned = PinnedMemory(CudaRegistrar(device))
    process = _start_or_join(
        batches,
        options,
        adapter,
        peers,
        num_places=num_places,
        on_region=pinned.pin if device.type == "cuda" else lambda _: None,
    )
    at_close += [pinned.unpin, process.close]
    return process


def _start_or_join(
    batches: Iterable[Any],
    options: StreamOptions,
    adapter: BatchAdapter,
    peers: Peers,
    *,
    num_places: int,
    on_region: Callable[[UInt8Array], object],
) -> SharedOracle[Any]:
    if not peers.hosts.is_first:
        outcome = peers.share_text(_NAME, None)
        if not outcome.startswith(_STARTED):
            first = peers.hosts.own_ranks[0]
            raise ConfigError(
                f"rank {first} could not start the oracle process: {outcome.removeprefix(_FAILED)}"
            )
        return SharedOracle.join(
            outcome.removeprefix(_STARTED),
            peers.rank,
            on_region=on_region,
            join_timeout_s=peers.timeout.total_seconds(),
        )
    try:
        process = OracleProcess(
            batches,
            options,
            adapter,
            num_places=num_places,
            on_region=on_region,
            join_timeout_s=peers.timeout.total_seconds(),
        )
    except BaseException as error:
        peers.share_text(_NAME, f"{_FAILED}{error}")
        raise
    peers.share_text(_NAME, f"{_STARTED}{process.address}")
    return process
