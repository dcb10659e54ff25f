"""Which differences between two configurations a resumed run may have."""

from __future__ import annotations

from typing import Any

import pytest

from bagpipe.config.compare import compare_configs


@pytest.mark.parametrize(
    ("key", "matters"),
    [
        ("cache.size", False),
        ("log.folder", False),
        ("checkpoint.keep", False),
        ("train.steps", False),
        ("train.device", False),
        ("embeddings.store.kind", False),
        ("data.verify", False),
        ("data.folder", False),
        ("data.content", True),
        ("data.seed", True),
        ("model.top", True),
        ("embeddings.embedding_dim", True),
        ("embeddings.data_type", True),
        ("embeddings.optimizer.lr", True),
        ("train.batch_size", True),
        ("train.seed", True),
        ("train.optimizer.lr", True),
        ("train.drop_last", True),
    ],
)
def test_only_what_leaves_the_numbers_alone_is_free(key: str, matters: bool) -> None:
    def nest(value: int) -> dict[str, object]:
        nested: object = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        assert isinstance(nested, dict)
        return nested

    (difference,) = compare_configs(nest(1), nest(2))
    assert (difference.key, difference.old, difference.new, difference.matters) == (
        key,
        1,
        2,
        matters,
    )
    assert f"{key}: 1 -> 2" in str(difference)


def test_another_device_is_free_but_says_what_it_does() -> None:
    (difference,) = compare_configs({"train": {"device": "cpu"}}, {"train": {"device": "cuda"}})
    assert "last bits" in str(difference)


def test_equal_configurations_have_no_difference() -> None:
    assert compare_configs({"a": {"b": [1]}}, {"a": {"b": [1]}}) == ()


def test_what_one_version_does_not_know_and_the_other_has_off_is_no_difference() -> None:
    old = {"optimizer": {"lr": 0.1}}
    new: dict[str, Any] = {"optimizer": {"lr": 0.1, "weight_decay": 0.0, "max_grad_norm": None}}
    assert compare_configs(old, new) == ()
    new["optimizer"]["weight_decay"] = 0.5
    assert [str(each) for each in compare_configs(old, new)] == [
        "optimizer.weight_decay: None -> 0.5"
    ]
