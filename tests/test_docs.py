"""The results and the lab notebook: width of lines, links, and commands that can be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from benchmarks.cli import app

DOCS = Path(__file__).parents[1] / "docs"
LAB = sorted((DOCS / "lab").glob("*.md"))
PAGES = [DOCS / "results.md", *LAB]
COMMAND = re.compile(r"python -m benchmarks\s+(\w+)((?:\s+\\?\s*--[\w-]+(?:\s+[\w./:%-]+)?)*)")


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_have_at_most_100_columns(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_index_has_every_page() -> None:
    linked = re.findall(r"^\| \[[\w-]+\]\(([\w-]+\.md)\)", LAB[0].read_text(), re.MULTILINE)
    assert LAB[0].name == "README.md"
    assert sorted(linked) == [page.name for page in LAB[1:]]


def test_results_are_two_screens() -> None:
    assert len((DOCS / "results.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", [*PAGES, DOCS.parent / "README.md"], ids=lambda page: page.stem)
def test_benchmarks_are_called_as_they_are(page: Path) -> None:
    known = typer.main.get_command(app).commands
    for name, options in COMMAND.findall(page.read_text()):
        own = {option for param in known[name].params for option in param.opts}
        assert set(re.findall(r"--[\w-]+", options)) <= own, (name, options)


def test_commands_are_found() -> None:
    """The pattern sees options, also over several lines."""
    found = COMMAND.findall("`python -m benchmarks gpu --workload W1 \\\n  --arm a --arm\nb`")
    assert found == [("gpu", " --workload W1 \\\n  --arm a --arm\nb")]
    assert sum(len(COMMAND.findall(page.read_text())) for page in PAGES) > 10
