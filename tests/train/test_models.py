"""Every kind of model: through the cache it equals whole tables in memory bit for bit; it resumes,
and not as another kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.reference import InMemoryTables
from tests.train.runs import NUM_STEPS, newest_files, small_config

import bagpipe
from bagpipe.config.run import RunConfig
from bagpipe.errors import CheckpointError
from bagpipe.models import DeepFM
from bagpipe.store import MemoryStore
from bagpipe.train.build import Run, build_run
from bagpipe.train.report import SilentReporter
from bagpipe.train.torch_batch import TorchBatch
from bagpipe.train.trainer import train

SECTIONS: dict[str, dict[str, Any]] = {
    "dlrm": {"kind": "dlrm", "bottom": [8, 4], "top": [8, 1]},
    "dcn": {"kind": "dcn", "bottom": [8, 4], "top": [8, 1], "num_cross_layers": 2, "cross_rank": 3},
    "wide_deep": {"kind": "wide_deep", "top": [8, 1]},
    "deepfm": {"kind": "deepfm", "top": [8, 1]},
}


def weights_of(run: Run) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in run.model.parameters()]


def train_cached(config: RunConfig) -> tuple[list[float], list[np.ndarray], np.ndarray]:
    """Losses, dense parameters and records."""
    losses = []
    with build_run(config) as run:
        batches = map(TorchBatch.of, run.source.batches(batch_size=32))
        with bagpipe.lookahead(
            batches, run.embeddings, cache=120, sparse=lambda batch: batch.sparse, check=True
        ) as stream:
            for batch in stream:
                run.embeddings.lookup(batch.sparse, out=run.dense_step.pooled(batch.batch_size))
                loss, grads = run.dense_step(batch.dense, batch.labels)
                run.embeddings.update(grads)
                losses.append(float(loss))
        return losses, weights_of(run), all_records(run.embeddings.stores[0])


def train_in_memory(config: RunConfig) -> tuple[list[float], list[np.ndarray], np.ndarray]:
    losses = []
    with build_run(config) as run:
        (group,) = run.embeddings.groups
        tables = InMemoryTables(group, all_records(MemoryStore(group, config.train.seed)))
        for batch in map(TorchBatch.of, run.source.batches(batch_size=32)):
            run.dense_step.pooled(batch.batch_size)[0].copy_(
                torch.from_numpy(tables.lookup(batch.sparse))
            )
            loss, (grads,) = run.dense_step(batch.dense, batch.labels)
            tables.update(batch.sparse, grads.numpy())
            losses.append(float(loss))
        return losses, weights_of(run), tables.records()


def all_records(store: Any) -> np.ndarray:
    records = np.empty((store.group.num_rows, store.group.record_width), np.float32)
    store.fetch(np.arange(store.group.num_rows), records)
    return records


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_model_trained_through_the_cache_equals_one_with_whole_tables(
    tmp_path: Path, kind: str
) -> None:
    config = small_config(tmp_path, model=SECTIONS[kind])
    losses, parameters, records = train_cached(config)
    expected_losses, expected_parameters, expected_records = train_in_memory(config)
    assert losses == expected_losses
    for one, other in zip(parameters, expected_parameters, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(records, expected_records)


@pytest.mark.parametrize("kind", ["dcn", "wide_deep", "deepfm"])
def test_a_run_learns_and_resumes_to_the_same_bits(tmp_path: Path, kind: str) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = train(small_config(whole, model=SECTIONS[kind]), reporter=SilentReporter())
    assert result.scores is not None
    train(
        small_config(halves, model=SECTIONS[kind], train={"steps": 13}), reporter=SilentReporter()
    )
    train(
        small_config(halves, model=SECTIONS[kind], train={"steps": NUM_STEPS}),
        reporter=SilentReporter(),
        resume=True,
    )
    assert newest_files(whole) == newest_files(halves)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    train(
        small_config(tmp_path, model=SECTIONS["wide_deep"], train={"steps": 2}),
        reporter=SilentReporter(),
    )
    with pytest.raises(
        CheckpointError, match=r"another configuration(.|\n)*model.kind: 'wide_deep' -> 'deepfm'"
    ):
        train(
            small_config(tmp_path, model=SECTIONS["deepfm"]), reporter=SilentReporter(), resume=True
        )


def test_small_tables_do_not_drown_the_rest_of_deepfm(tmp_path: Path) -> None:
    data = {"num_embeddings": [4] * 26, "num_dense": 0}
    config = small_config(
        tmp_path, data=data, model=SECTIONS["deepfm"], embeddings={"embedding_dim": 16}
    )
    with build_run(config) as run, torch.no_grad():
        model = run.model.eval()
        assert isinstance(model, DeepFM)
        batch = TorchBatch.of(next(iter(run.source.batches(batch_size=400))))
        vectors, _ = model._split(model.embeddings(batch.sparse).values())
        second_order = model.factorization_machine(vectors)
    assert second_order.abs().max() < 0.1  # the MLP's part of a logit is about 1
