"""A shard whose staging server is reached from this process, and what a trainer needs for that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from tests.server.shards import header_of, make_shard
from tests.soon import TIMEOUT_S
from tests.store_contract import initial, make_group, rows_of

from bagpipe.server.memory import StagingMemory
from bagpipe.server.staging import (
    StagingServer,
    StagingStream,
)
from bagpipe.server.wire import Header, Place, What
from bagpipe.types import Float32Array

GROUP = make_group()
EPOCH, NUM_RANKS = 3, 2
ROOM_BYTES = 1 << 20
GONE = r"can't be reached|has ended the stream|is gone"


class Host:
    """A shard, its staging server, and what a trainer needs to reach it."""

    def __init__(self) -> None:
        self.shard = make_shard()
        self.shard.begin(EPOCH, NUM_RANKS, None)
        self.server = StagingServer(self.shard)
        self.memory = StagingMemory(ROOM_BYTES)
        self.memory.take(1, GROUP.record_width)  # offset 0, for those who name none
        self.streams: list[StagingStream] = []

    def header(self, what: What, offset: int = 0, **values: object) -> Header:
        header = header_of(self.shard, EPOCH, what=what)
        header = replace(header, place=Place.STAGING, offset=offset)
        return replace(header, **values)  # type: ignore[arg-type]

    def stream(self, what: What, rank: int = 0, timeout_s: float = TIMEOUT_S) -> StagingStream:
        opening = self.header(what, rank=rank)
        stream = StagingStream(self.server.address, self.memory, opening, timeout_s=timeout_s)
        self.streams.append(stream)
        return stream

    def array(self, num_records: int) -> tuple[Float32Array, int]:
        """Memory for records that holds NaN, and its offset."""
        array = self.memory.take(num_records, GROUP.record_width)
        array[:] = np.nan
        offset = self.memory.offset_of(array)
        assert offset is not None
        return array, offset

    def check_serves(self) -> None:
        """A trainer that does as it should is served."""
        rows = rows_of(4, 1_100, 4)
        out, offset = self.array(len(rows))
        stream = self.stream(What.FETCH)
        stream.send(self.header(What.FETCH, offset), rows)
        stream.receive()
        np.testing.assert_array_equal(out, initial(GROUP, rows))
        stream.close()

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
        self.shard.close()
        self.server.close()
        self.memory.close()


@pytest.fixture
def place() -> Iterator[Host]:
    place = Host()
    yield place
    place.close()
