"""Which keys a run may change when it resumes, and which would change its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_FREE = (
    "cache",
    "log",
    "checkpoint",
    "prepare",
    "data.folder",  # where prepared data are; what they are is told apart by their checksums
    "data.verify",
    "embeddings.store",
    "train.epochs",
    "train.steps",
    "train.eval_every_steps",
    "train.eval_batch_size",
    "train.best",
    "train.metrics",
    "train.group_by",
    "data.num_test_samples",
)
"""Keys, or whole sections, that leave every trained number as it is, to the last bit."""
_ROUNDING = ("train.device", "train.dense")
"""Keys that change numbers by rounding at most."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One key that two configurations set differently; None where one leaves it out."""

    key: str
    old: object
    new: object

    @property
    def matters(self) -> bool:
        """Whether a resumed run would end in the numbers of neither configuration."""
        return not self.is_within(_FREE + _ROUNDING)

    def is_within(self, sections: tuple[str, ...]) -> bool:
        """Whether it is one of these keys, or lies in one of these sections."""
        return any(
            self.key == section or self.key.startswith(f"{section}.") for section in sections
        )

    def __str__(self) -> str:
        note = " (the last bits of the results may differ)" if self.is_within(_ROUNDING) else ""
        return f"{self.key}: {self.old!r} -> {self.new!r}{note}"


def compare_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Finds every key in which two configurations differ.

    Args:
        old: The earlier configuration, as nested mappings.
        new: The later one.

    Returns:
        The differences, sorted by key. A key that one of them lacks, as a version before the key
        was there does, is as one that is off: none, false, zero or empty.
    """
    old_keys, new_keys = dict(_flatten(old)), dict(_flatten(new))
    keys = sorted(old_keys.keys() | new_keys.keys())
    return tuple(
        Difference(key=key, old=old_keys.get(key), new=new_keys.get(key))
        for key in keys
        if not _is_same(key, old_keys, new_keys)
    )


def _is_same(key: str, old: Mapping[str, object], new: Mapping[str, object]) -> bool:
    if key in old and key in new:
        return old[key] == new[key]
    return not (old.get(key) or new.get(key))


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
