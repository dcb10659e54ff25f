"""The documents: narrow lines, links, the words of docs/vocabulary.md, and commands that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from benchmarks.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LAB = sorted((DOCS / "lab").glob("*.md"))
PAGES = sorted({*ROOT.glob("*.md"), *DOCS.glob("**/*.md")})
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
VOCABULARY = DOCS / "vocabulary.md"
FREE = {VOCABULARY, ROOT / "CHANGELOG.md", *LAB}
"""The notebook quotes what was said before the vocabulary; a changelog names what was renamed."""
COMMAND = re.compile(r"python -m benchmarks\s+(\w+)((?:\s+\\?\s*--[\w-]+(?:\s+[\w./:%-]+)?)*)")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def rows_of_vocabulary() -> list[tuple[str, list[str], list[str]]]:
    """(word, names in code, words never to be used for it)."""
    rows = []
    for line in VOCABULARY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 4 and cells[0] not in ("word", "---"):
            never = [word.strip() for word in cells[3].split(",") if word.strip()]
            rows.append((cells[0], re.findall(r"`([^`]+)`", cells[2]), never))
    return rows


def wide_lines(page: Path) -> list[int]:
    """The numbers of the lines of more than 100 columns."""
    lines = enumerate(page.read_text().splitlines(), 1)
    return [number for number, line in lines if len(line) > 100]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere; those into the network are not followed."""
    dead = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            dead.append(target)
    return dead


def forbidden_words(text: str) -> list[str]:
    """Words of the vocabulary's last column that stand in a text, also over the end of a line."""
    flat = re.sub(r"[\s#>*`]+", " ", text.lower())
    never = [word for _, _, words in rows_of_vocabulary() for word in words]
    return [word for word in never if re.search(rf"\b{re.escape(word.lower())}\b", flat)]


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("examples/*"))], ids=name_of)
def test_lines_have_at_most_100_columns(page: Path) -> None:
    assert wide_lines(page) == []


def test_files_have_at_most_400_lines() -> None:
    """A longer one has two subjects."""
    files = [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/*.py")]
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


@pytest.mark.parametrize("file", sorted({*PAGES, *SOURCES} - FREE), ids=name_of)
def test_documents_and_code_keep_to_the_vocabulary(file: Path) -> None:
    assert forbidden_words(file.read_text()) == []


def test_the_vocabulary_names_what_stands_in_the_code() -> None:
    code = "\n".join(file.read_text() for file in SOURCES)
    names = [name for _, in_code, _ in rows_of_vocabulary() for name in in_code]
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_the_index_has_every_page() -> None:
    linked = re.findall(r"^\| \[[\w-]+\]\(([\w-]+\.md)\)", LAB[0].read_text(), re.MULTILINE)
    assert LAB[0].name == "README.md"
    assert sorted(linked) == [page.name for page in LAB[1:]]


def test_results_are_two_screens() -> None:
    assert len((DOCS / "results.md").read_text().splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_benchmarks_are_called_as_they_are(page: Path) -> None:
    known = typer.main.get_command(app).commands
    for name, options in COMMAND.findall(page.read_text()):
        if name.isupper():  # a placeholder, as in `python -m benchmarks SUBCOMMAND`
            continue
        own = {option for param in known[name].params for option in param.opts}
        assert set(re.findall(r"--[\w-]+", options)) <= own, (name, options)


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# A *title*, here\n[one](#a-title-here) [two](#nothing) [three](nowhere.md)\n"
    page.write_text(f"{text}{'x' * 101}\n")
    assert wide_lines(page) == [3]
    assert dead_links(page) == ["#nothing", "nowhere.md"]
    assert forbidden_words("It holds the distinct\nrows of a batch.") == ["distinct rows"]


def test_commands_are_found() -> None:
    """The pattern sees options, also over several lines."""
    found = COMMAND.findall("`python -m benchmarks gpu --workload W1 \\\n  --arm a --arm\nb`")
    assert found == [("gpu", " --workload W1 \\\n  --arm a --arm\nb")]
    assert sum(len(COMMAND.findall(page.read_text())) for page in PAGES) > 10
