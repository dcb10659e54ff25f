"""hypothesis strategies for groups and traces of batches, small enough to find the corner cases
quickly.
"""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from bagpipe.optimizers import SGD, Optimizer
from bagpipe.types import Group, Jagged, TableConfig, group_tables


def examples(number: int) -> int:
    """How many examples a test tries: `number` in `make test`, ten times as many in `make soak`."""
    return number * settings.default.max_examples // 100


@st.composite
def table_lists(draw: st.DrawFn, max_dims: int = 1) -> list[TableConfig]:
    """One to three tables with one or two features each, of up to `max_dims` different
    dimensions.
    """
    dims = draw(st.lists(st.integers(1, 9), min_size=max_dims, max_size=max_dims))
    tables = []
    for index in range(draw(st.integers(1, 3))):
        tables.append(
            TableConfig(
                name=f"t{index}",
                num_embeddings=draw(st.sampled_from([1, 2, 5, 30])),
                embedding_dim=draw(st.sampled_from(dims)),
                feature_names=[
                    f"t{index}_f{feature}" for feature in range(draw(st.integers(1, 2)))
                ],
                pooling=draw(st.sampled_from(["sum", "mean"])),
            )
        )
    return tables


@st.composite
def traces(draw: st.DrawFn, tables: list[TableConfig], max_steps: int = 25) -> list[Jagged]:
    """Batches over all features of `tables`, keys in an order of their own; single-hot or jagged
    with empty and long bags.

    With per-sample weights now and then, where no table pools by mean.
    """
    features = {feature: table for table in tables for feature in table.feature_names}
    keys = tuple(draw(st.permutations(sorted(features))))
    is_jagged = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    skew = draw(st.sampled_from([1.0, 3.0]))
    is_weighted = draw(st.booleans()) and all(table.pooling == "sum" for table in tables)
    batches = []
    for _ in range(draw(st.integers(1, max_steps))):
        batch_size = draw(st.integers(1, 6))
        lengths = (
            rng.integers(0, 4, (len(keys), batch_size))
            if is_jagged
            else np.ones((len(keys), batch_size), np.int64)
        )
        values = [
            (features[key].num_embeddings * rng.random(int(lengths[index].sum())) ** skew).astype(
                np.int64
            )
            for index, key in enumerate(keys)
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths)]) if is_jagged else None
        ids = np.concatenate(values)
        weights = (
            rng.choice([0.0, 1.0, -0.3, 2.7], len(ids)).astype(np.float32) if is_weighted else None
        )
        batches.append(
            Jagged(keys=keys, values=ids, batch_size=batch_size, offsets=offsets, weights=weights)
        )
    return batches


@st.composite
def group_traces(draw: st.DrawFn, optimizer: Optimizer | None = None) -> tuple[Group, list[Jagged]]:
    """One group and a trace of batches for it."""
    tables = draw(table_lists())
    (group,) = group_tables(tables, optimizer or SGD(lr=0.1))
    return group, draw(traces(tables))
