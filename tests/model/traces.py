"""What is trained: batches and their real plans, and what an undisturbed run has at each step."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
from tests.oracle.rank_replay import plan_all, smallest_cache

from bagpipe.jagged import Jagged
from bagpipe.optimizers import SGD
from bagpipe.plan import StepPlan
from bagpipe.topology import shard_of
from bagpipe.types import Group, TableConfig, Uniform, group_tables

NUM_ROWS = 96  # six lines of neighbours, which shards are made of
INITIAL = 1_000_000
MAX_RANKS = 4
MAX_SHARDS = 3
MAX_DELTA = 997  # values stay below 2**24, so that a float32 holds each
GROUP: Group = group_tables(
    [
        TableConfig(
            name="t",
            num_embeddings=NUM_ROWS,
            embedding_dim=1,
            feature_names=["f"],
            init=Uniform(low=INITIAL, high=INITIAL),
        )
    ],
    SGD(lr=1.0),
)[0]

SHARDS = [
    [int(shard_of(row, num_shards)) if num_shards else 0 for row in range(NUM_ROWS)]
    for num_shards in range(MAX_SHARDS + 1)
]
"""By number of shards the shard of each row."""


class Trace:
    """Batches of one table for some ranks."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.num_ranks = rng.choice((1, 2, 2, 3, 4))
        self.num_steps = rng.randint(8, 16)
        self.depth = rng.randint(0, 3)
        batch_size = rng.randint(MAX_RANKS, 12)
        hot = rng.choice((8, 20, NUM_ROWS))
        ids = [
            [
                rng.randrange(hot) * (NUM_ROWS // hot) if rng.random() < 0.8
                else rng.randrange(NUM_ROWS)
                for _ in range(batch_size)
            ]
            for _ in range(self.num_steps)
        ]  # fmt: skip
        self._rows = [sorted(set(batch)) for batch in ids]
        self._batches = [
            Jagged(keys=("f",), values=np.array(batch, np.int64), batch_size=batch_size)
            for batch in ids
        ]
        self._roominess = rng.choice((0.0, 0.2, 1.0, 3.0))
        self._lookahead = rng.randint(1, 6)
        self._plans: dict[tuple[int, int], list[tuple[StepPlan, ...]]] = {}

    def rows(self, step: int) -> list[int]:
        return self._rows[step]

    def plans_from(self, step: int, num_ranks: int) -> list[tuple[StepPlan, ...]]:
        """The plans of all ranks by the real oracle, started at a step."""
        key = step, num_ranks
        if key not in self._plans:
            fewest = smallest_cache(GROUP, self._batches, num_ranks)
            planned = plan_all(
                GROUP,
                self._batches[step:],
                num_ranks,
                fewest + round(fewest * self._roominess),
                lookahead=self._lookahead,
                depth=self.depth,
                first_step=step,
            )
            self._plans[key] = planned.plans
        return self._plans[key]


@cache
def trace(seed: int) -> Trace:
    return Trace(seed)


class Run:
    """A trace trained undisturbed: records are integers, sums of what every step adds."""

    def __init__(self, of: Trace, number: int) -> None:
        """Runs of other numbers add other values."""
        self.trace, self.number = of, number
        self._values: list[dict[int, int]] = [{}]
        self.denses = [0]  # before each step: the sum of all that was looked up
        for step in range(of.num_steps):
            before = self._values[-1]
            found = {row: before.get(row, INITIAL) for row in of.rows(step)}
            self.denses.append(self.denses[-1] + sum(found.values()))
            self._values.append(
                before | {row: value + self.delta(step, row) for row, value in found.items()}
            )

    def delta(self, step: int, row: int) -> int:
        """What a step adds to a row."""
        return 1 + (step * 7919 + row * 104729 + self.number * 15485863) % MAX_DELTA

    def value(self, step: int, row: int) -> int:
        """A row's before a step."""
        return self._values[step].get(row, INITIAL)


@cache
def run_of(seed: int, number: int) -> Run:
    return Run(trace(seed), number)
