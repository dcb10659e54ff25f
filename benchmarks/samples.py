"""Samples of public data sets as prepared data, for comparing models on them.

The files are not part of the project; see `SAMPLES` for their names and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bagpipe.config.load import check_config
from bagpipe.config.run import PrepareFile
from bagpipe.data.prepare import prepare
from bagpipe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A file of rows with clicks, and what is read of it."""

    file: str
    source: Mapping[str, Any]
    """The section `prepare.source`, without its files."""
    batch_size: int
    dense_transform: str = "none"
    make: Callable[[Path, Path], None] | None = None
    """Writes the file that is prepared, from the one that there is; None: that one is prepared."""

    @property
    def has_dense(self) -> bool:
        """Whether a row has numbers, which DLRM and DCN need."""
        return self.source["kind"] == "criteo" or bool(self.source["dense"])


def _parquet(label: str, dense: Sequence[str], sparse: Sequence[str | dict[str, str]]) -> Any:
    columns = [{"column": each} if isinstance(each, str) else each for each in sparse]
    return {"kind": "parquet", "label": {"column": label}, "dense": dense, "sparse": columns}


def add_negatives(there: Path, to: Path) -> None:
    """Adds to each pair of a user and an item one of this user and an item drawn by chance.

    Every tenth user is taken. Pairs that are drawn and that the user has are left out.
    """
    table = pq.read_table(there, columns=["user_id", "item_id"])
    users, items = (table[name].to_numpy().astype(np.int64) for name in table.column_names)
    users, items = users[users % 10 == 0], items[users % 10 == 0]
    drawn = np.random.default_rng(0).choice(np.unique(items), len(items))
    key = items.max() + 1
    is_new = ~np.isin(users * key + drawn, users * key + items)
    columns = {
        "user_id": np.concatenate([users, users[is_new]]),
        "item_id": np.concatenate([items, drawn[is_new]]),
        "visited": np.concatenate([np.ones_like(users), np.zeros_like(users[is_new])]),
    }
    pq.write_table(pa.table(columns), to)


SAMPLES: Mapping[str, Sample] = {
    "criteo": Sample(
        file="criteo_kaggle_head.tsv.gz",
        source={"kind": "criteo"},
        dense_transform="log",
        batch_size=128,
    ),
    "avazu": Sample(
        file="avazu_head.parquet",
        source=_parquet(
            "click",
            ["C15", "C16"],
            [
                *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id"),
                *("app_domain", "app_category", "device_id", "device_ip", "device_model"),
                *("device_type", "device_conn_type", "C14", "C17", "C18", "C19", "C20", "C21"),
            ],
        ),
        dense_transform="log",
        batch_size=128,
    ),
    "movielens": Sample(
        file="ml100k_ctr.parquet",
        source=_parquet("label", ["age"], ["user_id", "item_id", "occupation", "gender"]),
        dense_transform="log",
        batch_size=512,
    ),
    "open bandit": Sample(
        file="obd_zozo_60k.parquet",
        source=_parquet(
            "click",
            ["affinity_of_shown_item", "item_feature_0"],
            [
                *("item_id", "position", "item_feature_1", "item_feature_2", "item_feature_3"),
                *("user_feature_0", "user_feature_1", "user_feature_2", "user_feature_3"),
            ],
        ),
        batch_size=512,
    ),
    "gowalla": Sample(
        file="gowalla_interactions.parquet",
        source=_parquet("visited", [], ["user_id", "item_id"]),
        batch_size=512,
        make=add_negatives,
    ),
}


def prepare_sample(name: str, data: Path, folder: Path) -> None:
    """Prepares a sample: dictionaries, and a fifth of the rows held out, whichever they are.

    Args:
        name: of `SAMPLES`.
        data: the folder with its file.
        folder: what is made.

    Raises:
        ConfigError: the file is not there.
    """
    sample = SAMPLES[name]
    path = data / sample.file
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file: --data names the folder of the samples")
    if sample.make is not None:
        made = folder.with_suffix(".parquet")
        sample.make(path, made)
        path = made
    settings = {
        "prepare": {
            "output": str(folder),
            "source": {**sample.source, "files": [str(path)]},
            "vocabulary": {"kind": "dictionary", "min_count": 2},
            "split": {"by": "share", "validation_share": 0.2},
            "dense_transform": sample.dense_transform,
        }
    }
    prepare(check_config(PrepareFile, settings, source=f"the sample {name}").prepare)
