"""Checkpoints as older versions wrote them."""

from __future__ import annotations

import json
from pathlib import Path

from bagpipe.store.manifest import checksum_of, read_manifest, record_files


def make_format_1(checkpoint: Path) -> None:
    """Gives a checkpoint that trainers wrote the manifest that it had in format 1."""
    manifest = read_manifest(checkpoint)
    nums_hosts = {file.num_shards for files in record_files(manifest) for file in files}
    (manifest["num_hosts"],) = nums_hosts
    for group in manifest["groups"]:
        group["num_records"] = sum(file["num_records"] for file in group.pop("files"))
    manifest["format"] = 1
    manifest["xxh3_128"] = checksum_of(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1))
