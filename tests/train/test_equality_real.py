"""Real data against whole tables in memory, bit for bit: raw Criteo, and MovieLens with its
multi-valued genres.

Where the data are looked for, and when these tests are skipped, stands in `test_real_runs`.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from tests.train import test_real_runs as real
from tests.train.equality import check_equal

from bagpipe.config.load import check_config
from bagpipe.config.run import PrepareFile
from bagpipe.data.prepare import prepare
from bagpipe.data.prepared import PreparedSource
from bagpipe.optimizers import RowWiseAdagrad
from bagpipe.types import TableConfig

pytestmark = real.pytestmark


@pytest.mark.parametrize("name", ["criteo", "movielens"])
def test_cached_training_equals_whole_tables_in_memory(name: str, tmp_path: Path) -> None:
    settings = {"prepare": real.SETTINGS[name] | {"output": str(tmp_path / "data")}}
    prepare(check_config(PrepareFile, settings, source="test").prepare)
    source = PreparedSource(tmp_path / "data", "train")
    tables = [
        TableConfig(
            name=feature.table,
            num_embeddings=feature.num_embeddings,
            embedding_dim=8,
            feature_names=[feature.name],
        )
        for feature in source.features
    ]
    batches = [batch.sparse for batch in islice(source.batches(batch_size=128), 25)]
    check_equal(
        tables, RowWiseAdagrad(lr=0.1), batches, extra_slots=100, restarts=[10], lookahead=6
    )
