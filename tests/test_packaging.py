"""What a wheel says and holds: a stranger installs it and has no clone."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

import bagpipe
from bagpipe.cli.app import app
from bagpipe.config.load import load_config
from bagpipe.config.run import RunConfig

ROOT = Path(__file__).parents[1]
PACKAGE = Path(bagpipe.__file__).parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BY_IMPORT = {
    "prometheus_client": "prometheus-client",
    "typing_extensions": "typing-extensions",
    "llvmlite": "numba",  # which needs the one that fits
    "pydantic_core": "pydantic",
}
OPTIONAL = {"matplotlib", "onnxscript", "ray", "triton"}
"""What only a door imports: ONNX, the plots, Ray's actors, and on GPUs what comes with torch."""


def imported_packages(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module)
    roots = {module.partition(".")[0] for module in modules}
    return roots - set(sys.stdlib_module_names) - {"bagpipe"}


def test_the_package_declares_what_it_imports() -> None:
    declared = {
        re.split(r"[<>=\[;]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]
    }
    imported = set().union(*(imported_packages(path) for path in PACKAGE.rglob("*.py")))
    assert {BY_IMPORT.get(name, name) for name in imported} - OPTIONAL <= declared


def test_the_wheel_says_where_it_runs() -> None:
    project = PROJECT["project"]
    assert "Operating System :: POSIX :: Linux" in project["classifiers"]
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]
    assert not any(line.startswith("License ::") for line in project["classifiers"])  # PEP 639
    assert project["urls"]
    readme = (ROOT / "README.md").read_text()
    assert "pip install bagpipe_recsys-" in readme
    assert "bagpipe example quickstart > run.toml" in readme


def test_examples_come_with_the_package() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["bagpipe"]
    packed = {path.name: path for pattern in patterns for path in PACKAGE.glob(pattern)}
    for example in (ROOT / "examples").glob("*.toml"):
        assert packed[example.name].read_text() == example.read_text()


def test_an_example_is_listed_and_printed(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["example"]).output
    names = [line.partition(": ")[0] for line in listed.splitlines()]
    assert names == ["criteo", "movielens", "quickstart"]
    printed = CliRunner().invoke(app, ["example", "quickstart"]).output
    assert printed == (ROOT / "examples" / "quickstart.toml").read_text()
    (tmp_path / "run.toml").write_text(printed)
    assert load_config(RunConfig, tmp_path / "run.toml").train.batch_size == 2048


def test_an_unknown_example_is_refused() -> None:
    result = CliRunner().invoke(app, ["example", "none"])
    assert result.exit_code == 2
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert "there is no example 'none': there are criteo, movielens, quickstart" in text
