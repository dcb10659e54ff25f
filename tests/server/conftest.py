"""A shard in its first epoch, servers of three shards, and threads that call them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from tests.server.serving import Servers
from tests.server.shards import make_shard
from tests.store_contract import SEED, make_group

from bagpipe.server.shard import Shard


@pytest.fixture
def shard() -> Iterator[Shard]:
    made = make_shard()
    made.begin(1, 2, None)
    yield made
    made.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture(scope="module", params=[True, False], ids=["near", "far"])
def shared(request: pytest.FixtureRequest) -> Iterator[Servers]:
    with closing(Servers([make_group()], SEED, 3, staging=request.param)) as made:
        yield made


@pytest.fixture
def servers(shared: Servers) -> Iterator[Servers]:
    yield shared
    shared.end_clients()
