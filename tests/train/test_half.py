"""A run whose tables have 16 bits: resumed, or with another cache, it ends with the same bits;
another type is another run.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.train.runs import NUM_STEPS, newest_files, small_config

from bagpipe.errors import CheckpointError
from bagpipe.train.report import SilentReporter
from bagpipe.train.trainer import train


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("data_type", ["bf16", "fp16"])
def test_a_resumed_run_ends_like_one_that_nothing_happened_to(
    tmp_path: Path, data_type: str, device: str
) -> None:
    narrow, settings = {"data_type": data_type}, {"device": device}
    result = train(
        small_config(tmp_path / "undisturbed", embeddings=narrow, train=settings),
        reporter=SilentReporter(),
    )
    assert result.scores is not None
    train(
        small_config(tmp_path / "resumed", embeddings=narrow, train=settings | {"steps": 13}),
        reporter=SilentReporter(),
    )
    train(
        small_config(
            tmp_path / "resumed",
            embeddings=narrow,
            train=settings | {"steps": NUM_STEPS},
            cache={"size": 400, "lookahead": 2},
        ),
        reporter=SilentReporter(),
        resume=True,
    )
    assert newest_files(tmp_path / "resumed") == newest_files(tmp_path / "undisturbed")


def test_a_checkpoint_of_another_type_is_refused(tmp_path: Path) -> None:
    train(small_config(tmp_path, train={"steps": 3}), reporter=SilentReporter())
    with pytest.raises(CheckpointError, match=r"embeddings\.data_type: 'fp32' -> 'bf16'"):
        train(
            small_config(tmp_path, embeddings={"data_type": "bf16"}),
            reporter=SilentReporter(),
            resume=True,
        )
