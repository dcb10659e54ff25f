"""`bagpipe.collate`: makes batches of samples that are dicts, in a DataLoader's workers too.

loader = DataLoader(samples, batch_size=1024, collate_fn=bagpipe.collate(["item", "genres"]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate

from bagpipe.errors import ConfigError, DataError
from bagpipe.types import Jagged

_SPARSE = "sparse"


@dataclass(frozen=True)
class Collate:
    """What `collate` returns: a DataLoader's `collate_fn`, which can be pickled."""

    features: tuple[str, ...]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The samples' features as a `Jagged` under "sparse", all else as torch collates it.

        Raises:
            DataError: a sample is no dict, or lacks a feature, or has something else as "sparse".
        """
        for sample in samples:
            self._check(sample)
        others = [
            {name: value for name, value in sample.items() if name not in self.features}
            for sample in samples
        ]
        sparse = Jagged.from_dict(
            {name: [sample[name] for sample in samples] for name in self.features}
        )
        return {**default_collate(others), _SPARSE: sparse}

    def _check(self, sample: object) -> None:
        if not isinstance(sample, Mapping):
            raise DataError(
                f"bagpipe.collate was given a sample of type {type(sample).__name__}, must be a "
                "dict: feature -> an id or a list of ids, and the rest by name"
            )
        missing = [name for name in self.features if name not in sample]
        if missing:
            raise DataError(
                f"a sample has no feature {missing[0]!r}; it has {', '.join(map(str, sample))}"
            )
        if _SPARSE in sample and _SPARSE not in self.features:
            raise DataError(
                f"a sample has an entry {_SPARSE!r}, where bagpipe.collate puts the features: "
                "give it another name"
            )


def collate(features: Sequence[str]) -> Collate:
    """A `collate_fn` for samples that are dicts.

    A batch is a dict again: under "sparse" is the `Jagged` that `bagpipe.lookahead` looks for.

    Args:
        features: which entries of a sample are features: an id, or a list or array of ids.

    Raises:
        ConfigError: there are none, or it is no list of names.
    """
    if isinstance(features, str) or not features:
        raise ConfigError(f"bagpipe.collate takes a list of features, was given {features!r}")
    return Collate(tuple(features))
