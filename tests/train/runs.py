"""A run small enough to be trained in a second, and what its checkpoints hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.config.load import check_config
from bagpipe.config.run import RunConfig
from bagpipe.store.manifest import read_manifest
from bagpipe.train.report import SilentReporter

NUM_STEPS = 24


def small_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Three tables, 24 steps over one and a half epochs, a cache that must evict.

    `sections` overlay its own, and replace one of another kind.
    """
    settings: dict[str, dict[str, Any]] = {
        "data": {
            "kind": "synthetic",
            "num_samples": 500,
            "num_validation_samples": 200,
            "num_embeddings": [40, 300, 90],
            "num_dense": 3,
        },
        "embeddings": {"embedding_dim": 4, "optimizer": {"kind": "rowwise_adagrad", "lr": 0.1}},
        "model": {"bottom": [8, 4], "top": [8, 1]},
        "cache": {"size": 120, "lookahead": 5},
        "train": {"batch_size": 32, "steps": NUM_STEPS, "device": "cpu", "eval_batch_size": 64},
        "log": {"folder": str(folder), "every_steps": 4, "tensorboard": False},
    }
    for name, section in sections.items():
        replaces = section.get("kind") not in (None, settings.get(name, {}).get("kind"))
        settings[name] = section if replaces else settings.get(name, {}) | section
    return check_config(RunConfig, settings, source="test")


def newest_files(folder: Path) -> dict[str, str]:
    """The checksum of each file of the newest checkpoint of a run: equal exactly when every
    parameter is, bit for bit.
    """
    manifest = read_manifest(list_checkpoints(folder / "checkpoints")[-1])
    return {entry["name"]: entry["xxh3_128"] for entry in manifest["files"]} | {
        "step": str(manifest["step"])
    }


class Listener(SilentReporter):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
