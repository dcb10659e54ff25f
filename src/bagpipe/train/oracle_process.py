"""Which oracle process a trainer uses: its own, or of several trainers on one host the one that rank 0 starts for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bagpipe.cache.communicator import Communicator
from bagpipe.errors import ConfigError
from bagpipe.oracle.process import OracleProcess, SharedOracle
from bagpipe.oracle.stream import BatchAdapter, StreamOptions
from bagpipe.types import UInt8Array

_NAME = "the oracle process"
_STARTED, _FAILED = "started ", "failed "


def start_oracle(
    batches: Iterable[Any],
    options: StreamOptions,
    adapter: BatchAdapter,
    communicator: Communicator | None,
    *,
    num_places: int,
    on_region: Callable[[UInt8Array], None],
) -> SharedOracle[Any]:
    """Starts the process, or on ranks other than 0 joins it; all ranks must call it. Only rank 0's `batches` are read.

    Raises ConfigError, on all ranks, when rank 0 can't start it, and BackgroundError when rank 0 is gone.
    """
    if communicator is not None and communicator.rank > 0:
        outcome = communicator.share_text(_NAME, None)
        if not outcome.startswith(_STARTED):
            raise ConfigError(f"rank 0 could not start the oracle process: {outcome.removeprefix(_FAILED)}")
        return SharedOracle.join(outcome.removeprefix(_STARTED), communicator.rank, on_region=on_region)
    timeout_s = {} if communicator is None else {"join_timeout_s": communicator.timeout.total_seconds()}
    try:
        process = OracleProcess(batches, options, adapter, num_places=num_places, on_region=on_region, **timeout_s)
    except BaseException as error:
        if communicator is not None:
            communicator.share_text(_NAME, f"{_FAILED}{error}")
        raise
    if communicator is not None:
        communicator.share_text(_NAME, f"{_STARTED}{process.address}")
    return process
