"""The door to numba: what is compiled is what the sources say, whichever of them has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NUMBERS = "from bagpipe._jit import jit, inline_jit\nLIMIT = {limit}\n"
INNER = (
    "from numbers_of import LIMIT\nfrom bagpipe._jit import jit\n"
    "@jit\ndef inner(x):\n    return x + {added} + LIMIT\n"
)
OUTER = """
from bagpipe._jit import jit
from inner_of import inner

@jit
def outer(x):
    return _helper(x)

@jit
def _helper(x):
    return inner(x)

if __name__ == "__main__":
    print(outer(1), sum(outer.stats.cache_hits.values()))
"""


def run(folder: Path, *, added: int = 1, limit: int = 10) -> str:
    """What the program prints; its files always have the same size and age."""
    files = {
        "numbers_of.py": NUMBERS.format(limit=limit),
        "inner_of.py": INNER.format(added=added),
        "outer_of.py": OUTER,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
        os.utime(folder / name, (1_700_000_000, 1_700_000_000))
    return subprocess.run(
        [sys.executable, "outer_of.py"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(folder / "cache"),
        },
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.mark.parametrize(
    ("change", "expected"), [({"added": 2}, "13 0"), ({"limit": 20}, "22 0"), ({}, "12 1")]
)
def test_a_change_in_another_file_compiles_its_callers_anew(
    tmp_path: Path, change: dict[str, int], expected: str
) -> None:
    assert run(tmp_path) == "12 0"
    assert run(tmp_path, **change) == expected
