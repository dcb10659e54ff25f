"""Where batches come from: prepared files, or a synthetic stream. Never imports torch.

What reads them is imported when a source is opened: serving, which opens none, loads no compiled
loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bagpipe.config.data import DataConfig, SyntheticData
    from bagpipe.data.base import BatchSource, Split
    from bagpipe.data.synthetic import SyntheticSource

__all__ = ["has_split", "open_source"]


def open_source(config: DataConfig, split: Split) -> BatchSource:
    """Opens a split of the data that the configuration names.

    Args:
        config: What the data are: prepared files or a synthetic stream.
        split: Which part of them; only training data are shuffled.

    Raises:
        DataError: The prepared files are missing or damaged.
    """
    if config.kind == "synthetic":
        return _open_synthetic(config, split)
    from bagpipe.data.prepared import PreparedSource

    return PreparedSource(
        config.folder,
        split,
        features=config.features,
        labels=config.labels,
        ignore_weights=config.ignore_weights,
        shuffle=config.shuffle and split == "train",
        seed=config.seed,
        verify=config.verify,
    )


def has_split(config: DataConfig, split: Split) -> bool:
    """Whether the data that the configuration names have samples of a split."""
    if config.kind == "synthetic":
        return split != "test" or config.num_test_samples > 0
    from bagpipe.data.manifest import PreparedManifest

    return PreparedManifest.load(config.folder).num_rows(split) > 0


def _open_synthetic(config: SyntheticData, split: Split) -> SyntheticSource:
    from bagpipe.data.criteo import CARDINALITIES
    from bagpipe.data.synthetic import SyntheticSource

    sizes = (
        CARDINALITIES[config.num_embeddings]
        if isinstance(config.num_embeddings, str)
        else config.num_embeddings
    )
    limit = config.max_num_embeddings
    lengths = {
        name: (length, length) if isinstance(length, int) else length
        for name, length in config.multi_hot.items()
    }
    num_samples = {
        "train": config.num_samples,
        "validation": config.num_validation_samples,
        "test": config.num_test_samples,
    }
    return SyntheticSource(
        [size if limit is None else min(size, limit) for size in sizes],
        split=split,
        num_samples=num_samples[split],
        num_dense=config.num_dense,
        skew=config.skew,
        bag_lengths=lengths,
        seed=config.seed,
    )
