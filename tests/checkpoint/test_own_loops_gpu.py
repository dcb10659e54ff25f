"""A user's own loop on a GPU is saved and resumed with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.checkpoint.own_loop import BATCHES, Loop, assert_equal, save_at

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
