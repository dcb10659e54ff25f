"""Plain re-implementations that the data tests compare against, and makers of small raw files."""

from __future__ import annotations

import gzip
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MASK = 2**64 - 1


def mix64(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hash_id(key: int, num_embeddings: int) -> int:
    return mix64(key) % num_embeddings


def criteo_key(text: str) -> int:
    return int(text, 16) if text else -(2**63)


def log_dense(text: str) -> float:
    return math.log(max(int(text or 0), 0) + 1)


def frequency_ids(keys: Sequence[Any], min_count: int, order: Any = None) -> dict[Any, int]:
    """Ids from 1 by falling count, ties by ascending key (or `order`)."""
    counts = [(key, count) for key, count in Counter(keys).items() if count >= min_count]
    counts.sort(key=lambda item: (-item[1], order(item[0]) if order else item[0]))
    return {key: index + 1 for index, (key, _) in enumerate(counts)}


def criteo_line(seed: int) -> str:
    """A well-formed line, with some values missing and some negative."""
    rng = random.Random(seed)
    dense = ["" if rng.random() < 0.2 else str(rng.randrange(-3, 3000)) for _ in range(13)]
    sparse = ["" if rng.random() < 0.1 else f"{rng.randrange(50):08x}" for _ in range(26)]
    return "\t".join([str(rng.randrange(2)), *dense, *sparse])


def write_criteo(path: Path, lines: Sequence[str], *, end: str = "\n", last: str = "\n") -> Path:
    data = (end.join(lines) + last).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
