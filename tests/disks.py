"""Disks that fail."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_FSIZE, getrlimit, setrlimit
from typing import Any

import pytest


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """What is written beyond fails, as on a full disk, with "File too large"."""
    before = getrlimit(RLIMIT_FSIZE)
    setrlimit(RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        setrlimit(RLIMIT_FSIZE, before)


class ForgetfulDisk:
    """What a power cut leaves of a folder: of its files and names only what was synced, or, where a
    test chooses so, what was not synced, too, since an operating system writes when it likes.

    Everything really happens; only `os.fsync` is watched. A file's content counts as synced as it
    was at the last fsync of that file, the names in a folder as they were at the last fsync of that
    folder. A file that was never synced is empty, a folder without names. So a rename is lost
    unless its folder was synced since.

    Args:
        root: the folder, whose names count as synced at the beginning.
        monkeypatch: puts `os` back.
        ignores: of a path, whether an fsync of it does nothing: a planted fault.
    """

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        ignores: Callable[[Path], bool] = lambda _: False,
    ) -> None:
        self._root, self._ignores = root, ignores
        self._synced: dict[int, bytes | dict[str, int]] = {}  # by inode: content, or names
        self._held: dict[int, int] = {}  # descriptors, so that no inode is used again
        self._on_event: Callable[[], None] = lambda: None
        self._sync(root)
        for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name), name == "fsync"))

    def at_every_event(self, check: Callable[[], None]) -> None:
        """Calls `check` after each fsync and each change of names, of whatever folder."""
        self._on_event = check

    def close(self) -> None:
        """Lets go of the files."""
        for descriptor in self._held.values():
            os.close(descriptor)

    def after_a_power_cut(self, target: Path, is_written: Callable[[], bool]) -> Path:
        """Makes `target` what would be left if power failed now; `is_written` is asked for each
        file and folder whether its present state has been written although nobody synced it.
        """
        on_event, self._on_event = self._on_event, lambda: None
        try:
            shutil.rmtree(target, ignore_errors=True)
            self._hold_all(self._root)
            self._restore(self._root.stat().st_ino, target, is_written)
        finally:
            self._on_event = on_event
        return target

    def _restore(self, inode: int, target: Path, is_written: Callable[[], bool]) -> None:
        held = Path(f"/proc/self/fd/{self._held[inode]}")
        if held.is_dir():
            synced = self._synced.get(inode, {})
            names = _names_in(held) if is_written() else synced
            assert isinstance(names, dict)
            target.mkdir()
            for name, child in names.items():
                self._restore(child, target / name, is_written)
        else:
            content = held.read_bytes() if is_written() else self._synced.get(inode, b"")
            assert isinstance(content, bytes)
            target.write_bytes(content)

    def _watched(self, real: Callable[..., Any], is_fsync: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            if is_fsync:
                path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
                if path.is_relative_to(self._root) and not self._ignores(path):
                    self._sync(path)
            self._on_event()
            return result

        return call

    def _sync(self, path: Path) -> None:
        self._hold_all(path)
        inode = path.stat().st_ino
        self._synced[inode] = _names_in(path) if path.is_dir() else path.read_bytes()

    def _hold_all(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_RDONLY)
        if path.is_dir():
            for child in path.iterdir():
                self._hold_all(child)


def _names_in(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}
