"""Every example is a valid run."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagpipe.config.load import load_config
from bagpipe.config.run import RunConfig

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_valid(path: Path) -> None:
    config = load_config(RunConfig, path, [])
    assert config.log.folder == Path("runs") / config.log.folder.name
    assert (config.data.kind == "synthetic") == (config.prepare is None)
