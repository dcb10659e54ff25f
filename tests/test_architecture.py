"""Who may import whom (docs/design.md), read from the source, and the public surface."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import bagpipe
from bagpipe.plots import DISTRIBUTION

PACKAGE = Path(bagpipe.__file__).parent

BASE = {
    "bags",
    "types",
    "optimizers",
    "errors",
    "plan",
    "topology",
    "jagged",
    "lookups",
    "limits",
    "native",
}
ALLOWED = {
    "errors": set(),
    "limits": {"errors"},
    "optimizers": {"errors", "limits"},
    "version": set(),
    "bags": {"errors"},
    "types": {"bags", "errors", "limits", "optimizers"},
    "plan": {"types"},
    "native": {"types", "errors"},
    "plots": {"errors", "native"},
    "topology": {"types", "errors", "native"},
    "jagged": {"bags", "types", "errors"},
    "lookups": {"types", "errors", "jagged"},
    "config": BASE,
    "oracle": BASE | {"plots"},
    "feed": BASE | {"oracle"},
    "device_oracle": BASE | {"oracle", "feed", "cache"},
    "store": BASE,
    "data": BASE | {"config", "plots"},
    "distributed": BASE | {"store", "server", "config"},
    "cache": BASE | {"store", "distributed"},
    "embeddings": BASE | {"oracle", "feed", "store", "distributed", "cache", "device_oracle"},
    "models": {"errors"},
    "checkpoint": BASE | {"config", "data", "store", "distributed"},
    "train": BASE
    | {"config", "oracle", "feed", "store", "data", "distributed", "cache", "models"}
    | {"embeddings", "checkpoint", "exporting", "server", "version", "serving", "plots"},
    "exporting": BASE
    | {"cache", "checkpoint", "data", "distributed", "embeddings", "models", "plots", "serving"}
    | {"store", "version"},
    "serving": BASE | {"data", "embeddings", "version"},
    "server": BASE | {"config", "data", "store"},
    "launch": BASE | {"distributed", "config", "server", "train"},
}
MAY_IMPORT_TORCH = {"distributed", "cache", "embeddings", "models", "checkpoint", "train", "launch"}
MAY_IMPORT_TORCH |= {"device_oracle", "exporting", "serving"}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported anywhere in the file, but for those that only type checkers see."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in node.body:
                inner.__dict__["only_types"] = True
    for node in ast.walk(tree):
        if node.__dict__.get("only_types"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sources() -> Iterator[tuple[str, Path]]:
    """(part of the package, file)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__") and not part.startswith("cli"):
            yield part, path


@pytest.mark.parametrize(
    ("part", "path"), list(sources()), ids=lambda value: getattr(value, "stem", value)
)
def test_every_part_imports_only_what_it_may(part: str, path: Path) -> None:
    for module in imports(ast.parse(path.read_text())):
        root, _, rest = module.partition(".")
        if root == "torch":
            assert part in MAY_IMPORT_TORCH, f"{path} imports torch"
        if root == "bagpipe":
            imported = rest.split(".")[0]
            assert imported == part or imported in ALLOWED[part], f"{path} imports bagpipe.{rest}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_package_needs_nothing_that_is_not_in_the_wheel(path: Path) -> None:
    for module in imports(ast.parse(path.read_text())):
        assert module.partition(".")[0] not in ("benchmarks", "tests"), f"{path} imports {module}"


def test_the_control_plane_loads_without_torch() -> None:
    code = (
        "import sys, bagpipe, bagpipe.oracle, bagpipe.store, bagpipe.data, bagpipe.data.prepare, "
        "bagpipe.config.run,"
        "bagpipe.train.schedule;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_surface() -> None:
    assert bagpipe.__all__ == [
        "SGD",
        "Adagrad",
        "Adam",
        "AdamW",
        "BagpipeError",
        "Communicator",
        "EmbeddingBagCollection",
        "Jagged",
        "Normal",
        "PartialRowWiseAdam",
        "RowWiseAdagrad",
        "TableConfig",
        "Uniform",
        "__version__",
        "collate",
        "dense_state_dict",
        "export",
        "lookahead",
        "models",
        "restore",
        "save",
        "serving",
        "store",
    ]
    assert all(getattr(bagpipe, name) is not None for name in bagpipe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bagpipe.nothing  # type: ignore[attr-defined]


def test_names_that_are_imported_late_are_listed_and_there() -> None:
    code = (
        "import bagpipe; assert set(bagpipe.__all__) <= set(dir(bagpipe));"
        "bagpipe.store.FileStore; bagpipe.models.DLRM; print(bagpipe.__version__)"
    )
    alone = {"PYTHONPATH": str(PACKAGE.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=alone, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+.*\n", ended.stdout)


def test_every_sentence_on_installing_names_the_distribution() -> None:
    """The package index has another project under the name of the package itself."""
    root = PACKAGE.parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION != "bagpipe"
    texts = [root / "README.md", root / "pyproject.toml", root / "Makefile"]
    texts += [*(root / "docs").rglob("*.md")]
    texts += [*PACKAGE.rglob("*.py"), *(root / "benchmarks").rglob("*.py")]
    for path in texts:
        assert not re.search(r"""(install[^\n]*[ '"]|['"])bagpipe\[""", path.read_text()), path
        assert not re.search(r"pip install[^\n]* '?bagpipe(?![-\w])", path.read_text()), path
