"""From the features of a data set and the [embeddings] section to tables. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bagpipe.config.run import EmbeddingsConfig
from bagpipe.types import TableConfig

if TYPE_CHECKING:
    from bagpipe.data.base import FeatureSpec


def make_tables(features: Sequence[FeatureSpec], config: EmbeddingsConfig) -> list[TableConfig]:
    """One table for each that the features name, in order of first appearance."""
    names = list(dict.fromkeys(feature.table for feature in features))
    sizes = {feature.table: feature.num_embeddings for feature in features}
    return [
        TableConfig(
            name=name,
            num_embeddings=sizes[name],
            embedding_dim=config.embedding_dim,
            feature_names=[feature.name for feature in features if feature.table == name],
            pooling=config.pooling,
            data_type=config.data_type,
            init=config.init.build() if config.init is not None else None,
        )
        for name in names
    ]
