"""A model as a folder that needs no trainer.

    manifest.json         features and columns, tables, versions, checksums; written last
    dense.pt2             the dense part, a program of torch.export
    dense.onnx            the same for other programs, where asked for
    tables.safetensors    every table's weights, which `bagpipe.serving` maps
    table-00000.arrow     the same of each table, to be mapped by other programs
    dictionary-00000.arrow    of a table with a dictionary: its values in the order of ids

The folder is made beside its place and renamed, so that it is whole or not there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bagpipe.data.files import checksum_file
from bagpipe.errors import ConfigError
from bagpipe.exporting.dense import export_dense_part, export_onnx
from bagpipe.exporting.parts import Exported, OnStage
from bagpipe.exporting.tables import num_weight_bytes, write_arrow, write_safetensors
from bagpipe.native.files import remedy, sync_folder
from bagpipe.serving.manifest import (
    DENSE_NAME,
    MANIFEST_NAME,
    ONNX_NAME,
    TABLES_NAME,
    ExportedFile,
    ExportManifest,
    TableEntry,
)
from bagpipe.version import __version__


def write_folder(
    of: Exported,
    folder: Path,
    *,
    arrow: bool = True,
    onnx: bool = False,
    on_stage: OnStage = lambda stage, done, total: None,
) -> ExportManifest:
    """Writes the folder in bounded memory.

    Args:
        of: the model.
        folder: where to; it must not be there yet.
        arrow: whether tables are written as Arrow files, too.
        onnx: whether the dense part is written as ONNX, too.
        on_stage: told of progress.

    Returns:
        The manifest.

    Raises:
        ConfigError: the folder is there or can't be written, the disk has no room, the dense part
            can't be exported, or ONNX is not installed.
        CheckpointError: a file of the checkpoint is damaged.
        DataError: the run's data, whose dictionaries are exported, are gone.
    """
    _check_new(folder)
    _check_room(of, folder, num_copies=2 if arrow else 1)
    tables = of.tables
    temporary = folder.with_name(f".{folder.name[:40]}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        export_dense_part(of, temporary / DENSE_NAME)
        if onnx:
            export_onnx(of, temporary / ONNX_NAME)
        write_safetensors(of, temporary / TABLES_NAME, on_stage)
        if arrow:
            tables = _write_arrow(of, temporary, tables, on_stage)
        for table in tables:
            if table.dictionary is not None:
                of.write_dictionary(table, temporary / table.dictionary)
        manifest = ExportManifest(
            versions={"bagpipe": __version__, "torch": str(torch.__version__)},
            step=of.step,
            precision=of.precision,
            labels=of.label_names,
            columns=of.columns,
            tables=tables,
            files=_describe(temporary, on_stage),
        )
        manifest.save(temporary / MANIFEST_NAME)
        sync_folder(temporary)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigError(
            f"{folder}: can't be written: {error.strerror or error}; nothing is left of it. "
            f"{remedy(error)}, or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _check_new(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"{folder}: is there already: give a folder that is not, or remove this one first"
        )


def _check_room(of: Exported, folder: Path, num_copies: int) -> None:
    needed = num_copies * num_weight_bytes(of.groups)
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConfigError(
            f"{folder}: its tables take {needed:,} bytes and {free:,} are free: make room, give a "
            "folder on another disk, or leave the Arrow files out (--no-arrow)"
        )


def _write_arrow(
    of: Exported, folder: Path, tables: Sequence[TableEntry], on_stage: OnStage
) -> tuple[TableEntry, ...]:
    named = tuple(
        replace(table, arrow=f"table-{number:05d}.arrow") for number, table in enumerate(tables)
    )
    write_arrow(folder, named, on_stage)
    return named


def _describe(folder: Path, on_stage: OnStage) -> tuple[ExportedFile, ...]:
    paths = sorted(folder.iterdir())
    entries = []
    for number, path in enumerate(paths, 1):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        entries.append(
            ExportedFile(
                name=path.name, size_bytes=path.stat().st_size, xxh3_128=checksum_file(path)
            )
        )
        on_stage("checksums", number, len(paths))
    return tuple(entries)
