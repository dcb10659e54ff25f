"""Whoever is killed, the run goes on and ends with the same parameters, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.train.kills import Fault, Run, assert_ends_as_undisturbed, random_faults

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    Run(folder).finish([])
    return folder


def test_a_trainer_and_the_server_are_killed_at_once(tmp_path: Path, undisturbed: Path) -> None:
    fault = Fault(victims=("rank 1", "server"), at_step=80)
    hits = assert_ends_as_undisturbed(tmp_path, [fault], undisturbed)
    assert hits == ["rank 1", "server"]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(60))
def test_random_faults(tmp_path: Path, undisturbed: Path, seed: int) -> None:
    assert_ends_as_undisturbed(tmp_path, random_faults(seed), undisturbed)
