"""What users of PyTorch and TorchRec write out of habit works, or is refused with the reason."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any, get_overloads

import numpy as np
import pytest
import torch
from tests.embeddings.test_collection import BATCH, TABLES
from torch.utils.data import DataLoader

import bagpipe
from bagpipe import EmbeddingBagCollection, Jagged, Normal, TableConfig, Uniform
from bagpipe.embeddings.tables import LazyTable
from bagpipe.errors import ConfigError, DataError


class PoolingType(Enum):
    SUM = "SUM"
    MEAN = "MEAN"
    NONE = "NONE"


class TheirType(Enum):
    FP32 = "FP32"
    BF16 = "BF16"
    INT8 = "INT8"


@dataclass
class EmbeddingBagConfig:
    """The fields that TorchRec documents, and what its `__post_init__` does."""

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    data_type: TheirType = TheirType.FP32
    feature_names: list[str] = field(default_factory=list)
    weight_init_max: float | None = None
    weight_init_min: float | None = None
    num_embeddings_post_pruning: int | None = None
    init_fn: Callable[..., Any] | None = None
    need_pos: bool = False
    input_dim: int | None = None
    pooling: PoolingType = PoolingType.SUM

    def __post_init__(self) -> None:
        if self.init_fn is None:
            bound = self.num_embeddings**-0.5
            low = -bound if self.weight_init_min is None else self.weight_init_min
            high = bound if self.weight_init_max is None else self.weight_init_max
            self.init_fn = partial(torch.nn.init.uniform_, a=low, b=high)


def config(**changes: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        **{"num_embeddings": 25, "embedding_dim": 4, "name": "t", "feature_names": ["f"], **changes}
    )


@pytest.fixture
def embeddings() -> EmbeddingBagCollection:
    return EmbeddingBagCollection(TABLES, optimizer=bagpipe.SGD(lr=0.5), seed=1)


@pytest.fixture
def table(embeddings: EmbeddingBagCollection) -> LazyTable:
    return embeddings.tables()["users"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"init": Uniform(low=-0.2, high=0.2)}),
        ({"pooling": PoolingType.MEAN, "data_type": TheirType.BF16}, {"pooling": "mean"}),
        ({"weight_init_min": -1.0, "weight_init_max": 2}, {"init": Uniform(low=-1, high=2)}),
        ({"init_fn": partial(torch.nn.init.normal_, std=0.5)}, {"init": Normal(std=0.5)}),
        ({"init_fn": torch.nn.init.uniform_}, {"init": Uniform(low=0, high=1)}),
    ],
)
def test_an_embedding_bag_config_is_a_table(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    given = config(**changes)
    embeddings = EmbeddingBagCollection([given], optimizer=bagpipe.SGD(lr=0.5))
    made = embeddings.groups[0].tables[0]
    assert (made.name, made.num_embeddings, made.embedding_dim) == ("t", 25, 4)
    assert made.data_type == given.data_type.value.lower()
    assert {name: getattr(made, name) for name in expected} == expected
    assert embeddings.embedding_bag_configs() == [given]
    assert embeddings.embedding_bag_configs()[0].pooling is given.pooling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": PoolingType.NONE}, "table 't': pooling is 'none', must be 'sum' or 'mean'"),
        ({"data_type": TheirType.INT8}, "table 't': data_type is 'int8', must be"),
        ({"need_pos": True}, "table 't': need_pos=True is not supported: leave it False"),
        ({"input_dim": 9}, "table 't': input_dim=9 is not supported: leave it None"),
        ({"init_fn": torch.nn.init.zeros_}, "table 't': init_fn is .*can't be called for single"),
        ({"init_fn": partial(torch.nn.init.normal_, generator=1)}, "init_fn is functools.partial"),
        ({"feature_names": []}, "table 't': feature_names must be a non-empty list"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddingBagCollection([config(**changes)], optimizer=bagpipe.SGD(lr=0.5))


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="TorchRec's EmbeddingBagConfig, is a str, which has no"):
        EmbeddingBagCollection(["item"], optimizer=bagpipe.SGD(lr=0.5))
    unpooled = vars(config())
    del unpooled["pooling"]
    with pytest.raises(ConfigError, match="has no pooling: give an EmbeddingBagConfig"):
        EmbeddingBagCollection([SimpleNamespace(**unpooled)], optimizer=bagpipe.SGD(lr=0.5))


def test_repr_shows_the_tables(embeddings: EmbeddingBagCollection, table: LazyTable) -> None:
    text = repr(torch.nn.Sequential(embeddings))
    assert "users: 20 x 4 fp32, sum of user; SGD(lr=0.5, " in text
    assert "genres: 7 x 4 fp32, mean of genre" in text
    assert repr(table) == "<table 'users': 20 x 4, torch.float32>"


@pytest.mark.parametrize(
    "index",
    [
        *(3, -1, np.int32(4), torch.tensor(5)),
        *([1, 2], [-1, 0, -1], [], torch.tensor([1, 2]), slice(4, None, 5)),
        *([row % 3 == 0 for row in range(20)], torch.arange(20) < 3),
    ],
)
def test_a_table_is_indexed_like_a_tensor(table: LazyTable, index: Any) -> None:
    whole = table[:]
    assert whole.shape == (20, 4)
    torch.testing.assert_close(table[index], whole[index], rtol=0, atol=0)
    assert table[index].is_contiguous()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (20, "table 'users' has no row 20: its rows are 0 to 19"),
        ([0, -21], "table 'users' has no row -21"),
        ((3, 1), r"indexed by rows: a number, a slice or a list of numbers, not \(3, 1\)"),
        (1.5, "indexed by rows"),
        ("3", "indexed by rows"),
        ([[1], [2]], "indexed by rows"),
        ([True, False], "indexed by rows"),
        (None, "indexed by rows"),
    ],
)
def test_an_index_that_names_no_rows_is_refused(table: LazyTable, index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        table[index]


def test_a_table_is_an_array_and_a_sequence_of_rows(table: LazyTable) -> None:
    whole = np.asarray(table)
    assert whole.dtype == np.float32
    assert np.array_equal(whole, table[:].numpy())
    assert np.array(table, dtype=np.float64).dtype == np.float64
    assert np.array_equal(torch.stack(list(table)).numpy(), whole)
    with pytest.raises(ValueError, match="an array of it is a copy"):
        np.asarray(table, copy=False)


def test_a_table_of_bfloat16_is_an_array_of_float32() -> None:
    half = TableConfig(
        name="t", num_embeddings=3, embedding_dim=2, feature_names=["f"], data_type="bf16"
    )
    table = EmbeddingBagCollection([half], optimizer=bagpipe.SGD(lr=0.5)).tables()["t"]
    assert np.array_equal(np.asarray(table), table[:].float().numpy())


def test_lists_and_tensors_are_ids(embeddings: EmbeddingBagCollection) -> None:
    expected = embeddings.eval()(BATCH).values()
    fields = {"keys": list(BATCH.keys), "batch_size": 2}
    arrays = {"values": BATCH.values, "offsets": BATCH.offsets}
    lists = Jagged(**fields, **{name: array.tolist() for name, array in arrays.items()})
    tensors = Jagged(**fields, **{name: torch.tensor(array) for name, array in arrays.items()})
    for batch in (lists, tensors):
        assert batch.keys == BATCH.keys
        assert torch.equal(embeddings(batch).values(), expected)


LENGTHS = np.diff(BATCH.offsets)


@pytest.mark.parametrize(
    "batch",
    [
        Jagged.from_lists(["hour", "user", "genre"], [[3, 4], [19, [0]], [None, [6, 6, 5]]]),
        Jagged.from_dict(
            {
                "hour": np.array([3, 4]),
                "user": torch.tensor([[19], [0]]),
                "genre": [[], torch.tensor([6, 6, 5])],
            }
        ),
        Jagged.from_tensors(BATCH.keys, torch.tensor(BATCH.values), lengths=LENGTHS.tolist()),
        Jagged.from_tensors(BATCH.keys, BATCH.values.tolist(), offsets=torch.tensor(BATCH.offsets)),
    ],
)
def test_a_batch_is_made_of_lists_dicts_and_tensors(
    embeddings: EmbeddingBagCollection, batch: Jagged
) -> None:
    assert (batch.keys, batch.batch_size) == (BATCH.keys, 2)
    assert np.array_equal(batch.values, BATCH.values)
    assert np.array_equal(batch.offsets, BATCH.offsets)
    assert torch.equal(embeddings.eval()(batch).values(), embeddings(BATCH).values())


def test_bags_of_one_id_need_no_offsets() -> None:
    batch = Jagged.from_dict({"a": [1, [2]], "b": torch.tensor([3, 4])})
    assert batch.offsets is None
    assert batch.values.tolist() == [1, 2, 3, 4]
    assert Jagged.from_tensors(["a"], [1, 2]).batch_size == 2
    assert Jagged.from_dict({"a": [[], None]}).values.dtype == np.int64


class JaggedTensor:
    """What Bagpipe reads of TorchRec's."""

    def values(self) -> torch.Tensor:
        return torch.tensor([6, 6, 5])

    def lengths(self) -> torch.Tensor:
        return torch.tensor([0, 3])


def test_a_jagged_tensor_is_the_bags_of_a_feature() -> None:
    batch = Jagged.from_dict({"hour": [3, 4], "genre": JaggedTensor()})
    assert batch.values.tolist() == [3, 4, 6, 6, 5]
    assert batch.offsets is not None
    assert batch.offsets.tolist() == [0, 1, 2, 2, 5]


def test_weights_come_with_their_bags() -> None:
    batch = Jagged.from_dict({"a": [[1, 2], []]}, weights={"a": [[0.5, 2], None]})
    assert batch.weights is not None
    assert batch.weights.dtype == np.float32
    assert batch.weights.tolist() == [0.5, 2]
    lists = Jagged.from_lists(["a"], [[1, 2]], weights=[[0.5, 1.5]])
    assert lists.weights is not None
    assert lists.weights.tolist() == [0.5, 1.5]


def test_a_dict_of_bags_is_trained_on(embeddings: EmbeddingBagCollection) -> None:
    whole = EmbeddingBagCollection(TABLES, optimizer=bagpipe.SGD(lr=0.5), seed=1)
    features = {"hour": [3, 4], "user": [19, 0], "genre": [[], [6, 6, 5]]}
    for batch in bagpipe.lookahead([features] * 2, embeddings, sparse=lambda batch: batch):
        embeddings(batch).values().sum().backward()
    for batch in bagpipe.lookahead([BATCH] * 2, whole):
        whole(batch).values().sum().backward()
    assert np.array_equal(embeddings.tables()["users"], whole.tables()["users"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jagged.from_dict({}), "a batch without features"),
        (lambda: Jagged.from_dict({"a": [1], "b": [1, 2]}), "'b' has 2 samples and 'a' has 1"),
        (lambda: Jagged.from_dict({"a": [[[1]]]}), r"feature 'a': its ids: a sample has a 2-D"),
        (lambda: Jagged.from_dict({"a": 3}), r"feature 'a': its ids are 0-D, must be one for"),
        (lambda: Jagged.from_dict({"a": [1]}, weights={"b": [1]}), "given for the features b, ids"),
        (
            lambda: Jagged.from_dict({"a": [[1, 2]]}, weights={"a": [1.0]}),
            "feature 'a': give each of its ids one per-sample weight",
        ),
        (lambda: Jagged.from_lists(["a", "b"], [[1]]), "given 1 lists for 2 keys"),
        (lambda: Jagged.from_lists("ab", [[1], [2]]), "must be a list of feature names, are 'ab'"),
        (lambda: Jagged.from_tensors(["a", "b"], [1, 2, 3]), "given 3 bags for 2 keys"),
        (
            lambda: Jagged.from_tensors(["a"], [1], lengths=[1], offsets=[0, 1]),
            "given lengths and offsets: give one",
        ),
        (lambda: Jagged.from_tensors(["a"], [1], lengths=[1.0]), "must be a 1-D array of integers"),
        (
            lambda: Jagged(keys=("a",), values=[[1], [2, 3]], batch_size=2),
            "a batch's ids can't be made an array",
        ),
        (
            lambda: Jagged.from_tensors(["a"], [1], weights=torch.ones(1, requires_grad=True)),
            "per-sample weights want a gradient, which is not computed: detach them",
        ),
    ],
)
def test_bags_that_make_no_batch_are_refused(make: Callable[[], Jagged], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_ids_that_are_no_integers_are_refused(embeddings: EmbeddingBagCollection) -> None:
    embeddings.eval()
    for ids in ([1.5, 2.0], ["a", "b"], torch.ones(2)):
        with pytest.raises(DataError, match="ids must be a 1-D array of integers, are 1-D"):
            embeddings({"hour": ids, "user": [1, 2], "genre": [1, 2]})


SAMPLES = [{"item": index, "genres": [index] * index, "label": float(index)} for index in range(5)]


def test_a_data_loader_collates_samples_for_lookahead() -> None:
    collate = bagpipe.collate(["item", "genres"])
    assert pickle.loads(pickle.dumps(collate)) == collate  # a DataLoader's workers get it so
    tables = [
        TableConfig(name=name, num_embeddings=5, embedding_dim=2, feature_names=[name])
        for name in ("item", "genres")
    ]
    embeddings = EmbeddingBagCollection(tables, optimizer=bagpipe.SGD(lr=0.5))
    loader = DataLoader(SAMPLES, batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    batches = bagpipe.lookahead(loader, embeddings)
    assert len(batches) == len(loader) == 3
    first, _, last = (batch for batch in batches)
    assert first["label"].tolist() == [0.0, 1.0]
    assert first["sparse"].values.tolist() == [0, 1, 1]
    assert first["sparse"].offsets.tolist() == [0, 1, 2, 2, 3]
    assert last["sparse"].batch_size == 1


def test_a_data_loader_that_shuffles_by_a_generator_is_read_in_a_process() -> None:
    tables = [TableConfig(name="f", num_embeddings=8, embedding_dim=2, feature_names=["f"])]
    embeddings = EmbeddingBagCollection(tables, optimizer=bagpipe.SGD(lr=0.5))
    samples: Any = [{"f": index} for index in range(8)]
    loader = DataLoader(
        samples,
        batch_size=2,
        shuffle=True,
        generator=torch.Generator().manual_seed(3),
        collate_fn=bagpipe.collate(["f"]),
    )
    with bagpipe.lookahead(loader, embeddings, oracle="process") as batches:
        read = [batch["sparse"].values.tolist() for batch in batches]
    assert read == [batch["sparse"].values.tolist() for batch in loader]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((1, 2), "sample of type tuple, must be a dict"),
        ({"items": 1}, "a sample has no feature 'item'; it has items"),
        ({"item": 1, "sparse": 2}, "a sample has an entry 'sparse', where bagpipe.collate puts"),
    ],
)
def test_samples_that_do_not_collate_are_refused(sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bagpipe.collate(["item"])([sample])
    with pytest.raises(ConfigError, match="takes a list of features, was given 'item'"):
        bagpipe.collate("item")


def test_a_stream_is_as_long_as_its_loader(embeddings: EmbeddingBagCollection) -> None:
    with bagpipe.lookahead([BATCH] * 3, embeddings) as batches:
        assert len(batches) == 3
        assert sum(1 for _ in batches) == 3
        assert len(batches) == 3

    def generate() -> Iterator[Jagged]:
        yield BATCH

    with bagpipe.lookahead(generate(), embeddings) as batches:
        with pytest.raises(TypeError, match="the loader, a generator, has no length"):
            len(batches)
        assert len(list(batches)) == 1


def test_a_stream_logs_its_cache_under_the_packages_name(
    embeddings: EmbeddingBagCollection, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="bagpipe"):
        bagpipe.lookahead([BATCH], embeddings, cache=[9, 5], lookahead=3).close()
    (record,) = caplog.records
    assert record.name == "bagpipe.lookahead"
    said = "step 0: reading ahead (lookahead 3, prefetch depth 2), a cache of 9 + 5 rows"
    assert record.getMessage() == said


def test_the_batches_have_the_loaders_type() -> None:
    same, other = get_overloads(bagpipe.lookahead)
    assert same.__annotations__["return"] == "Lookahead[BatchT]"
    assert other.__annotations__["return"] == "Lookahead[Any]"
