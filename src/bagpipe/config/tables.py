"""Makes tables from the features of a data set and a run's configuration, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bagpipe.config.run import RunConfig
from bagpipe.types import TableConfig

if TYPE_CHECKING:
    from bagpipe.data.base import FeatureSpec


def make_tables(features: Sequence[FeatureSpec], config: RunConfig) -> list[TableConfig]:
    """Makes every table that the features name, in the order in which they first appear."""
    names = list(dict.fromkeys(feature.table for feature in features))
    sizes = {feature.table: feature.num_embeddings for feature in features}
    init = config.table_init
    return [
        TableConfig(
            name=name,
            num_embeddings=sizes[name],
            embedding_dim=config.embeddings.embedding_dim,
            feature_names=[feature.name for feature in features if feature.table == name],
            pooling=config.embeddings.pooling,
            data_type=config.embeddings.data_type,
            init=init.build() if init is not None else None,
        )
        for name in names
    ]
