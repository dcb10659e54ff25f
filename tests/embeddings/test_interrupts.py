"""Ctrl-C in an own loop, at any moment of the library's work: it costs the step that it came in at
most, or the tables refuse all use; it never leaves other rows than those of so many steps.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import pytest
from tests.embeddings.interrupts import interrupted

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import UsageError
from bagpipe.optimizers import Adagrad
from bagpipe.types import Float32Array, Jagged, TableConfig

TABLES = [
    TableConfig(name="a", num_embeddings=60, embedding_dim=4, feature_names=["a"]),
    TableConfig(name="b", num_embeddings=30, embedding_dim=2, feature_names=["b"]),
]
NUM_BATCHES = 7
OPTIONS: dict[str, Any] = {
    "cache": [14, 12],
    "lookahead": 2,
    "prefetch_depth": 2,
    "dedup_threads": 1,
}
Records: TypeAlias = list[Float32Array]
Loop: TypeAlias = Callable[[EmbeddingBagCollection, Sequence[Jagged]], None]


def batches() -> list[Jagged]:
    rng = np.random.default_rng(3)
    return [
        Jagged(
            keys=("a", "b"),
            values=np.concatenate([rng.integers(0, 60, 8), rng.integers(0, 30, 8)]),
            batch_size=8,
        )
        for _ in range(NUM_BATCHES)
    ]


def make_embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=Adagrad(lr=0.5), seed=4)


def records_of(embeddings: EmbeddingBagCollection) -> Records:
    """All groups' weights and optimizer states, brought up to date."""
    embeddings.flush()
    found = []
    for group, store in zip(embeddings.groups, embeddings.stores, strict=True):
        out = np.empty((group.num_rows, group.record_width), np.float32)
        store.fetch(np.arange(group.num_rows), out)
        found.append(out)
    return found


def within_block(embeddings: EmbeddingBagCollection, rest: Sequence[Jagged]) -> None:
    with bagpipe.lookahead(rest, embeddings, **OPTIONS) as stream:
        for batch in stream:
            pooled = embeddings(batch)
            sum((group * group).sum() for group in pooled.groups).backward()


def with_flushes(embeddings: EmbeddingBagCollection, rest: Sequence[Jagged]) -> None:
    """Updates by hand, flushes, and drops the stream."""
    stream = bagpipe.lookahead(rest, embeddings, **OPTIONS)
    for batch in stream:
        pooled = embeddings.lookup(batch)
        embeddings.update([2 * group for group in pooled])
        if embeddings.step % 3 == 1:
            stream.flush()
        if embeddings.step % 3 == 2:
            embeddings.flush()


LOOPS = [within_block, with_flushes]


@cache
def expected_records() -> list[Records]:
    """After each number of steps."""
    embeddings = make_embeddings()
    found = [records_of(embeddings)]
    for batch in bagpipe.lookahead(batches(), embeddings, **OPTIONS):
        pooled = embeddings(batch)
        sum((group * group).sum() for group in pooled.groups).backward()
        found.append(records_of(embeddings))
    return found


def interrupt(loop: Loop, at: int | None, *, by_line: bool = False) -> tuple[str, str, int]:
    """Interrupts a loop and sees what is left: how it ended, where it was, and how many moments it
    had.
    """
    embeddings, expected, all_batches = make_embeddings(), expected_records(), batches()
    outcome = "interrupted"  # also where it comes as the last of the library's frames returns
    with contextlib.suppress(KeyboardInterrupt), interrupted(at, by_line=by_line) as moments:
        outcome = outcome_of(lambda: loop(embeddings, all_batches))
    place = f"moment {at}, {moments.place}"
    found: list[Records] = []
    if outcome_of(lambda: found.append(records_of(embeddings))) == "refused":
        outcome = "refused"
    else:
        check(embeddings, found[0], expected, all_batches, loop, place)
    outcome_of(embeddings.close)  # which says it once more, where it was refused
    return outcome, place, moments.num_seen


def outcome_of(call: Callable[[], object]) -> str:
    """How it ended: no other errors than these."""
    try:
        call()
    except KeyboardInterrupt:
        return "interrupted"
    except UsageError as error:
        if "interrupt" in str(error):
            return "refused"
        raise
    except RuntimeError as error:
        # what the standard library makes of one that comes while a thread starts
        if str(error) == "release unlocked lock":
            return "interrupted"
        raise
    return "finished"


def check(
    embeddings: EmbeddingBagCollection,
    found: Records,
    expected: list[Records],
    all_batches: Sequence[Jagged],
    loop: Loop,
    place: str,
) -> None:
    """Rows are those of so many steps, of which the last one may lack updates, and training goes
    on from there.
    """
    step = embeddings.step
    is_whole = True
    for index, records in enumerate(found):
        is_last = np.array_equal(records, expected[step][index])
        assert is_last or np.array_equal(records, expected[max(0, step - 1)][index]), place
        is_whole &= is_last
    loop(embeddings, all_batches[step:])
    if is_whole:
        for records, wanted in zip(records_of(embeddings), expected[-1], strict=True):
            assert np.array_equal(records, wanted), place


@pytest.mark.parametrize("loop", LOOPS)
def test_an_interrupt_costs_a_step_at_most_or_all_use_is_refused(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one that comes while an object is being dropped is told there, and lost
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    assert interrupt(loop, None)[0] == "finished"
    _, _, num_moments = interrupt(loop, None)
    outcomes = [
        interrupt(loop, at)[0] for at in sorted(random.Random(0).sample(range(num_moments), 60))
    ]
    assert outcomes.count("interrupted") > 30
