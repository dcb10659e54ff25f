"""Each rule of the protocol is needed: without it the model finds a run that differs."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from tests.model.cases import first_wrong
from tests.model.rules import ALL, Rules

MOST_CASES = 600
RARE = {"cuts_by_name"}
NUM_TRACES = 10


@pytest.mark.parametrize("rule", [field.name for field in fields(Rules) if field.name not in RARE])
def test_a_planted_mistake_is_found(rule: str) -> None:
    rules = replace(ALL, **{rule: False})
    assert first_wrong(range(MOST_CASES), rules, num_traces=NUM_TRACES) is not None
