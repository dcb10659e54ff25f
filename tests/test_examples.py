"""The examples within other frameworks run as they stand there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.soon import SOON_S

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("example", "package"),
    [("own_loop_lightning.py", "pytorch_lightning"), ("own_loop_accelerate.py", "accelerate")],
)
def test_a_run_that_is_stopped_within_a_framework_goes_on_to_the_same_bits(
    example: str, package: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    ended = subprocess.run(
        [sys.executable, EXAMPLES / example],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("30 steps, stopped after 17: the same to the bit\n")
