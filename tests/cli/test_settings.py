"""`bagpipe settings` tells every key of a run's file."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from bagpipe.cli.app import app
from bagpipe.config.base import Section
from bagpipe.config.run import RunConfig

WIDE = {"COLUMNS": "400"}


def told(*arguments: str) -> str:
    result = CliRunner(env=WIDE).invoke(app, ["settings", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def all_sections(section: type[Section]) -> set[type[Section]]:
    return {section}.union(*(all_sections(one) for one in section.__subclasses__()))


def test_every_key_of_every_section_is_told() -> None:
    output = told()
    titles = set(re.findall(r"^\[([\w.]+)\]", output, re.MULTILINE))
    assert titles >= {"data", "model", "train.lr_schedule", "servers.tls", "prepare.source.sparse"}
    in_a_run = {
        section
        for section in all_sections(Section)
        if section.__module__.startswith("bagpipe.config.")
        and not section.__name__.startswith("_")
        and section is not RunConfig
        and not section.__name__.endswith("File")
        and section is not Section
    }
    assert len(in_a_run) > 20
    keys = {name for section in in_a_run for name in section.model_fields} - {"kind"}
    assert {key for key in keys if not re.search(rf"^ {key} ", output, re.MULTILINE)} == set()


def test_a_key_is_told_with_limits_default_and_meaning() -> None:
    (lookahead,) = re.findall(r"^ lookahead .*", told("cache"), re.MULTILINE)
    assert re.search(r'"auto" or integer above 0 to 4,096 +"auto" +How many batches', lookahead)
    (folder,) = re.findall(r"^ folder .*", told("log"), re.MULTILINE)
    assert "path" in folder
    assert "required" in folder


def test_a_section_is_told_with_those_within_it_only() -> None:
    output = told("train")
    assert "[train.best]" in output
    assert "[cache]" not in output
    assert '[train.lr_schedule] kind = "cosine"' in output


def test_a_section_that_is_not_there_is_answered_with_those_that_are() -> None:
    result = CliRunner(env=WIDE).invoke(app, ["settings", "trian"])
    assert result.exit_code == 2
    assert "no section 'trian'" in result.output
    assert "train.lr_schedule" in result.output
