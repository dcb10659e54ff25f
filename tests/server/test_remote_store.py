"""The contract of stores over any number of shard servers: in memory and files, near and far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

import numpy as np
import pytest
from tests.server.serving import in_files, in_memory, pool_of_servers
from tests.store_contract import (
    SEED,
    StoreContract,
    StoreFactory,
    fetch,
    initial,
    make_group,
    records_of,
    rows_of,
)

Pools: TypeAlias = Callable[[int, bool, bool], StoreFactory]


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    """By number of shards, whether they are in files and whether memory is shared with them.

    Servers live as long as the module.
    """
    made: dict[tuple[int, bool, bool], StoreFactory] = {}
    with ExitStack() as stack:

        def pool(num_shards: int, files: bool, staging: bool) -> StoreFactory:
            key = num_shards, files, staging
            if key not in made:
                kind = in_files(tmp_path_factory.mktemp("stores")) if files else in_memory
                made[key] = stack.enter_context(pool_of_servers(num_shards, kind, staging=staging))
            return made[key]

        yield pool


class OverServers(StoreContract):
    num_shards = 1
    files = False
    staging = True

    @pytest.fixture
    def make(self, pools: Pools) -> StoreFactory:
        return pools(self.num_shards, self.files, self.staging)

    def test_a_huge_group_is_made_lazily(self, make: StoreFactory) -> None:
        """Its records take 24 GiB; only the time that the servers take is not looked at."""
        store = make(make_group(100_000_000, dim=64), SEED)
        rows = rows_of(0, 33_333_333, 99_999_999)
        store.write(rows[1:], records_of(rows[1:], width=65))
        found = fetch(store, rows)
        np.testing.assert_array_equal(found[:1], initial(store.group, rows[:1]))
        np.testing.assert_array_equal(found[1:], records_of(rows[1:], width=65))


class TestOneShard(OverServers):
    pass


class TestTwoFarShards(OverServers):
    num_shards, staging = 2, False


class TestThreeShards(OverServers):
    num_shards = 3


class TestThreeShardsInFiles(OverServers):
    num_shards, files = 3, True


class TestSevenFarShards(OverServers):
    num_shards, staging = 7, False
    test_a_huge_group_is_made_lazily = None  # seven servers in one process look at 700 MB of flags
