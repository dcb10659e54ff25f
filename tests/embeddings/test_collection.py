"""The user's module: what it accepts and refuses, reading without training, state dicts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from tests.store_contract import touched_rows
from torch import Tensor

import bagpipe
from bagpipe.embeddings.collection import EmbeddingBagCollection
from bagpipe.errors import ConfigError, DataError, UsageError
from bagpipe.jagged import share_of
from bagpipe.optimizers import SGD
from bagpipe.types import Jagged, TableConfig

TABLES = [
    TableConfig(name="users", num_embeddings=20, embedding_dim=4, feature_names=["user"]),
    TableConfig(
        name="genres", num_embeddings=7, embedding_dim=4, feature_names=["genre"], pooling="mean"
    ),
    TableConfig(name="hours", num_embeddings=24, embedding_dim=2, feature_names=["hour"]),
]
BATCH = Jagged(
    keys=("hour", "user", "genre"),
    values=np.array([3, 4, 19, 0, 6, 6, 5]),
    batch_size=2,
    offsets=np.array([0, 1, 2, 3, 4, 4, 7]),
)


class KeyedJagged:
    """What Bagpipe reads of TorchRec's KeyedJaggedTensor."""

    def __init__(
        self, batch: Jagged, weights: Tensor | None = None, variable_stride: bool = False
    ) -> None:
        self._batch, self._weights, self._variable_stride = batch, weights, variable_stride

    def keys(self) -> list[str]:
        return list(self._batch.keys)

    def values(self) -> Tensor:
        return torch.from_numpy(self._batch.values)

    def offsets(self) -> Tensor:
        return torch.from_numpy(np.asarray(self._batch.offsets))

    def lengths(self) -> Tensor:
        return self.offsets().diff()

    def stride(self) -> int:
        return self._batch.batch_size

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def variable_stride_per_key(self) -> bool:
        return self._variable_stride


@pytest.fixture
def embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.5), seed=1)


def test_eval_pools_rows_of_the_stores_for_any_batch(embeddings: EmbeddingBagCollection) -> None:
    tables = {name: table[:] for name, table in embeddings.tables().items()}
    pooled = embeddings.eval()(BATCH)
    assert pooled.keys() == ["user", "genre", "hour"]
    assert torch.equal(pooled["user"], tables["users"][[19, 0]])
    assert torch.equal(pooled["hour"], tables["hours"][[3, 4]])
    assert torch.equal(pooled["genre"][0], torch.zeros(4))  # an empty bag
    torch.testing.assert_close(pooled["genre"][1], tables["genres"][[6, 6, 5]].mean(0))
    assert pooled.values().shape == (2, 4 + 4 + 2)
    assert all(touched_rows(store) == [] for store in embeddings.stores)


def test_a_keyed_jagged_tensor_is_read_by_its_methods(embeddings: EmbeddingBagCollection) -> None:
    embeddings.eval()
    assert torch.equal(embeddings(KeyedJagged(BATCH)).values(), embeddings(BATCH).values())
    with pytest.raises(
        DataError, match="per-sample weights want a gradient, which is not computed"
    ):
        embeddings(KeyedJagged(BATCH, weights=torch.ones(len(BATCH.values), requires_grad=True)))
    with pytest.raises(
        DataError, match="per-sample weights, but table 'genres' pools by mean: use pooling = 'sum'"
    ):
        embeddings(KeyedJagged(BATCH, weights=torch.ones(len(BATCH.values))))
    with pytest.raises(DataError, match="another batch size for each key"):
        embeddings(KeyedJagged(BATCH, variable_stride=True))
    with pytest.raises(
        DataError,
        match=r"must be a bagpipe.Jagged, a KeyedJaggedTensor or a dict, is list.*no method keys",
    ):
        embeddings([1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_sample_weights_are_those_of_embedding_bag(dtype: torch.dtype) -> None:
    tables = [TableConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f", "g"])]
    embeddings = EmbeddingBagCollection(tables, optimizer=SGD(lr=0.5), seed=1)
    batch = Jagged(
        keys=("f", "g"),
        values=np.array([1, 8, 1, 3, 8]),
        batch_size=2,
        offsets=np.array([0, 3, 3, 4, 5]),
    )
    weights = torch.tensor([0.5, -2.0, 4.0, 0.0, 0.25], dtype=dtype)
    keyed = KeyedJagged(batch, weights=weights)
    bag = torch.nn.EmbeddingBag.from_pretrained(
        embeddings.tables()["t"][:], freeze=False, mode="sum", include_last_offset=True
    )
    expected = (
        bag(keyed.values(), keyed.offsets(), per_sample_weights=weights.float())
        .view(2, 2, 4)
        .transpose(0, 1)
    )
    expected.square().sum().backward()
    for sparse in bagpipe.lookahead([keyed], embeddings):
        pooled = embeddings(sparse).groups[0]
        torch.testing.assert_close(pooled, expected)
        pooled.square().sum().backward()
    assert bag.weight.grad is not None
    torch.testing.assert_close(
        embeddings.tables()["t"][:], bag.weight.detach() - 0.5 * bag.weight.grad
    )
    rows, read = embeddings.tables()["t"][:], embeddings.eval()(keyed).groups[0]
    # an empty bag, and one of one id
    torch.testing.assert_close(read[1], torch.stack([torch.zeros(4), 0.25 * rows[8]]))


def test_per_sample_weights_that_make_no_sense_are_refused() -> None:
    tables = [TableConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f", "g"])]
    embeddings = EmbeddingBagCollection(tables, optimizer=SGD(lr=0.5)).eval()

    def batch(weights: Any) -> Jagged:
        return Jagged(keys=("f", "g"), values=np.array([1, 8, 1, 3]), batch_size=2, weights=weights)

    for weights, found in (
        (np.ones(3), r"float64 of shape \(3,\)"),
        (np.ones(4, np.int64), "int64"),
        (["1"] * 4, "<U1"),
    ):
        for use in (embeddings, lambda whole: share_of(whole, 1, 2)):
            with pytest.raises(
                DataError, match=f"must be floats, one for each of its 4 ids, are {found}"
            ):
                use(batch(weights))
    with pytest.raises(DataError, match="feature 'g': a per-sample weight is inf, must be finite"):
        embeddings(batch(np.array([1.0, 2.0, np.inf, 1.0])))


def test_training_keeps_rows_current_for_eval_in_the_middle_of_a_run(
    embeddings: EmbeddingBagCollection,
) -> None:
    before = embeddings.tables()["users"][:]
    with bagpipe.lookahead([BATCH] * 3, embeddings, cache="auto") as stream:
        for step, batch in enumerate(stream):
            embeddings.train()
            pooled = embeddings(batch)
            pooled["user"].sum().backward()
            embeddings.eval()
            now = embeddings(BATCH)["user"]
            torch.testing.assert_close(now, before[[19, 0]] - 0.5 * (step + 1))


def test_without_lookahead_training_says_what_to_do(embeddings: EmbeddingBagCollection) -> None:
    with pytest.raises(
        UsageError, match=r"iterate over bagpipe.lookahead\(loader, embeddings\).*or call eval\(\)"
    ):
        embeddings(BATCH)


def test_other_ids_a_second_forward_and_a_second_backward_are_refused(
    embeddings: EmbeddingBagCollection,
) -> None:
    other = Jagged(
        keys=BATCH.keys, values=BATCH.values[::-1] % 7, batch_size=2, offsets=BATCH.offsets
    )
    stream = iter(bagpipe.lookahead([BATCH], embeddings))
    batch = next(stream)
    with pytest.raises(UsageError, match="step 0: forward was given other ids"):
        embeddings(other)
    # the same ids as another object: a copy on the way to the model
    pooled = embeddings(KeyedJagged(batch))
    with pytest.raises(UsageError, match="step 0: forward was called twice"):
        embeddings(batch)
    loss = pooled["user"].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(UsageError, match="step 0: backward ran twice"):
        loss.backward()


def test_backward_after_the_next_batch_was_asked_for_is_refused(
    embeddings: EmbeddingBagCollection,
) -> None:
    stream = iter(bagpipe.lookahead([BATCH] * 3, embeddings))
    urgent = embeddings(next(stream))["user"].sum()
    next(stream)
    with pytest.raises(UsageError, match="step 0: backward ran after the next batch was asked for"):
        urgent.backward()


def test_tensors_of_another_device_are_refused(embeddings: EmbeddingBagCollection) -> None:
    stream = iter(bagpipe.lookahead([BATCH], embeddings))
    batch = next(stream)
    elsewhere = [torch.empty(2, 2, 4, device="meta"), torch.empty(2, 1, 2, device="meta")]
    with pytest.raises(
        UsageError,
        match=r"step 0: lookup's out of group 0 \(dim 4\) lie on meta, the embeddings on cpu",
    ):
        embeddings.lookup(batch, out=elsewhere)
    pooled = embeddings.lookup(batch)
    with pytest.raises(
        UsageError, match=r"step 0: update's gradients of group 1 \(dim 2\) lie on meta"
    ):
        embeddings.update([torch.zeros_like(pooled[0]), elsewhere[1]])
    embeddings.update([torch.zeros_like(group) for group in pooled])


def test_reading_between_forward_and_backward_loses_no_update(
    embeddings: EmbeddingBagCollection,
) -> None:
    before = embeddings.tables()["users"][:]
    for batch in bagpipe.lookahead([BATCH], embeddings):
        loss = embeddings(batch)["user"].sum()
        embeddings.eval()
        embeddings(BATCH)
        embeddings.train()
        loss.backward()
    torch.testing.assert_close(embeddings.tables()["users"][:][[19, 0]], before[[19, 0]] - 0.5)


def test_a_lazy_table_is_current_whenever_it_is_read(embeddings: EmbeddingBagCollection) -> None:
    table = embeddings.state_dict()["embedding_bags.hours.weight"]
    before = table[:]
    for step, batch in enumerate(bagpipe.lookahead([BATCH] * 3, embeddings)):
        embeddings(batch)["hour"].sum().backward()
        torch.testing.assert_close(table[3:5], before[3:5] - 0.5 * (step + 1))


def test_batches_without_samples_or_without_lookups_pass(
    embeddings: EmbeddingBagCollection,
) -> None:
    nothing = np.empty(0, np.int64)
    no_samples = Jagged(
        keys=BATCH.keys, values=nothing, batch_size=0, offsets=np.zeros(1, np.int64)
    )
    no_lookups = Jagged(
        keys=BATCH.keys, values=nothing, batch_size=2, offsets=np.zeros(7, np.int64)
    )
    before = {name: table[:] for name, table in embeddings.tables().items()}
    for batch in bagpipe.lookahead([no_samples, no_lookups, no_samples], embeddings):
        embeddings(batch).values().sum().backward()
    assert all(torch.equal(table[:], before[name]) for name, table in embeddings.tables().items())
    assert embeddings.eval()(no_samples).values().shape == (0, 10)


def test_a_changed_learning_rate_holds_from_the_next_backward(
    embeddings: EmbeddingBagCollection,
) -> None:
    before = embeddings.tables()["hours"][:]
    for step, batch in enumerate(bagpipe.lookahead([BATCH] * 2, embeddings)):
        embeddings.set_learning_rate([0.5, 0.25][step])
        embeddings(batch)["hour"].sum().backward()
    torch.testing.assert_close(embeddings.tables()["hours"][3:5], before[3:5] - 0.75)
    assert embeddings.step == 2


def test_state_dict_holds_tables_lazily_and_loads_into_another_collection(
    embeddings: EmbeddingBagCollection,
) -> None:
    model = torch.nn.ModuleDict({"embeddings": embeddings, "dense": torch.nn.Linear(2, 2)})
    state = model.state_dict()
    table = state["embeddings.embedding_bags.users.weight"]
    assert (table.shape, table.dtype, len(list(table.blocks(6)))) == ((20, 4), torch.float32, 4)
    with pytest.raises(
        UsageError,
        match=r"table 'users' is not pickled whole.*save_tables\(path\).*dense_state_dict\(model\)",
    ):
        pickle.dumps(table)
    with pytest.raises(UsageError, match="neither copied nor pickled whole"):
        copy.deepcopy(model)
    other = torch.nn.ModuleDict(
        {
            "embeddings": EmbeddingBagCollection(TABLES, optimizer=SGD(lr=0.5), seed=2),
            "dense": torch.nn.Linear(2, 2),
        }
    )
    other.load_state_dict(state)
    for name, table in embeddings.tables().items():
        assert torch.equal(table[:], other["embeddings"].tables()[name][:])  # type: ignore[operator]


def test_load_state_dict_takes_tensors_and_names_what_does_not_fit(
    embeddings: EmbeddingBagCollection,
) -> None:
    state = {
        f"embedding_bags.{name}.weight": torch.rand(table.shape)
        for name, table in embeddings.tables().items()
    }
    embeddings.load_state_dict(state)
    assert torch.equal(embeddings.tables()["genres"][:], state["embedding_bags.genres.weight"])
    with pytest.raises(
        RuntimeError,
        match=r"embedding_bags.users.weight: shape \(3, 4\) does not fit the table's \(20, 4\)",
    ):
        embeddings.load_state_dict(state | {"embedding_bags.users.weight": torch.rand(3, 4)})
    del state["embedding_bags.hours.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding_bags.hours.weight"):
        embeddings.load_state_dict(state)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], "no tables are given"),
        ([TABLES[0], TABLES[0]], "table name 'users' is given more than once"),
        (
            [
                TABLES[0],
                TableConfig(name="more", num_embeddings=3, embedding_dim=4, feature_names=["user"]),
            ],
            "feature 'user' is given more than once",
        ),
    ],
)
def test_tables_that_do_not_fit_together_are_refused(
    tables: list[TableConfig], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingBagCollection(tables, optimizer=SGD(lr=0.5))


def test_a_feature_without_a_table_is_named(embeddings: EmbeddingBagCollection) -> None:
    batch = Jagged(
        keys=("hour", "user", "genre", "brand"), values=np.zeros(4, np.int64), batch_size=1
    )
    message = (
        r"feature 'brand', which no table looks up; the tables' features are user, genre, hour"
    )
    with pytest.raises(DataError, match=message):
        embeddings.eval()(batch)
    with pytest.raises(DataError, match="step 0: the batch has " + message):
        next(iter(bagpipe.lookahead([batch], embeddings)))


def test_momentum_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="momentum moves every row at every step, touched or not"):
        SGD(lr=0.1, momentum=0.9)
