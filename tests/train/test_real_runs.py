"""Real data, prepared and trained end to end: a cache that must evict gives what one that holds
every row gives, bit for bit.

The folder is BAGPIPE_SHARED_DATA, or `shared/data` beside the repository; skipped where it is
absent, never read in CI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import newest_files, small_config

from bagpipe.config.load import check_config
from bagpipe.config.run import PrepareFile
from bagpipe.data.prepare import prepare
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train

DATA = Path(os.environ.get("BAGPIPE_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
CRITEO, MOVIELENS = DATA / "criteo_kaggle_head.tsv.gz", DATA / "ml100k_ctr.parquet"

pytestmark = [
    pytest.mark.skipif("CI" in os.environ, reason="real data are never used in CI"),
    pytest.mark.skipif(
        not DATA.is_dir(), reason=f"no real data at {DATA}; set BAGPIPE_SHARED_DATA to their folder"
    ),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "criteo": {
        "source": {"kind": "criteo", "files": [str(CRITEO)]},
        "vocabulary": {"kind": "dictionary", "min_count": 2},
    },
    "movielens": {
        "source": {
            "kind": "parquet",
            "files": [str(MOVIELENS)],
            "label": {"column": "rating", "at_least": 4.0},
            "dense": ["age"],
            "sparse": [
                {"column": "user_id"},
                {"column": "item_id"},
                {"column": "genres", "separator": " "},
            ],
            "time": "timestamp",
        },
        "vocabulary": {"kind": "dictionary"},
    },
}


@pytest.mark.parametrize(
    ("name", "num_steps", "small_cache"), [("criteo", 30, 2600), ("movielens", 100, 900)]
)
def test_cached_and_whole_tables_train_the_same(
    tmp_path: Path, name: str, num_steps: int, small_cache: int
) -> None:
    settings = {"prepare": SETTINGS[name] | {"output": str(tmp_path / "data")}}
    prepare(check_config(PrepareFile, settings, source="test").prepare)

    for size in (small_cache, 1_000_000):
        config = small_config(
            tmp_path / str(size),
            data={"kind": "prepared", "folder": str(tmp_path / "data")},
            cache={"size": size, "lookahead": 8, "check": True},
            train={"steps": num_steps, "batch_size": 256, "device": "cpu"},
        )
        result = train(config, reporter=SilentReporter())
        assert result.scores is not None
        assert result.scores["auc"] is not None
        assert result.scores["auc"] > 0.55
    assert newest_files(tmp_path / str(small_cache)) == newest_files(tmp_path / "1000000")
