"""Samples' weights, from a Parquet file to the scores of a saved run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.cli.test_cli import invoke
from tests.train.clicks import click_columns, click_config, prepare_clicks, write_clicks
from tests.train.ranks import run_ranks
from tests.train.runs import Listener, newest_files
from torch.nn.functional import binary_cross_entropy_with_logits

from bagpipe.checkpoint.dense import read_dense
from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.config.metrics import Metric
from bagpipe.data import open_source
from bagpipe.data.base import Batch
from bagpipe.data.check import check_batch
from bagpipe.errors import BagpipeError, CheckpointError, DataError
from bagpipe.train.evaluate import evaluate
from bagpipe.train.loop import Result
from bagpipe.train.metrics import BinaryScores
from bagpipe.train.objective import Objective
from bagpipe.train.saved import load_model, open_saved
from bagpipe.train.trainer import train
from bagpipe.types import Jagged

ALL = list(get_args(Metric))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared clicks that have weights."""
    folder = tmp_path_factory.mktemp("weighted")
    prepare_clicks(folder, click_columns(), weight="weight")
    return folder


def trained(folder: Path, log: Path, *, resume: bool = False, **sections: Any) -> Result:
    return train(click_config(folder, log, **sections), reporter=Listener(), resume=resume)


def test_batches_have_the_weights_of_their_rows(weighted: Path, tmp_path: Path) -> None:
    """Also in the order of an epoch, with other features, and in a share."""
    columns = click_columns()
    prices = columns["price"].astype(np.float32)
    of_rows = set(zip(prices.tolist(), columns["weight"].tolist(), strict=True))
    config = click_config(weighted, tmp_path, data={"shuffle": True, "features": ["item"]}).data
    found = set()
    for split in ("train", "validation"):
        source = open_source(config, split)
        assert source.has_weights
        for batch in source.batches(batch_size=24):
            assert batch.weights is not None
            found |= set(zip(batch.dense[:, 0].tolist(), batch.weights.tolist(), strict=True))
            shares = [batch.share(rank, 3).weights for rank in range(3)]
            np.testing.assert_array_equal(np.concatenate(shares), batch.weights)
    assert found == of_rows
    source = open_source(config.model_copy(update={"ignore_weights": True}), "train")
    assert not source.has_weights
    assert next(source.batches(batch_size=24)).weights is None


def test_a_sample_counts_by_its_weight_alone() -> None:
    """A batch of whole weights has the sum of the losses of one with each sample so often."""
    logits, labels = (
        torch.randn(6, dtype=torch.float64),
        torch.tensor([1.0, 0, 1, 1, 0, 0]).double(),
    )
    weights = torch.tensor([2.0, 0, 1, 3, 0, 1]).double()
    often = torch.repeat_interleave(torch.arange(6), weights.long())
    found = Objective().loss(logits.float(), labels.float(), weights.float())
    expected = binary_cross_entropy_with_logits(logits[often], labels[often], reduction="sum") / 6
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(Objective().loss(logits.float(), labels.float(), torch.zeros(6))) == 0.0


def test_weights_of_one_train_as_none_and_others_do_not(weighted: Path, tmp_path: Path) -> None:
    """To the bit, through the cache; and so does a run that ignores them."""
    columns = click_columns(weight=np.ones(400))
    prepare_clicks(tmp_path / "ones", columns, weight="weight")
    prepare_clicks(tmp_path / "none", columns)
    for name in ("ones", "none"):
        trained(tmp_path / name, tmp_path / name / "run")
    trained(weighted, tmp_path / "ignored", data={"ignore_weights": True})
    trained(weighted, tmp_path / "weighted")
    plain = newest_files(tmp_path / "none/run")
    assert newest_files(tmp_path / "ones/run") == plain
    assert newest_files(tmp_path / "ignored") == plain
    assert newest_files(tmp_path / "weighted") != plain


def test_rows_of_weight_zero_train_nothing(tmp_path: Path) -> None:
    """A batch without any other neither: the dense part stays as it is."""
    columns = click_columns(weight=np.arange(400) >= 200)
    prepare_clicks(tmp_path, columns, weight="weight")
    states = []
    for steps in (1, 3):
        train_options = {"steps": steps, "batch_size": 16}
        trained(tmp_path, tmp_path / f"run-{steps}", train=train_options)
        (checkpoint,) = list_checkpoints(tmp_path / f"run-{steps}/checkpoints")
        states.append(read_dense(checkpoint / "dense.pt")["model"])
    for name, values in states[0].items():
        assert torch.equal(values, states[1][name])


def test_a_run_with_weights_goes_on_to_the_bit(weighted: Path, tmp_path: Path) -> None:
    trained(weighted, tmp_path / "whole")
    trained(weighted, tmp_path / "halves", train={"steps": 11})
    trained(weighted, tmp_path / "halves", resume=True)
    assert newest_files(tmp_path / "halves") == newest_files(tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"data\.ignore_weights: False -> True"):
        trained(weighted, tmp_path / "halves", resume=True, data={"ignore_weights": True})


def scores_of(logits: Any, labels: Any, groups: Any, weights: Any, size: int) -> dict[str, Any]:
    scores = BinaryScores(get_args(Metric))
    for begin in range(0, len(logits), size):
        parts = [
            None if each is None else torch.from_numpy(each[begin : begin + size])
            for each in (logits, labels, groups, weights)
        ]
        scores.update(*parts)
    return scores.compute().as_dict()


def test_whole_weights_score_as_samples_that_come_so_often() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(-6, 6, 200).astype(np.float32) / 4  # with ties
    labels = (rng.random(200) < 0.4).astype(np.float32)
    groups, weights = rng.integers(0, 7, 200), rng.integers(0, 4, 200)
    often = np.repeat(np.arange(200), weights)
    found = scores_of(logits, labels, groups, weights.astype(np.float32), 33)
    expected = scores_of(logits[often], labels[often], groups[often], None, 50)
    expected["num_samples"] = 200
    assert found == pytest.approx(expected, rel=1e-6)  # torchmetrics' are float32
    nothing = scores_of(logits, labels, groups, np.zeros(200, np.float32), 33)
    assert nothing == {"num_samples": 200, **dict.fromkeys(ALL)}


def test_any_number_of_trainers_gives_the_same_weighted_scores(
    weighted: Path, tmp_path: Path
) -> None:
    trained(weighted, tmp_path)
    source = open_source(click_config(weighted, tmp_path).data, "validation")

    def scored(**peers: Any) -> Any:
        with load_model(open_saved(tmp_path)) as loaded:
            return evaluate(
                loaded.model,
                source,
                batch_size=16,
                device=loaded.device,
                precision="fp32",
                metrics=get_args(Metric),
                group_by="user",
                **peers,
            )

    expected = scored()
    assert None not in expected.values.values()
    assert run_ranks(2, lambda communicator: scored(peers=communicator)) == [expected, None]


def test_scores_of_a_saved_run_are_weighted(weighted: Path, tmp_path: Path) -> None:
    metrics = {"metrics": ["auc", "log_loss", "accuracy"]}
    listener = Listener()
    config = click_config(weighted, tmp_path / "run", train=metrics)
    result = train(config, reporter=listener)
    assert any("by the weights of column 'weight'" in text for text in listener.said)
    assert result.scores is not None
    told = invoke("eval", tmp_path / "run")
    assert told.exit_code == 0, told.output
    assert f"validation {result.scores}" in told.output
    alike = invoke("eval", tmp_path / "run", "--set", "data.ignore_weights=true")
    assert str(result.scores) not in alike.output
    # scores keep weights for longer than a stream does
    small = ["eval", tmp_path / "run", "--batch-size", 4]
    in_process = invoke(*small, "--set", "cache.oracle=process")
    assert in_process.output == invoke(*small).output

    # raw files: with the weights, and without
    columns = click_columns()
    write_clicks(tmp_path / "with.parquet", columns)
    write_clicks(tmp_path / "without.parquet", columns | {"weight": None})
    plain = ["--set", "data.ignore_weights=true"]
    outputs = [
        invoke("eval", tmp_path / "run", tmp_path / f"{name}.parquet", *options).output
        for name, options in (("with", []), ("with", plain), ("without", plain))
    ]
    facts = [output.partition("parquet ")[2] for output in outputs]
    assert facts[0] != facts[1] == facts[2] != ""
    refused = invoke("eval", tmp_path / "run", tmp_path / "without.parquet")
    assert refused.exit_code == 2
    assert "without.parquet: has no column 'weight', by whose weights" in refused.stderr
    assert "data.ignore_weights=true" in refused.stderr
    predicted = invoke(
        "predict", tmp_path / "run", tmp_path / "without.parquet", "-o", tmp_path / "s.parquet"
    )
    assert predicted.exit_code == 0, predicted.output
    shutil.copytree(weighted / "prepared", tmp_path / "other")  # prepared data, named
    other = invoke("eval", tmp_path / "run", tmp_path / "other")
    assert f"validation {result.scores}" in other.output


def changed(row: int, value: float | None) -> list[float | None]:
    weights: list[float | None] = click_columns()["weight"].tolist()
    weights[row] = value
    return weights


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (-0.5, r"weight column 'weight' is -0\.5, must be 0 or more"),
        (float("nan"), "weight column 'weight' is nan, must be finite in float32"),
        (1e39, r"weight column 'weight' is 1e\+39, must be finite in float32"),
        (None, "weight column 'weight' is missing"),
    ],
)
def test_a_weight_that_is_none_is_refused(tmp_path: Path, value: float | None, fact: str) -> None:
    columns = click_columns(weight=changed(7, value))
    with pytest.raises(DataError, match=rf"clicks\.parquet, row 7 \(from 0\): {fact}.*'skip'"):
        prepare_clicks(tmp_path, columns, weight="weight")
    assert not (tmp_path / "prepared/manifest.json").exists()


def test_data_that_can_not_be_weighted_are_refused(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        ({}, {"weight": "wait"}, DataError, "has no column 'wait'; its columns are clicked, "),
        ({"weight": ["a"] * 400}, {"weight": "weight"}, DataError, "must be a number"),
        ({"weight": np.zeros(400)}, {"weight": "weight"}, DataError, "all .* have the weight 0"),
        ({}, {"weight": "clicked"}, ValueError, "is the label, so it can't be the weight too"),
    ]
    for columns, source, kind, fact in refused:
        with pytest.raises(kind, match=fact):
            prepare_clicks(tmp_path, click_columns(**columns), **source)
        assert not (tmp_path / "prepared/manifest.json").exists()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_altered_weight_is_told_with_its_sample(weight: float) -> None:
    sparse = Jagged(keys=(), values=np.empty(0, np.int32), batch_size=3)
    batch = Batch(
        dense=np.zeros((3, 0), np.float32),
        sparse=sparse,
        labels=np.zeros(3, np.float32),
        weights=np.array([0, weight, 1], np.float32),
    )
    with pytest.raises(BagpipeError, match=f"batch 7: the weight of sample 1 is {weight}, must"):
        check_batch(batch, (), where="batch 7")
