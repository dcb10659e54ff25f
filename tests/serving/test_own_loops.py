"""An own loop's model, exported, answers requests with the loop's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.checkpoint.own_loop import BATCHES, Loop
from torch import Tensor, nn

import bagpipe
import bagpipe.serving
from bagpipe.errors import BagpipeError, CheckpointError, ConfigError, DataError
from bagpipe.train.saved import open_saved

TABLES = [
    bagpipe.TableConfig(
        name="user", num_embeddings=20, embedding_dim=4, feature_names=["user", "friend"]
    ),
    bagpipe.TableConfig(name="tag", num_embeddings=6, embedding_dim=2, feature_names=["tags"]),
]
TAGS = {"War": 1, "Noir": 2, "Drama": 5, None: 3}
EXAMPLE = {"price": 1.5, "user": 3, "friend": 4, "genres": ["War"]}
OPTIONS: dict[str, Any] = {
    "example": [EXAMPLE],
    "vocabulary": {"tag": TAGS},
    "columns": {"tags": "genres"},
}


class Model(nn.Module):
    """The tables are in it, as in many own loops."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(11, 1)

    def forward(self, dense: Tensor, pooled: Any) -> Tensor:
        parts = [dense, pooled["tags"], pooled["user"], pooled["friend"]]
        logits: Tensor = self.last(self.dropout(torch.cat(parts, dim=1))).squeeze(1)
        return logits


@pytest.fixture
def model() -> Model:
    """Two steps from its start, in training mode."""
    embeddings = bagpipe.EmbeddingBagCollection(TABLES, optimizer=bagpipe.SGD(lr=0.5))
    model = Model(embeddings)
    optimizer = torch.optim.SGD(model.last.parameters(), lr=0.5)
    with bagpipe.lookahead([batch_of([1, 2]), batch_of([3, 1])], embeddings, cache=20) as stream:
        for batch in stream:
            model(torch.ones(2, 1), embeddings(batch)).square().sum().backward()
            optimizer.step()
    return model


def batch_of(users: list[int]) -> bagpipe.Jagged:
    """Of users (2,), friends 4 and 5, and tags War and Drama, and none."""
    values = np.array([*users, 4, 5, 1, 5])
    return bagpipe.Jagged(
        keys=("user", "friend", "tags"),
        values=values,
        batch_size=2,
        offsets=np.array([0, 1, 2, 3, 4, 6, 6], np.int32),
    )


def test_requests_get_the_loop_s_bits(model: Model, tmp_path: Path) -> None:
    folder = bagpipe.export(tmp_path / "model", model.embeddings, model=model, **OPTIONS)
    assert model.training
    served = bagpipe.serving.load(folder, verify=True)
    assert served.columns.dense == ("price",)
    assert served.manifest.step == 2
    rows = [
        {"price": 1.5, "user": 3, "friend": 4, "genres": ["War", "Drama"]},
        {"price": None, "user": 9, "friend": 5, "genres": []},
    ]
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([[1.5], [0.0]]), model.embeddings(batch_of([3, 9])))
    expected = torch.sigmoid(logits).numpy()
    assert (served.predict(rows) == expected).all()
    assert (served.predict(pa.Table.from_pylist(rows)) == expected).all()
    new = [{**rows[0], "genres": ["War", "Opera", None, "", "Drama"]}, {**rows[1], "genres": None}]
    of_zero = batch_of([3, 9])
    values = np.insert(of_zero.values, 5, 0)  # what the mapping lacks
    offsets = np.array([0, 1, 2, 3, 4, 7, 7], np.int32)
    of_zero = bagpipe.Jagged(keys=of_zero.keys, values=values, batch_size=2, offsets=offsets)
    with torch.no_grad():
        logits = model(torch.tensor([[1.5], [0.0]]), model.embeddings(of_zero))
    assert (served.predict(new) == torch.sigmoid(logits).numpy()).all()


def test_a_restored_loop_is_exported_within_its_loop(tmp_path: Path) -> None:
    loop, served = Loop(), []
    parts: dict[str, Any] = {
        "model": loop.model,
        "forward": lambda model, dense, pooled: model["last"](
            torch.relu(model["hidden"](pooled.values()))
        ).squeeze(1),
        "example": [{"f": 1, "g": 2}],
    }

    def between(step: int) -> None:
        if step == 3:
            loop.save(tmp_path / "run")
            bagpipe.export(tmp_path / "at 3", loop.embeddings, **parts)

    loop.train(BATCHES[:5], between)
    restored = Loop()
    restored.restore(tmp_path / "run")
    parts["model"] = restored.model
    bagpipe.export(tmp_path / "restored", restored.embeddings, arrow=False, **parts)
    for name in ("at 3", "restored"):
        model = bagpipe.serving.load(tmp_path / name)
        served.append(model.predict([{"f": f, "g": f} for f in range(50)]))
    assert (served[0] == served[1]).all()
    with pytest.raises(CheckpointError, match=r"is of an own loop.*bagpipe\.export"):
        open_saved(tmp_path / "run")


def test_values_are_hashed_as_prepared_ones_and_unknown_ones_refused(
    model: Model, tmp_path: Path
) -> None:
    closed = {f"user {number}": number for number in range(20)}
    example = EXAMPLE | {"user": "user 3", "friend": None}
    with pytest.raises(DataError, match="gives id 0 to a value of its own"):
        bagpipe.export(
            tmp_path / "model",
            model.embeddings,
            model=model,
            **OPTIONS | {"example": [example], "vocabulary": {"user": closed, "tag": "hash"}},
        )
    example["friend"] = "user 0"
    folder = bagpipe.export(
        tmp_path / "model",
        model.embeddings,
        model=model,
        **OPTIONS | {"example": [example], "vocabulary": {"user": closed, "tag": "hash"}},
    )
    served = bagpipe.serving.load(folder)
    assert len(served.predict([example | {"genres": ["Opera"]}])) == 1
    with pytest.raises(DataError, match="table 'user': of 2 values 1 are missing or not in"):
        served.predict([example, example | {"user": "nobody"}])


def no_logits(model: Any, dense: Tensor, pooled: Any) -> Any:
    return pooled["user"]


def two_logits(model: Any, dense: Tensor, pooled: Any) -> Tensor:
    logits: Tensor = model(dense, pooled)
    return torch.stack([logits, -logits], dim=1)


def of_another(model: Any, dense: Tensor, pooled: Any) -> Any:
    return pooled["item"]


def by_value(model: Any, dense: Tensor, pooled: Any) -> Any:
    return model(dense, pooled) if dense.sum() > 4 else dense[:, 0]


def test_several_labels_have_a_score_each(model: Model, tmp_path: Path) -> None:
    scores = {}
    for name, options in (
        ("one", {}),
        ("two", {"forward": two_logits, "labels": ["kept", "left"]}),
    ):
        bagpipe.export(
            tmp_path / name, model.embeddings, model=model, arrow=False, **OPTIONS | options
        )
        scores[name] = bagpipe.serving.load(tmp_path / name)
    assert (scores["one"].labels, scores["two"].labels) == (("label",), ("kept", "left"))
    both = scores["two"].predict([EXAMPLE])
    assert both.shape == (1, 2)
    assert both[:, 0] == scores["one"].predict([EXAMPLE])


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"vocabulary": {"tags": "hash"}}, ["vocabulary: there is no table 'tags'", "user, tag"]),
        ({"columns": {"tag": "x"}}, ["columns: there is no feature 'tag'", "user, friend, tags"]),
        ({"vocabulary": {"tag": "text"}}, ["vocabulary['tag'] is 'text'", "'ids', 'hash'"]),
        ({"vocabulary": {"tag": {"War": 6}}}, ["'War' has the id 6", "from 0 to 5"]),
        ({"vocabulary": {"tag": {"War": "1"}}}, ["vocabulary['tag']", "no integers"]),
        ({"vocabulary": {"tag": {"War": 1, 2: 2}}}, ["vocabulary['tag']", "no common type"]),
        ({"vocabulary": {"tag": {1.5: 1}}}, ["vocabulary['tag']", "of type double"]),
        ({"vocabulary": {}}, ["the example, column 'genres'", "in training it held integers"]),
        ({"vocabulary": {"user": "hash"}, "example": [EXAMPLE | {"user": None}]}, ["'user'"]),
        ({"columns": {}}, ["the example", "has no 'tags'"]),
        ({"example": []}, ["the example", "has no rows"]),
        ({"example": pa.table({"user": [1]})}, ["the example", "has no column 'friend'"]),
        ({"example": [EXAMPLE | {"user": 20}]}, ["table 'user'", "an id is 20", "from 0 to 19"]),
        ({"example": [EXAMPLE | {"price": "1"}]}, ["the example", "'price'", "must be a number"]),
        ({"forward": no_logits}, ["Model", "makes (3, 4) of 3 rows, must be (3,)"]),
        ({"forward": two_logits}, ["makes (3, 2) of 3 rows, must be (3,), a logit each for label"]),
        ({"labels": ["a", "b"]}, ["makes (3,) of 3 rows, must be (3, 2), a logit each for a, b"]),
        ({"labels": ["a", "a"]}, ["labels is ['a', 'a'], must be a list of names, each once"]),
        ({"labels": "ab"}, ["labels is 'ab', must be a list"]),
        ({"forward": of_another}, ["Model", "can't be computed", "KeyError: 'item'"]),
        ({"forward": by_value}, ["Model", "torch.export can't follow it"]),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(
    model: Model, tmp_path: Path, options: dict[str, Any], facts: list[str]
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        bagpipe.export(tmp_path / "model", model.embeddings, model=model, **OPTIONS | options)
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_the_place_of_embeddings_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(BagpipeError, match="embeddings are a Model, must be"):
        bagpipe.export(tmp_path / "model", model, model=model, **OPTIONS)  # type: ignore[arg-type]
