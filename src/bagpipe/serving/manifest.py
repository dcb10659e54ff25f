"""`manifest.json` of an exported model: what the folder holds, for which versions.

It is written last, and has a checksum of itself and of every file. Whoever wrote it, it is read
whole or refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import xxhash

from bagpipe.data.files import checksum_file
from bagpipe.embeddings.table_file import weight_key
from bagpipe.errors import DataError
from bagpipe.native.files import is_file_name
from bagpipe.serving.inputs import Columns
from bagpipe.types import DataType, Pooling
from bagpipe.version import __version__

FORMAT: Final = 1
MANIFEST_NAME: Final = "manifest.json"
DENSE_NAME: Final = "dense.pt2"
ONNX_NAME: Final = "dense.onnx"
TABLES_NAME: Final = "tables.safetensors"
VocabularyKind = Literal["ids", "hash", "dictionary", "given"]


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file of the folder."""

    name: str
    size_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True)
class TableEntry:
    """A table, and what makes ids of its features' keys."""

    name: str
    num_embeddings: int
    embedding_dim: int
    data_type: DataType
    pooling: Pooling
    vocabulary: VocabularyKind
    """"ids": values are ids already; "hash"; "dictionary", or "given" by an own loop, in
    the file of this entry."""
    dictionary: str | None = None
    arrow: str | None = None
    """The file of its weights for other programs, if there is one."""

    @property
    def key(self) -> str:
        """Its name among the tensors of the tables' file."""
        return weight_key(self.name)


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """What an exported model says of itself."""

    versions: Mapping[str, str]
    """The versions of Bagpipe and torch that have written it."""
    step: int
    """After how many steps of training the model was saved."""
    precision: str
    labels: tuple[str, ...]
    """What is predicted, in the order of the logits."""
    columns: Columns
    """What is read of raw rows; features in the order of the pooled embeddings."""
    tables: tuple[TableEntry, ...]
    files: tuple[ExportedFile, ...]

    def save(self, path: Path) -> None:
        """Writes it."""
        body = {"format": FORMAT, **asdict(self)}
        text = json.dumps({**body, "xxh3_128": _checksum(body)}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads that of a folder.

        Raises:
            DataError: there is none, it is damaged, or another version has written it.
        """
        path = folder / MANIFEST_NAME
        try:
            body = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            there = "" if folder.is_dir() else ", there is no such folder"
            raise DataError(
                f"{folder}: is no exported model (it has no {MANIFEST_NAME}{there}): give a folder "
                "that `bagpipe export` has written"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: can't be read: {error}: export the run again") from error
        if not isinstance(body, dict) or "versions" not in body:
            raise DataError(f"{path}: is not that of an exported model: give another folder")
        if body.get("format") != FORMAT:
            raise DataError(
                f"{path}: has format {body.get('format')}, written by Bagpipe "
                f"{body['versions'].get('bagpipe')}; this is Bagpipe {__version__}, which reads "
                f"format {FORMAT}: install that version, or export the run again with this one"
            )
        if body.pop("xxh3_128", None) != _checksum(body):
            raise DataError(
                f"{path}: is damaged or edited, its content does not have the checksum that it was "
                "written with: export the run again"
            )
        return cls._of(body)

    @classmethod
    def _of(cls, body: Mapping[str, Any]) -> Self:
        return cls(
            versions=body["versions"],
            step=body["step"],
            precision=body["precision"],
            labels=tuple(body.get("labels", ("label",))),
            columns=Columns.from_dict(body["columns"]),
            tables=tuple(TableEntry(**table) for table in body["tables"]),
            files=tuple(ExportedFile(**file) for file in body["files"]),
        )

    def check_files(self, folder: Path, *, verify: bool) -> None:
        """Compares the folder's files with what the manifest says of them.

        Args:
            folder: where they are.
            verify: whether the checksum of each is compared, which reads it. Sizes always are, and
                checksums of all but the tables.

        Raises:
            DataError: one is missing, cut off or altered.
        """
        weights = {TABLES_NAME, *(table.arrow for table in self.tables)}
        for file in self.files:
            if not is_file_name(file.name):
                raise DataError(f"{folder}: its manifest names {file.name!r}, must be a file there")
            check_file(folder / file.name, file, verify=verify or file.name not in weights)


def check_file(path: Path, file: ExportedFile, *, verify: bool) -> None:
    """Raises DataError unless a file is there, and as it was written."""
    try:
        size_bytes = path.stat().st_size
        checksum = checksum_file(path) if verify and size_bytes == file.size_bytes else None
    except OSError as error:
        raise DataError(
            f"{path}: can't be read: {error.strerror}: copy the exported folder again, or export "
            "the run again"
        ) from error
    if size_bytes != file.size_bytes:
        raise DataError(
            f"{path}: has {size_bytes:,} bytes, was written with {file.size_bytes:,}: it is cut "
            "off or altered: copy the exported folder again"
        )
    if checksum not in (None, file.xxh3_128):
        raise DataError(
            f"{path}: is damaged, its content does not have the checksum that it was written with: "
            "copy the exported folder again"
        )


def _checksum(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
