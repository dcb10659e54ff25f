"""Mistakes planted into the plans and exchanges of several trainers are seen, and what fails on one
rank ends all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.soon import ends_soon
from tests.train.test_trainers import (
    Trainer,
    curved_loss,
    make_batches,
    make_tables,
    train,
)

from bagpipe.cache.exchange_messages import RowMessages
from bagpipe.distributed.communicator import Moment
from bagpipe.errors import BackgroundError, ConfigError, PlanError
from bagpipe.optimizers import SGD
from bagpipe.oracle.ranks import RankPlanner
from bagpipe.types import Jagged


def clear(marks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as if no row had one of the two marks that say what is exchanged at once."""
    original = RankPlanner.__init__

    def init(self: RankPlanner, group: Any, planned: Any, **options: Any) -> None:
        getattr(planned, marks)[:] = False
        original(self, group, planned, **options)

    monkeypatch.setattr(RankPlanner, "__init__", init)


def send_all_replicas_overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    clear("was_used_before", monkeypatch)


def defer_all_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    clear("is_used_next", monkeypatch)


def drop_a_contribution(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RowMessages.sync

    def sync_all(self: RowMessages, step: Any, moment: Moment) -> None:
        if moment == "overlapped":
            for sums in step.sums.values():
                sums.values[:1] = 0.0
        original(self, step, moment)

    monkeypatch.setattr(RowMessages, "sync", sync_all)


ROOMY: dict[str, Any] = {"cache": [150, 50], "lookahead": 4}
"""Without urgent transfers, before which deferred gradients would be waited for."""


@pytest.mark.parametrize(
    "fault", [send_all_replicas_overlapped, defer_all_gradients, drop_a_contribution]
)
def test_a_planted_fault_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(14)

    def trained(num_trainers: int) -> list[np.ndarray]:
        # more would magnify
        return train(
            make_tables(), SGD(lr=0.05), batches, [(num_trainers, 14)], loss=curved_loss, **ROOMY
        )

    expected = trained(1)
    for one, other in zip(trained(3), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    fault(monkeypatch)
    assert any(
        np.abs(one - other).max() > 1e-3 for one, other in zip(trained(3), expected, strict=True)
    )


@pytest.mark.parametrize("fault", [send_all_replicas_overlapped, defer_all_gradients])
def test_a_planted_fault_is_found_by_the_check_of_plans_before_it_is_trained(
    fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(
        PlanError,
        match=r"step \d+, group \d .*, rank \d: .*gradients are applied"
        r"|, rank \d: .*behind the compute that updates its row",
    ):
        train(
            make_tables(),
            SGD(lr=0.05),
            make_batches(14),
            [(3, 14)],
            check=True,
            **ROOMY,
        )


def test_a_rank_that_fails_ends_the_others_with_an_error_that_says_what_they_waited_for() -> None:
    messages = {}

    def fail_in_step_5(trainer: Trainer, batches: Sequence[Jagged]) -> None:
        embeddings, stream = trainer.embeddings, trainer.stream(batches)
        rank = embeddings.peers.rank
        try:
            for step, loss in trainer.losses(stream):
                if rank == 1 and step == 5:
                    raise RuntimeError("rank 1 is broken")
                loss.backward()
        except BackgroundError as error:
            messages[rank] = str(error)
        finally:
            # nothing can be written back together any more
            embeddings.fail(RuntimeError("the test is over"))
            stream.close()

    with ends_soon(), pytest.raises(RuntimeError, match="rank 1 is broken"):
        train(
            make_tables(),
            SGD(lr=0.5),
            make_batches(14),
            [(2, 14)],
            loop=fail_in_step_5,
            cache=[200, 50],
            lookahead=3,
        )
    assert "rank 0: exchanging" in messages[0]
    assert "of step 5" in messages[0] or "of step 4" in messages[0] or "of step 6" in messages[0]


def test_too_many_replicas_are_refused_with_step_need_and_limit() -> None:
    options = {"cache": [200, 50], "replicas": 1, "lookahead": 3}
    with pytest.raises(
        ConfigError, match=r"step 0: rank \d needs \d+ rows of group \d .* has room for 1 replicas"
    ):
        train(make_tables(), SGD(lr=0.5), make_batches(5), [(2, 5)], **options)
