"""What a checkpoint's manifest says: its own checksum, its files, and each group's record files.

A manifest of format 2 has for each group

    "files": [{"name": "group-0.arrow", "shard": 0, "num_shards": 1, "num_records": 9,
               "is_whole": true}, ..]

in order: if several files have a row, the last one counts. A file's size and checksum are in the
list of all files. Format 1 had one file for each group and host, with the host's rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from bagpipe.errors import CheckpointError
from bagpipe.native.files import is_file_name
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Group

FORMAT = 2
MANIFEST = "manifest.json"
_READ_BYTES = 1 << 20
_NUM_READERS = min(4, os.cpu_count() or 1)


def checksum_of(content: Mapping[str, Any]) -> str:
    """The checksum that a manifest has of its own content."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, compared with its own checksum.

    Raises:
        CheckpointError: it is missing, altered or too new.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read: {error.strerror}; this is not a complete checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("xxh3_128", None) != checksum_of(manifest):
        raise CheckpointError(
            f"{path}: is damaged: its content does not have the checksum that it was written with"
        )
    if manifest["format"] not in (1, FORMAT):
        raise CheckpointError(
            f"{path}: has format {manifest['format']}, this version reads formats 1 and {FORMAT}"
        )
    for entry in manifest["files"]:
        if not is_file_name(entry["name"]):
            raise CheckpointError(
                f"{path}: names {entry['name']!r}, must be a file in its own folder: it is damaged "
                "or not of Bagpipe"
            )
    return manifest


def verify_files(checkpoint: Path, files: Iterable[Mapping[str, Any]]) -> None:
    """Compares files with what a manifest says of them, several at a time.

    Cost: 4 to 6 GB/s a thread from the page cache, of which there are up to four.

    Raises:
        CheckpointError: one is missing, truncated or altered; names the first.
    """
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for _ in pool.map(lambda entry: _verify_file(checkpoint / entry["name"], entry), files):
            pass


def describe(group: Group, files: Iterable[RecordFile]) -> dict[str, Any]:
    """A group and its record files, as a manifest has them."""
    return _tables(group) | {
        "files": [
            {
                "name": file.name,
                "shard": file.shard,
                "num_shards": file.num_shards,
                "num_records": file.num_records,
                "is_whole": file.is_whole,
            }
            for file in files
        ]
    }


def record_files(manifest: Mapping[str, Any]) -> tuple[tuple[RecordFile, ...], ...]:
    """The record files of each group, in order.

    Raises:
        KeyError, TypeError, ValueError: the manifest is not one that Bagpipe writes.
    """
    by_name = {entry["name"]: entry for entry in manifest["files"]}
    groups = manifest["groups"]
    lists = [group["files"] for group in groups] if manifest["format"] > 1 else _first(manifest)
    found = tuple(tuple(_record_file(entry, by_name) for entry in files) for files in lists)
    names = [file.name for files in found for file in files]
    if len(set(names)) != len(names) or len(by_name) != len(manifest["files"]):
        raise ValueError("it names a file twice")
    return found


def check_tables(
    checkpoint: Path, described: Sequence[Mapping[str, Any]], groups: Sequence[Group]
) -> None:
    """Raises CheckpointError where a manifest describes other groups than these."""
    expected = [_tables(group) for group in groups]
    extra = ("files", "num_records")
    found = [
        {key: value for key, value in group.items() if key not in extra} for group in described
    ]
    if found != expected:
        raise CheckpointError(
            f"{checkpoint}: holds other tables than this run has:\n  {found}\n  {expected}"
        )


def not_ours(checkpoint: Path, error: Exception) -> CheckpointError:
    """For a manifest that has the right checksum of itself, but other content than it must."""
    return CheckpointError(
        f"{checkpoint}: its manifest is not one that Bagpipe writes: {type(error).__name__}: "
        f"{error}"
    )


def _tables(group: Group) -> dict[str, Any]:
    return {
        "tables": {table.name: table.num_embeddings for table in group.tables},
        "embedding_dim": group.embedding_dim,
        "data_type": group.data_type,
        "record_width": group.record_width,
    }


def _record_file(entry: Mapping[str, Any], by_name: Mapping[str, Mapping[str, Any]]) -> RecordFile:
    of_file = by_name[entry["name"]]
    size_bytes = int(of_file["size_bytes"])
    return RecordFile(**entry, size_bytes=size_bytes, xxh3_128=of_file["xxh3_128"])


def _first(manifest: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """What format 1 says of record files, as format 2 would."""
    groups, num_hosts = manifest["groups"], manifest.get("num_hosts", 1)
    if len(manifest["files"]) != 1 + len(groups) * num_hosts:
        raise ValueError(
            f"it lists {len(manifest['files'])} files, which are not those of {len(groups)} groups "
            f"on {num_hosts} hosts"
        )
    return [
        [
            {
                "name": f"group-{index}.host-{host}.arrow" if host else f"group-{index}.arrow",
                "shard": host,
                "num_shards": num_hosts,
                "num_records": group["num_records"] if num_hosts == 1 else None,
                "is_whole": True,
            }
            for host in range(num_hosts)
        ]
        for index, group in enumerate(groups)
    ]


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size_bytes = path.stat().st_size
        if size_bytes != entry["size_bytes"]:
            raise CheckpointError(
                f"{path}: is damaged: has {size_bytes:,} bytes, was written with "
                f"{entry['size_bytes']:,}"
            )
        if _hash_file(path) != entry["xxh3_128"]:
            raise CheckpointError(
                f"{path}: is damaged: its content does not have the checksum that it was written "
                "with"
            )
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error


def _hash_file(path: Path) -> str:
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(block[:num_bytes])
    return digest.hexdigest()
