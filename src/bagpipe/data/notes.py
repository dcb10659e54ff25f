"""What a person should know about prepared data, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from bagpipe.data.manifest import PreparedManifest
from bagpipe.data.observed import STRETCH_ROWS

if TYPE_CHECKING:
    from bagpipe.config.data import DataConfig

_LEAST_UNSEEN: Final = 0.01
_LEAST_CLUSTERING: Final = 0.05
_MOST_NAMES: Final = 8


def prepare_notes(manifest: PreparedManifest) -> list[str]:
    """What is said to whoever has prepared the data."""
    return [*_clipped(manifest), *_unseen(manifest), *_clustered(manifest)]


def run_notes(config: DataConfig) -> list[str]:
    """What is said to whoever trains with the data or inspects them.

    There is nothing to say about synthetic data.

    Raises:
        DataError: The prepared data are not there.
    """
    if config.kind != "prepared":
        return []
    manifest = PreparedManifest.load(config.folder)
    return [
        *_several_labels(manifest, config.labels),
        *_weighted(manifest, ignored=config.ignore_weights),
        *_unseen(manifest, config.features),
        *(() if config.shuffle else _clustered(manifest)),
    ]


def _several_labels(manifest: PreparedManifest, chosen: Sequence[str] | None) -> Iterator[str]:
    """On what is learned of data with several labels."""
    names = [label.name for label in manifest.all_labels]
    if len(names) > 1:
        yield f"labels: {', '.join(chosen or names)}"


def _weighted(manifest: PreparedManifest, *, ignored: bool) -> Iterator[str]:
    """On samples that count by weights."""
    if manifest.weight is not None and not ignored:
        yield f"samples count by the weights of column {manifest.weight!r}, in losses and scores"


def _unseen(manifest: PreparedManifest, features: Sequence[str] | None = None) -> Iterator[str]:
    """On validation's lookups of values that training does not have."""
    shares = {
        name: entry.share
        for name, entry in manifest.unseen.items()
        if features is None or name in features
    }
    told = {name: share for name, share in shares.items() if share and share >= _LEAST_UNSEEN}
    unknown = [name for name, share in shares.items() if share is None]
    if manifest.vocabulary == "dictionary":
        what, written = "that training never has, or too rarely for a row of their own", "{:.2%}"
    else:
        what = "that training does not have (estimated by the hashed rows that it leaves unused)"
        written = "about {:.0%}"
    if told:
        ranked = sorted(told, key=lambda name: -told[name])
        shown = _names([f"{name} {written.format(told[name])}" for name in ranked])
        yield f"validation looks up values {what}: of the lookups {shown}"
    if unknown:
        yield (
            f"how many values of validation training does not have is not known for "
            f"{_names(unknown)}: it uses nearly all rows that these are hashed to"
        )


def _clustered(manifest: PreparedManifest) -> Iterator[str]:
    """On training rows that lie sorted or grouped by label."""
    share = manifest.label_clustering
    if share is not None and share >= _LEAST_CLUSTERING:
        yield (
            f"training rows lie grouped by label ({share:.0%} of its variance is between stretches "
            f"of {STRETCH_ROWS:,} rows): set data.shuffle = true, so that batches are alike"
        )


def _clipped(manifest: PreparedManifest) -> Iterator[str]:
    num_rows = sum(manifest.num_rows(split) for split in manifest.splits)
    counts = manifest.num_clipped
    if counts:
        ranked = sorted(counts, key=lambda name: -counts[name])
        told = _names(
            [f"{name} {counts[name]:,} ({counts[name] / num_rows:.1%})" for name in ranked]
        )
        yield f"dense_transform = 'log' has made 0 of values below 0: {told}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
