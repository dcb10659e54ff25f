"""A user's own loop on a GPU is saved and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.checkpoint.own_loop import BATCHES, Loop, assert_equal, save_at

import bagpipe
import bagpipe.serving
from bagpipe.store import MemoryStore

pytestmark = pytest.mark.gpu


def test_a_resumed_loop_on_a_gpu_equals_an_undisturbed_one_to_the_bit(tmp_path: Path) -> None:
    undisturbed = Loop(device="cuda")
    undisturbed.train(BATCHES)
    loop = Loop(device="cuda")
    loop.train(BATCHES, save_at(loop, tmp_path, 7, 13))
    assert_equal(loop, undisturbed)
    resumed = Loop(device="cuda", store=MemoryStore)
    resumed.train(BATCHES[:3])  # is forgotten
    resumed.losses.clear()
    step = resumed.restore(tmp_path).step
    assert step == 13
    resumed.train(BATCHES[step:], cache=350)
    assert_equal(resumed, undisturbed)


def test_a_loop_on_a_gpu_is_exported_as_the_same_on_a_cpu(tmp_path: Path) -> None:
    loop, restored = Loop(device="cuda"), Loop()
    loop.train(BATCHES[:5], save_at(loop, tmp_path / "run", 5))
    restored.restore(tmp_path / "run")
    rows, scores = [{"f": number, "g": number} for number in range(50)], []
    for name, each in (("gpu", loop), ("cpu", restored)):
        folder = bagpipe.export(
            tmp_path / name,
            each.embeddings,
            model=each.model,
            forward=lambda model, dense, pooled: model["last"](
                torch.relu(model["hidden"](pooled.values()))
            ).squeeze(1),
            example=rows[:1],
            arrow=False,
        )
        scores.append(bagpipe.serving.load(folder).predict(rows))
    assert next(loop.model["last"].parameters()).is_cuda
    assert (scores[0] == scores[1]).all()
