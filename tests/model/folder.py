"""The run's folder: claims, cuts that are being written, checkpoints; renames as the system's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.model.rules import Rules
from tests.model.sim import Failed

from bagpipe.store.record_files import RecordFile

Name = tuple[int, int]
"""Of a cut: the epoch's number and which cut in it."""
Records = dict[int, int]


@dataclass
class Cut:
    """A folder of a cut or checkpoint: its files of records, older ones first."""

    name: Name
    files: list[Records] = field(default_factory=list)
    written: list[RecordFile] = field(default_factory=list)  # by the package's own shards
    record_files: tuple[RecordFile, ...] = ()  # with those of the base
    step: int = -1
    dense: int = -1  # with the step: the manifest

    def records(self) -> Records:
        """The newest of each row."""
        return {row: value for file in self.files for row, value in file.items()}


class Folder:
    """What all processes see. Who writes to a full disk fails."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.epochs: dict[int, dict[int, Cut] | None] = {}  # the cuts by K; None: ended
        self.checkpoints: dict[int, Cut] = {}  # by step
        self.full_for: set[str] = set()  # names of processes
        self.unreadable_for: set[str] = set()
        self.on_commit: Callable[[Cut], None] = lambda cut: None

    def check_disk(self, who: str) -> None:
        if who in self.full_for:
            raise Failed(f"{who}: no space left on device")

    def claim(self, number: int) -> bool:
        """Whether the number was free and is now claimed."""
        if not self._rules.own_number:
            self.epochs.setdefault(number, {})
            return True
        if number in self.epochs:
            return False
        self.epochs[number] = {}
        return True

    def greatest(self) -> int:
        return max(self.epochs, default=0)

    def fence(self, number: int) -> None:
        self.epochs[number] = None

    def make(self, name: Name) -> None:
        """A plain mkdir."""
        cuts = self._cuts(name[0])
        if name[1] in cuts:
            raise Failed(f"{name}: exists")
        cuts[name[1]] = Cut(name)

    def find(self, name: Name) -> Cut:
        """Who has opened a file in it goes on writing wherever the folder is renamed to."""
        cuts = self._cuts(name[0])
        if name[1] not in cuts:
            raise Failed(f"{name}: no such folder")
        return cuts[name[1]]

    def discard(self, name: Name) -> None:
        cuts = self.epochs[name[0]]
        if cuts is not None:
            cuts.pop(name[1], None)

    def commit(self, name: Name) -> None:
        """The rename; an older checkpoint of the same step is renamed away first."""
        cut = self.find(name)
        self.discard(name)
        self.checkpoints[cut.step] = cut
        self.on_commit(cut)

    def remove(self, epoch: int, step: int) -> None:
        """Renames a checkpoint into the epoch's own folder."""
        self._cuts(epoch)
        self.checkpoints.pop(step, None)

    def _cuts(self, epoch: int) -> dict[int, Cut]:
        cuts = self.epochs[epoch]
        if cuts is None:
            raise Failed(f"epochs/{epoch}/cuts: no such folder")
        return cuts
