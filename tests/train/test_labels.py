"""Several labels, from a Parquet file to a served model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.cli.test_cli import invoke
from tests.train.clicks import click_columns, click_config, prepare_clicks, write_clicks
from tests.train.ranks import run_ranks
from tests.train.runs import Listener, newest_files
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import bagpipe.serving
from bagpipe.config.metrics import Metric
from bagpipe.config.rates import PlateauRate
from bagpipe.data import open_source
from bagpipe.data.base import Batch
from bagpipe.data.check import check_batch
from bagpipe.errors import CheckpointError, ConfigError, DataError
from bagpipe.models import RankingModel
from bagpipe.train.evaluate import evaluate
from bagpipe.train.loop import Result
from bagpipe.train.metrics import BinaryScores, LabelScores, Scores
from bagpipe.train.objective import Objective
from bagpipe.train.rates import Rates
from bagpipe.train.saved import load_model, open_saved
from bagpipe.train.trainer import train
from bagpipe.types import Jagged

LABELS = [{"column": "clicked"}, {"column": "bought"}]
TWO = {"bottom": [8, 4], "top": [8, 2]}
EVALUATED = {"eval_every_steps": 4, "metrics": ["auc", "log_loss"]}
MODELS: dict[str, dict[str, Any]] = {
    "dlrm": TWO,
    "dcn": {"kind": "dcn", **TWO, "num_cross_layers": 2, "cross_rank": 3},
    "wide_deep": {"kind": "wide_deep", "top": [8, 2]},
    "deepfm": {"kind": "deepfm", "top": [8, 2]},
    "own": {"kind": "tests.train.test_labels:Towers", "arguments": {"num_labels": 2}},
}


class Towers(RankingModel):
    """A linear tower for each label."""

    def __init__(self, embeddings: nn.Module, num_dense: int, *, num_labels: int) -> None:
        super().__init__(embeddings)
        width = num_dense + self.num_features * self.embedding_dim
        self.towers = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_labels))

    def dense_part(self, dense: Tensor, pooled: Tensor) -> Tensor:
        everything = torch.cat([dense, pooled.to(dense.dtype)], dim=1)
        return torch.cat([tower(everything) for tower in self.towers], dim=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared clicks that have two labels, and weights."""
    folder = tmp_path_factory.mktemp("labels")
    prepare_clicks(folder, click_columns(), labels=LABELS, weight="weight")
    return folder


def trained(folder: Path, log: Path, *, resume: bool = False, **sections: Any) -> Result:
    sections = {"model": TWO, "train": EVALUATED, **sections}
    return train(click_config(folder, log, **sections), reporter=Listener(), resume=resume)


def records(log: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (log / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_batches_have_the_chosen_labels_in_their_order(prepared: Path, tmp_path: Path) -> None:
    columns = click_columns()
    rows = zip(
        columns["price"].astype(np.float32), columns["clicked"], columns["bought"], strict=True
    )
    expected = {price: (float(clicked), float(bought)) for price, clicked, bought in rows}
    config = click_config(prepared, tmp_path, model=TWO, data={"shuffle": True}).data
    for chosen, places in (
        (None, [0, 1]),
        (("bought", "clicked"), [1, 0]),
        (("bought",), [1]),
        (("clicked",), [0]),
    ):
        source = open_source(config.model_copy(update={"labels": chosen}), "train")
        assert source.label_names == (chosen or ("clicked", "bought"))
        for batch in source.batches(batch_size=24):
            found = batch.labels if len(places) > 1 else batch.labels[:, None]
            assert found.shape == (batch.batch_size, len(places))
            assert batch.labels.flags.c_contiguous
            np.testing.assert_array_equal(
                found, [[expected[price][place] for place in places] for price in batch.dense[:, 0]]
            )
            halves = [batch.share(rank, 2).labels for rank in range(2)]
            np.testing.assert_array_equal(np.concatenate(halves), batch.labels)


def test_one_of_two_labels_trains_as_if_it_were_the_only_one(
    prepared: Path, tmp_path: Path
) -> None:
    """To the bit, whichever it is."""
    for label in ("clicked", "bought"):
        alone = tmp_path / f"{label} alone"
        prepare_clicks(alone, click_columns(), label={"column": label}, weight="weight")
        for folder, data in ((alone, {}), (prepared, {"labels": [label]})):
            log = tmp_path / f"{label} {len(data)}"
            trained(folder, log, data=data, model={"bottom": [8, 4], "top": [8, 1]})
        found = [newest_files(tmp_path / f"{label} {number}") for number in (0, 1)]
        assert found[0] == found[1]
        (scores,) = records(tmp_path / f"{label} 1", "evaluation")[-1:]
        assert {"auc", "log_loss"} <= scores.keys()


@pytest.mark.parametrize("has_weights", [False, True])
def test_losses_of_labels_are_added_up_by_their_weights(has_weights: bool) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 3), (torch.rand(7, 3) < 0.5).float()
    weights = 2 * torch.rand(7) if has_weights else None
    objective = Objective(["a", "b", "c"], {"b": 0.25, "c": 3.0})
    each = [
        binary_cross_entropy_with_logits(logits[:, label], labels[:, label], weight=weights)
        for label in range(3)
    ]
    expected = torch.stack([each[0] + 0.25 * each[1] + 3.0 * each[2], *each])
    torch.testing.assert_close(objective.loss(logits, labels, weights), expected)
    # of several trainers, each with a share of the samples
    parts = [
        objective.loss(logits[own], labels[own], None if weights is None else weights[own])
        * (len(logits[own]) * 2 / 7)
        for own in (slice(0, 4), slice(4, 7))
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, expected)
    assert objective.loss(logits[:0], labels[:0]).tolist() == [0.0] * 4
    only = Objective(["a"], {"a": 0.5}).loss(logits[:, 0], labels[:, 0], weights)
    half = binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], weight=weights) / 2
    torch.testing.assert_close(only, half)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_learns_two_labels_and_is_served(
    prepared: Path, tmp_path: Path, kind: str
) -> None:
    log, scores_file = tmp_path / "run", tmp_path / "scores.parquet"
    result = trained(prepared, log, model=MODELS[kind], train=EVALUATED | {"steps": 5})
    told = invoke("eval", log)
    assert f"validation {result.scores}" in told.output
    file = write_clicks(tmp_path / "some.parquet", click_columns())
    assert invoke("predict", log, file, "-o", scores_file, "--batch-size", 400).exit_code == 0
    predicted = pq.read_table(scores_file)
    assert predicted.column_names == [
        "score_clicked",
        "score_bought",
        "label_clicked",
        "label_bought",
    ]
    assert predicted["label_bought"].to_pylist() == click_columns()["bought"].tolist()
    assert invoke("export", log, tmp_path / "model", "--no-arrow").exit_code == 0
    model = bagpipe.serving.load(tmp_path / "model")
    assert model.labels == ("clicked", "bought")
    scores = model.predict(pq.read_table(file))
    np.testing.assert_array_equal(scores, np.stack([predicted[0], predicted[1]], axis=1))
    assert model.predict([]).shape == (0, 2)


def test_a_run_with_two_labels_goes_on_to_the_bit(prepared: Path, tmp_path: Path) -> None:
    options = EVALUATED | {"label_weights": {"bought": 0.5}, "best": {"metric": "auc"}}
    trained(prepared, tmp_path / "whole", train=options)
    trained(prepared, tmp_path / "halves", train=options | {"steps": 11})
    trained(prepared, tmp_path / "halves", train=options, resume=True)
    whole = newest_files(tmp_path / "whole")
    assert newest_files(tmp_path / "halves") == whole
    trained(prepared, tmp_path / "alike", train=options | {"label_weights": {}})
    assert newest_files(tmp_path / "alike") != whole


@pytest.mark.parametrize("label", ["clicked", "bought"])
def test_the_best_model_is_that_of_a_labels_metric(
    prepared: Path, tmp_path: Path, label: str
) -> None:
    best = {"metric": "log_loss", "label": label, "patience": 2}
    result = trained(prepared, tmp_path, train=EVALUATED | {"best": best, "steps": 40})
    losses = {each["step"]: each[f"log_loss/{label}"] for each in records(tmp_path, "evaluation")}
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert records(tmp_path, "start")[0]["labels"] == ["clicked", "bought"]
    for record in records(tmp_path, "train"):
        assert record["loss"] == pytest.approx(record["loss/clicked"] + record["loss/bought"])


def test_a_plateau_watches_a_label() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = PlateauRate(kind="plateau", label="b", patience=0, factor=0.5)
    rates = Rates([(optimizer, config)], 10, ["a", "b"])
    for step in range(1, 4):
        rates.after_evaluation(step, {"log_loss/a": 1.0 / step, "log_loss/b": float(step)})
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_scores_of_labels_are_those_of_each_alone(prepared: Path, tmp_path: Path) -> None:
    """For any number of trainers."""
    trained(prepared, tmp_path)
    source = open_source(click_config(prepared, tmp_path, model=TWO).data, "validation")

    def scored(**peers: Any) -> Scores | None:
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

    scores = scored()
    assert run_ranks(2, lambda communicator: scored(peers=communicator)) == [scores, None]
    assert scores is not None
    assert [*scores.values] == [f"{m}/{n}" for n in ("clicked", "bought") for m in get_args(Metric)]
    assert None not in scores.values.values()

    rng = np.random.default_rng(0)
    logits, groups = torch.randn(60, 2), torch.from_numpy(rng.integers(0, 5, 60))
    labels = (torch.rand(60, 2) < 0.5).float()
    both = LabelScores(["a", "b"], get_args(Metric))
    both.update(logits, labels, groups)
    for place, name in enumerate("ab"):
        alone = BinaryScores(get_args(Metric))
        alone.update(logits[:, place], labels[:, place], groups)
        for metric, value in alone.compute().values.items():
            assert both.compute()[f"{metric}/{name}"] == value
    shown = Scores(num_samples=4, values={"auc/a": 0.5, "accuracy/a": None, "auc/b": 1.0})
    assert str(shown) == "a: AUC 0.5000, accuracy none; b: AUC 1.0000 on 4 samples"


def test_labels_of_one_column_have_names_and_limits(tmp_path: Path) -> None:
    stars = np.arange(400) % 5 + 1
    labels = [
        {"column": "stars", "name": "good", "at_least": 4},
        {"column": "stars", "name": "best", "at_least": 5},
    ]
    manifest = prepare_clicks(tmp_path, click_columns(stars=stars), labels=labels)
    assert [label.name for label in manifest.all_labels] == ["good", "best"]
    source = open_source(click_config(tmp_path, tmp_path, model=TWO).data, "train")
    found = np.concatenate([batch.labels for batch in source.batches(batch_size=50)])
    assert {tuple(row) for row in found.tolist()} == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}


def test_data_without_all_labels_are_predicted_and_not_scored(tmp_path: Path) -> None:
    labels = [LABELS[0], LABELS[1] | {"name": "kept"}]
    prepare_clicks(tmp_path / "two", click_columns(), labels=labels, weight="weight")
    trained(tmp_path / "two", tmp_path / "run", train=EVALUATED | {"steps": 5})
    file = write_clicks(tmp_path / "some.parquet", click_columns(bought=None))
    prepare_clicks(tmp_path, click_columns(), weight="weight")  # the same ids, one label
    for data, fact in (
        (file, "some.parquet: lacks a label to be compared with (clicked, bought)"),
        (tmp_path / "prepared", "prepared: lacks a label to be compared with (clicked, kept)"),
    ):
        result = invoke("eval", tmp_path / "run", data)
        assert result.exit_code == 2
        assert fact in result.stderr
        output = tmp_path / "scores.parquet"
        assert invoke("predict", tmp_path / "run", data, "-o", output).exit_code == 0
        assert pq.read_table(output).column_names == ["score_clicked", "score_kept"]


def test_a_saved_models_logits_keep_their_labels(prepared: Path, tmp_path: Path) -> None:
    """Another order would score each, or go on with it, by the other's label."""
    run = tmp_path / "run"
    trained(prepared, run, train=EVALUATED | {"steps": 5})
    result = invoke("eval", run, "--set", 'data.labels=["bought", "clicked"]')
    assert result.exit_code == 2
    assert "--set data.labels: the logits of" in result.stderr
    assert "in their order (all of the data): leave the option out" in result.stderr
    data = {"labels": ["bought", "clicked"]}
    config = click_config(prepared, tmp_path / "next", model=TWO, data=data)
    fact = (
        r"labels come in the order \['clicked', 'bought'\] there and \['bought', 'clicked'\] here"
    )
    with pytest.raises(CheckpointError, match=fact):
        train(config, reporter=Listener(), start_from=run)


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        ({"labels": [*LABELS, LABELS[0]]}, "label 'clicked' is given more than once: set `name`"),
        ({"label": LABELS[0], "labels": LABELS}, "give label, or labels .*: both are given"),
        ({"labels": []}, "give label, or labels .*: neither is given"),
        ({"labels": [*LABELS, {"column": "sold"}]}, "has no column 'sold'; its columns are"),
        (
            {"labels": [*LABELS, {"column": "item"}]},
            "'item' is the label, so it can't be a feature",
        ),
        ({"labels": LABELS, "weight": "bought"}, "'bought' is the label, so .* weight"),
        (
            {"labels": [*LABELS, {"column": "weight"}]},
            r"clicks\.parquet, row \d+ \(from 0\): label column 'weight' is 2\.0, must be in",
        ),
    ],
)
def test_labels_that_can_not_be_prepared(tmp_path: Path, source: dict[str, Any], fact: str) -> None:
    with pytest.raises((DataError, ValueError), match=fact):
        prepare_clicks(tmp_path, click_columns(), **source)
    assert not (tmp_path / "prepared/manifest.json").exists()


@pytest.mark.parametrize(
    ("sections", "fact"),
    [
        ({"data": {"labels": ["sold", "bought"]}}, "label 'sold' is not in the prepared data, wh"),
        ({"data": {"labels": ["bought"] * 2}}, "label 'bought' is chosen more than once"),
        ({"data": {"labels": []}}, r"data\.labels"),
        ({"model": {"bottom": [8, 4], "top": [8, 1]}}, r"top ends with 1: .*2 labels, .*must be 2"),
        ({"data": {"labels": ["bought"]}}, r"top ends with 2: .*is the logit, so it must be 1"),
        ({"train": {"label_weights": {"sold": 2}}}, r"label_weights\.sold: .*no label 'sold'"),
        ({"train": {"label_weights": {"bought": 0}}}, r"label_weights\.bought"),
        (
            {"train": EVALUATED | {"best": {"label": "sold"}}},
            r"train\.best\.label: the run learns no label 'sold'; there are clicked, bought",
        ),
        (
            {"train": EVALUATED | {"lr_schedule": {"kind": "plateau", "label": "sold"}}},
            r"train\.lr_schedule\.label: .*no label 'sold'",
        ),
        (
            {"model": MODELS["own"] | {"arguments": {"num_labels": 3}}},
            r"logits of shape \(32, 3\) for 32 samples .* labels clicked, bought: .*\(32, 2\)",
        ),
    ],
)
def test_labels_that_do_not_fit_a_run(
    prepared: Path, tmp_path: Path, sections: dict[str, Any], fact: str
) -> None:
    with pytest.raises(ConfigError, match=fact):
        trained(prepared, tmp_path, **sections)


def test_an_altered_label_is_told_with_its_sample() -> None:
    labels = np.zeros((3, 2), np.float32)
    labels[1, 1] = np.nan
    batch = Batch(
        dense=np.zeros((3, 0), np.float32),
        sparse=Jagged(keys=(), values=np.empty(0, np.int32), batch_size=3),
        labels=labels,
    )
    with pytest.raises(DataError, match="batch 7: the label 'bought' of sample 1 is nan, must be"):
        check_batch(batch, (), where="batch 7", label_names=("clicked", "bought"))
