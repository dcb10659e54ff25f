"""The data sections of the configuration: the examples, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from bagpipe.config.data import DataConfig, PrepareConfig, SyntheticData

CRITEO = {"kind": "criteo", "files": ["a"], "num_embeddings": 7}
PARQUET = {"kind": "parquet", "files": ["a"], "label": {"column": "y"}}


def test_kind_decides() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(DataConfig)
    assert isinstance(
        adapter.validate_python({"kind": "synthetic", "multi_hot": {"C1": 3, "C2": [0, 4]}}),
        SyntheticData,
    )
    assert adapter.validate_python({"kind": "prepared", "folder": "x"}).verify


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"source": {**CRITEO, "num_embeddings": None}}, "source.num_embeddings is needed"),
        ({"source": {**CRITEO, "num_embeddings": [1, 2]}}, "lists 2 tables, Criteo has 26"),
        ({"source": {**CRITEO, "files": []}}, "at least 1 item"),
        ({"source": {**PARQUET, "sparse": [{"column": "c"}]}}, "'c' needs num_embeddings"),
        (
            {"source": {**PARQUET, "sparse": [{"column": "c", "num_embeddings": 3}] * 2}},
            "'c' is given more than once",
        ),
        (
            {
                "source": {
                    **PARQUET,
                    "sparse": [
                        {"column": "c", "num_embeddings": 3, "table": "t"},
                        {"column": "d", "num_embeddings": 4, "table": "t"},
                    ],
                }
            },
            "table 't' has num_embeddings 3 for one feature and 4 for 'd'",
        ),
        (
            {"source": {**PARQUET, "sparse": [{"column": "c"}], "dense": ["x", "z", "x"]}},
            "dense column 'x' is given more than once",
        ),
        *(
            (
                {"source": {**PARQUET, "sparse": [{"column": "c"}], **twice}},
                "column 'y' is the label, so it can't be a feature or the time too",
            )
            for twice in (
                {"dense": ["x", "y"]},
                {"sparse": [{"column": "c"}, {"column": "y"}]},
                {"time": "y"},
            )
        ),
        ({"source": CRITEO, "split": {"validation_share": 1.0}}, "less than 1"),
        ({"source": CRITEO, "vocabulary": {"kind": "dictionary", "min_cuont": 1}}, "min_cuont"),
    ],
)
def test_wrong_prepare_configs(config: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        PrepareConfig.model_validate({"output": "x", **config})


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"num_embeddings": []}, "at least one table"),
        ({"num_embeddings": [0]}, "greater than or equal to 1"),
        ({"multi_hot": {"C1": [3, 2]}}, "least must not be above the most"),
        ({"skew": float("nan")}, "finite"),
    ],
)
def test_wrong_synthetic_configs(config: dict[str, Any], fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        SyntheticData.model_validate({"kind": "synthetic", **config})
