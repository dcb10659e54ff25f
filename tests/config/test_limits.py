"""Every number of the configuration, at extremes: taken, or refused in a sentence with the key, the
value and the limit.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest

from bagpipe import SGD, Adagrad, Adam, AdamW, Normal, RowWiseAdagrad, TableConfig, Uniform
from bagpipe.config.base import Batches, Section
from bagpipe.config.load import check_config, load_config
from bagpipe.config.run import RunConfig
from bagpipe.config.tables import make_tables
from bagpipe.data.base import FeatureSpec
from bagpipe.errors import ConfigError
from bagpipe.oracle.oracle import MAX_LOOKAHEAD

REQUIRED: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1},
    "adagrad": {"lr": 0.1},
    "rowwise_adagrad": {"lr": 0.1},
    "adam": {"lr": 0.1},
    "adamw": {"lr": 0.1},
    "partial_rowwise_adam": {"lr": 0.1},
    "uniform": {"low": 0.0, "high": 0.0},
    "file": {"folder": "x"},
    "prepared": {"folder": "x"},
    "criteo": {"files": ["x"], "num_embeddings": 9},
    "parquet": {"files": ["x"]},
}
"""What a section of a kind needs besides."""
EXTREMES = [
    *(-(2**70), -1, 0, 1, 3, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 2**70, 10**400),
    *(-1e308, -1.0, -5e-324, 0.0, 5e-324, 0.5, 1e6, 1e38, 1e308, float("inf"), float("nan")),
    *("", "9" * 400 + "GiB", "9" * 400 + "%", "0%", "1e400GiB", "text"),
    *(
        [],
        [0.9],
        [1],
        [1, 1, 1],
        [2**70],
        [[1]],
        [[[1, 2], 3]],
        {},
        {"a": [1]},
        {"a": [2, 1]},
        True,
    ),
]


def sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)


def numbers_in(annotation: object) -> Iterator[type]:
    """int and float, wherever they stand in an annotation that is no section."""
    if annotation in (int, float):
        yield annotation  # type: ignore[misc]
    if get_origin(annotation) in (Annotated, tuple, dict, Union, types.UnionType):
        for inner in get_args(annotation):
            yield from numbers_in(inner)


def keys(
    section: type[Section], path: tuple[str, ...] = (), given: Mapping[str, Any] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(a key that takes numbers, settings in which it is allowed) of a section and those in it."""
    given = dict(given or {})
    for name, field in section.model_fields.items():
        for inner in sections_in(field.annotation):
            kinds = get_args(inner.model_fields["kind"].annotation) if has_kind(inner) else ()
            of_kind = {"kind": kinds[0], **REQUIRED.get(kinds[0], {})} if kinds else {}
            if name in ("label", "sparse"):
                of_kind = {"column": "x"}
            yield from keys(inner, (*path, name), given | {".".join((*path, name)): of_kind})
        if not list(sections_in(field.annotation)) and list(numbers_in(field.annotation)):
            yield (*path, name), given


def has_kind(section: type[Section]) -> bool:
    return "kind" in section.model_fields and section.__name__ != "DenseOptimizerConfig"


def settings_for(path: tuple[str, ...], given: Mapping[str, Any], value: object) -> dict[str, Any]:
    settings: dict[str, Any] = {"data": {"kind": "synthetic"}, "log": {"folder": "x"}}
    if path[0] == "prepare":
        settings["prepare"] = {"output": "x"}
        table = {"column": "y", "num_embeddings": 9}
        parquet = {"kind": "parquet", "files": ["x"], "label": {"column": "z"}, "sparse": [table]}
        settings["prepare"]["source"] = parquet
    # copies, since what is put in place is filled further
    for key, inner in deepcopy([*given.items(), (".".join(path), value)]):
        *sections, name = key.split(".")
        place: Any = settings
        for part in sections:
            place = place.setdefault(part, {})
            place = place[0] if isinstance(place, list) else place
        if isinstance(inner, dict) and isinstance(place.get(name), dict) and key != ".".join(path):
            same = inner.get("kind") in (None, place[name].get("kind"))
            place[name] = {**place[name], **inner} if same else inner
        elif not (isinstance(place.get(name), list) and key != ".".join(path)):
            place[name] = inner
    return settings


KEYS = [
    pytest.param(path, given, id=f"{'.'.join(path)} {[v.get('kind') for v in given.values()]}")
    for path, given in keys(RunConfig)
]


def test_all_sections_are_walked() -> None:
    walked = {".".join(param.values[0]) for param in KEYS}  # type: ignore[arg-type]
    assert {
        "train.batch_size",
        "train.optimizer.lr",
        "cache.lookahead",
        "model.cross_rank",
        "model.bottom",
        "embeddings.optimizer.betas",
        "embeddings.init.low",
        "data.multi_hot",
        "data.seed",
        "prepare.source.num_embeddings",
        "prepare.source.sparse.num_embeddings",
        "prepare.source.label.at_least",
        "prepare.vocabulary.min_count",
    } <= walked


@pytest.mark.parametrize(("path", "given"), KEYS)
def test_an_extreme_is_taken_or_told(path: tuple[str, ...], given: dict[str, Any]) -> None:
    for value in EXTREMES:
        settings = settings_for(path, given, value)
        message = ""
        try:
            build(check_config(RunConfig, settings, source="run.toml"))
        except ConfigError as error:
            message = str(error)
        assert not message or path[0] in message
        assert len(message) < 1000


@pytest.mark.parametrize(("path", "given"), KEYS)
def test_every_number_has_a_limit(path: tuple[str, ...], given: dict[str, Any]) -> None:
    if path[-1] == "at_least":  # of the user's own column
        return
    for value in (2**63, 1e38):
        for shape in (value, [value], [value, value], {"a": value}):
            with pytest.raises(ConfigError, match=path[-1]):
                check_config(RunConfig, settings_for(path, given, shape), source="run.toml")


def build(config: RunConfig) -> None:
    """What a configuration is turned into before anything is read or made."""
    config.table_optimizer.build()
    feature = FeatureSpec(name="a", table="a", num_embeddings=9)
    make_tables([feature], config)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"cache": {"threads": 10**6}}, "cache.threads = 1000000: input should be less than"),
        ({"train": {"batch_size": 10**9}}, "or equal to 16777216"),
        ({"model": {"bottom": [10**6, 64]}}, "model.bottom[0] = 1000000: input should be less"),
        (
            {"embeddings": {"optimizer": {"kind": "adam", "lr": 0.1, "betas": [0.9]}}},
            "embeddings.optimizer.betas = [0.9]: value 2 is missing",
        ),
        ({"embeddings": {"optimizer": {"kind": "sgd", "lr": 1e38}}}, "or equal to 1000000"),
    ],
)
def test_a_limit_is_told_with_the_key_and_the_value(settings: dict[str, Any], fact: str) -> None:
    base: dict[str, Any] = {"data": {"kind": "synthetic"}, "log": {"folder": "x"}}
    with pytest.raises(ConfigError) as caught:
        check_config(RunConfig, base | settings, source="run.toml")
    assert fact in str(caught.value)


@pytest.mark.parametrize("text", [f"a = {'9' * 5000}", f"a = {'[' * 5000}"])
def test_what_the_toml_reader_trips_over_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run.toml: is not TOML"):
        load_config(RunConfig, path)
    path.write_text("[data]\nkind = 'synthetic'\n[log]\nfolder = 'x'")
    with pytest.raises(ConfigError, match=r"train.seed"):
        load_config(RunConfig, path, [f"train.seed={text.removeprefix('a = ')}"])


def test_the_window_is_limited_as_the_oracle_has_it() -> None:
    assert json.dumps(Batches.__metadata__[0].metadata[1].le) == str(MAX_LOOKAHEAD)


@pytest.mark.parametrize("field", ["num_embeddings", "embedding_dim"])
@pytest.mark.parametrize("value", [2.5, 1e6, 4.0, 2**70, 0, -1, True, "4", None, np.float32(4)])
def test_a_table_has_whole_numbers(field: str, value: object) -> None:
    fields: dict[str, Any] = {"num_embeddings": 9, "embedding_dim": 4, field: value}
    with pytest.raises(ConfigError) as caught:
        TableConfig(name="item", feature_names=["item"], **fields)
    message = str(caught.value)
    assert f"table 'item': {field} is {value!r}, must be a whole number from 1 to " in message


def test_a_table_takes_integers_of_any_type() -> None:
    table = TableConfig(
        name="item", num_embeddings=np.int64(9), embedding_dim=np.uint8(4), feature_names=("item",)
    )
    assert (type(table.num_embeddings), table.num_embeddings, table.embedding_dim) == (int, 9, 4)


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda: TableConfig(name=3, **SIZES), "table 3: its name must be a string"),  # type: ignore[arg-type]
        (lambda: TableConfig(name="", **SIZES), "table '': its name must be a string"),
        (lambda: table_of(3), "feature_names must be a non-empty list of names, is 3"),
        (lambda: table_of([1]), "feature_names must be a non-empty list of names, is [1]"),
        (lambda: table_of(["a"], init=0.1), "init is 0.1, must be a Uniform, a Normal or None"),
        (lambda: SGD(lr="0.1"), "SGD: lr is '0.1', must be a number from 0 to 1,000,000"),  # type: ignore[arg-type]
        (lambda: SGD(lr=1e38), "SGD: lr is 1e+38, must be a number from 0 to 1,000,000"),
        (lambda: Adagrad(lr=0.1, eps=float("nan")), "Adagrad: eps is nan"),
        (lambda: RowWiseAdagrad(lr=None), "RowWiseAdagrad: lr is None"),  # type: ignore[arg-type]
        (lambda: Adam(lr=0.1, betas=(0.9,)), "Adam: betas is (0.9,), must be two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(lr=0.1, betas=0.9), "Adam: betas is 0.9, must be two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(lr=0.1, betas=(0.9, "x")), "must be two numbers, each in [0, 1)"),  # type: ignore[arg-type]
        (lambda: AdamW(lr=0.1, betas=0.9), "AdamW: betas is 0.9, must be two numbers"),  # type: ignore[arg-type]
        (lambda: SGD(lr=0.1, weight_decay=-1), "SGD: weight_decay is -1, must be a number from 0"),
        (lambda: SGD(lr=0.1, max_grad_norm=0), "SGD: max_grad_norm is 0, which no row would"),
        (lambda: Adam(lr=0.1, max_grad_norm="1"), "Adam: max_grad_norm is '1', must be a number"),  # type: ignore[arg-type]
        (lambda: Uniform(low=-1.0, high=float("inf")), "Uniform: high is inf"),
        (lambda: Normal(std=-1.0), "Normal: std is -1.0, must be a number from 0 to"),
    ],
)
def test_a_wrong_value_is_one_sentence(make: Any, fact: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert fact in str(caught.value)


SIZES: dict[str, Any] = {"num_embeddings": 9, "embedding_dim": 4, "feature_names": ["a"]}


def table_of(names: Any, **others: Any) -> TableConfig:
    return TableConfig(
        name="item", num_embeddings=9, embedding_dim=4, feature_names=names, **others
    )
