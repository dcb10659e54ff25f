"""Small Parquet files of clicks, and runs on what is prepared of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.train.runs import small_config

from bagpipe.config.data import PrepareConfig
from bagpipe.config.run import RunConfig
from bagpipe.data.manifest import PreparedManifest
from bagpipe.data.prepare import prepare

NUM_ROWS = 400


def click_columns(**changed: Any) -> dict[str, Any]:
    """Clicks, buys and weights, of which half are 0, 1 or 2; `changed` replaces columns."""
    rng = np.random.default_rng(5)
    user, item = rng.integers(0, 40, NUM_ROWS), rng.integers(0, 90, NUM_ROWS)
    clicked = rng.random(NUM_ROWS) < (1 + user % 3) / 4
    return {
        "clicked": clicked,
        "bought": clicked & (item % 2 == 0),
        "weight": rng.integers(0, 3, NUM_ROWS) * rng.choice([1.0, 0.375], NUM_ROWS),
        "price": rng.random(NUM_ROWS),
        "user": user,
        "item": item,
        **changed,
    }


def write_clicks(path: Path, columns: dict[str, Any]) -> Path:
    """A Parquet file of these columns, but for those that are None."""
    kept = {name: values for name, values in columns.items() if values is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(kept), path)
    return path


def prepare_clicks(folder: Path, columns: dict[str, Any], **source: Any) -> PreparedManifest:
    """Prepares a file of these columns into `folder / "prepared"`."""
    file = write_clicks(folder / "clicks.parquet", columns)
    base = {
        "kind": "parquet",
        "files": [str(file)],
        "dense": ["price"],
        "sparse": [{"column": "user"}, {"column": "item"}],
        **source,
    }
    if "labels" not in source:
        base.setdefault("label", {"column": "clicked"})
    return prepare(
        PrepareConfig.model_validate(
            {
                "output": folder / "prepared",
                "source": base,
                "vocabulary": {"kind": "dictionary"},
                "split": {"by": "share", "validation_share": 0.3},
                "rows_per_batch": 16,
                "overwrite": True,
            }
        )
    )


def click_config(folder: Path, log: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run on what `prepare_clicks` has made in `folder`."""
    data = {"kind": "prepared", "folder": folder / "prepared", **sections.pop("data", {})}
    return small_config(log, data=data, **sections)
