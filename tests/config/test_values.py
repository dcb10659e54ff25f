"""Sections that describe a value of bagpipe.types: the same fields, with the same defaults."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
from pydantic_core import PydanticUndefined

from bagpipe.config.optimizers import (
    EmbeddingAdagrad,
    EmbeddingAdam,
    EmbeddingAdamW,
    EmbeddingPartialRowWiseAdam,
    EmbeddingRowWiseAdagrad,
    EmbeddingSGD,
    NormalInit,
    UniformInit,
)
from bagpipe.optimizers import Optimizer
from bagpipe.types import Initializer

SECTIONS = (
    EmbeddingSGD,
    EmbeddingAdagrad,
    EmbeddingRowWiseAdagrad,
    EmbeddingAdam,
    EmbeddingAdamW,
    EmbeddingPartialRowWiseAdam,
    UniformInit,
    NormalInit,
)


def test_every_value_has_its_section() -> None:
    described = {section.describes for section in SECTIONS}
    assert described == {*get_args(Optimizer), *get_args(Initializer)}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_section_has_the_fields_and_defaults_of_its_value(section: type) -> None:
    keys = {
        name: None if field.default is PydanticUndefined else field.default
        for name, field in section.model_fields.items()
        if name != "kind"
    }
    fields = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(section.describes)
    }
    assert keys == fields
