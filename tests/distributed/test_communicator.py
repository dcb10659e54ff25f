"""What ranks tell each other, and where they are."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from tests.soon import ends_soon
from tests.train.ranks import run_ranks

from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.machines import describe_process, processes_and_hosts
from bagpipe.errors import BackgroundError


def test_a_rank_that_has_gone_is_missed_where_texts_are_gathered() -> None:
    """Not after the timeout: on another host nobody can watch its process."""

    def work(communicator: Communicator) -> None:
        assert communicator.gather_texts("names", f"ä{communicator.rank}" * communicator.rank) == [
            "",
            "ä1",
        ]
        if communicator.rank == 0:
            with pytest.raises(
                BackgroundError,
                match="waiting for settings of all ranks failed; another of the 2 trainers may be",
            ):
                communicator.gather_texts("settings", "mine")

    with ends_soon():
        run_ranks(2, work)


def test_hosts_are_found_by_where_ranks_are_however_many_are_on_each() -> None:
    """And however their ranks are mixed."""

    def work(communicator: Communicator) -> list[object]:
        found = replace(communicator, host_name="abacb"[communicator.rank], number=7).hosts
        return [found.own, found.num_hosts, found.own_ranks, found.is_first]

    assert run_ranks(5, work) == [
        [0, 3, (0, 2), True],
        [1, 3, (1, 4), True],
        [0, 3, (0, 2), False],
        [2, 3, (3,), True],
        [1, 3, (1, 4), False],
    ]


def test_two_agents_of_torchrun_on_one_machine_are_two_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []
    for agent in ("0", "0", "1"):
        monkeypatch.setenv("GROUP_RANK", agent)
        told.append(describe_process(None))
    pids, hosts = processes_and_hosts(told)
    assert (pids, hosts) == ([os.getpid()] * 3, (0, 0, 1))
