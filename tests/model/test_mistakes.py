"""Each rule of the protocol is needed: without it the model finds a run that differs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from tests.model.cases import STUCK, Fault, first_wrong
from tests.model.rules import ALL, Rules

MOST_CASES = 200
SOAK_CASES = 2_000
NUM_TRACES = 10


def strike(label: str, count: int, kind: str, role: str = "rank 0", lasts: float = 0.0) -> Fault:
    return Fault(label=label, count=count, role=role, kind=kind, lasts=lasts)


SCENARIOS = {
    # Rank 0's disk is full just when it has told the servers, too early, that all is committed.
    "committed_after_rename": [strike("early", count, "full", lasts=3.0) for count in (1, 3)],
    # Rank 0 is stopped before its rename, and goes on after the next start has begun.
    "fenced_folders": [strike("manifest", 2, "stop", lasts=40.0), strike("manifest", 2, "alarm")],
    # A server is stopped and replaced; a new run overwrites the folder and has a checkpoint of the
    # same step; then the old server is taken again.
    "cuts_by_name": [
        strike("told", 1, "stop", "server 0", lasts=2.2 * STUCK),
        strike("told", 2, "overwrite"),
        *(strike("told", count, "kill", "server 0") for count in (3, 4, 5, 6)),
    ],
}
"""What faults find a mistake for which faults by chance need hundreds of cases."""


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules)])
def test_a_planted_mistake_is_found(rule: str) -> None:
    rules = replace(ALL, **{rule: False})
    faults = SCENARIOS.get(rule)
    wrong = first_wrong(range(MOST_CASES), rules, faults=faults, num_traces=NUM_TRACES)
    assert wrong is not None


@pytest.mark.parametrize("rule", SCENARIOS)
def test_a_scenario_without_the_mistake_goes_well(rule: str) -> None:
    wrong = first_wrong(range(10), faults=SCENARIOS[rule], num_traces=NUM_TRACES)
    assert wrong is None


@pytest.mark.soak
@pytest.mark.parametrize("rule", ["committed_after_rename", "fenced_folders"])
def test_chance_finds_it_too(rule: str) -> None:
    assert first_wrong(range(SOAK_CASES), replace(ALL, **{rule: False})) is not None
