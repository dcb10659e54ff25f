"""What rank 0 does for all: opens the epoch, and makes cuts into checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.model.folder import Cut, Name
from tests.model.sim import Failed, Future, Process, Stream, Work, Wrong, all_of

from bagpipe.store.record_files import next_files

if TYPE_CHECKING:
    from tests.model.trainers import Start

BEGIN_TIMEOUT = 150.0
CUT_TIMEOUT = 60.0


class Coordinator:
    """Rank 0's part of a start, in its process."""

    def __init__(self, start: Start, process: Process) -> None:
        self._start, self._process, self._world = start, process, start.world
        self._sim, self._folder, self._rules = (
            self._world.sim,
            self._world.folder,
            start.world.rules,
        )
        self._epoch, self._num_cuts = -1, 0
        self._base: Cut | None = None
        self._in_hand: Future | None = None

    def open(self) -> Work:
        """Claims a number, fences older epochs, chooses a checkpoint, begins on all servers."""
        folder, start = self._folder, self._start
        number = max(1, folder.greatest() + self._rules.own_number)
        yield from self._at("listed")
        while not folder.claim(number):
            number += 1
        self._epoch = number
        yield from self._at("claimed")
        for older in range(1, number):
            if self._rules.fenced_folders:
                folder.fence(older)
            yield from self._at("fenced")
        if self._world.run_of_folder > start.run.number:
            raise Failed("the folder belongs to a newer run")
        if self._world.run_of_folder < start.run.number:  # --overwrite
            for step in list(folder.checkpoints):
                folder.remove(number, step)
            self._world.run_of_folder, self._world.newest_commit = start.run.number, -1
        self._base = folder.checkpoints[max(folder.checkpoints)] if folder.checkpoints else None
        self._check_choice()
        self._world.newest_epoch = max(self._world.newest_epoch, number)
        yield from self._at("chosen")
        start.instances = yield self._answers(
            BEGIN_TIMEOUT, "begin", number, start.num_ranks, self._base
        )
        start.epoch = number
        start.first = 0 if self._base is None else self._base.step
        start.dense = 0 if self._base is None else self._base.dense
        yield from self._at("opened")

    def is_cut_due(self, step: int) -> bool:
        """Asked after each step; one that is due while another is in hand is left out."""
        return step % self._world.cut_every == 0 and not self._is_busy

    def cut(self, step: int) -> Work:
        """Returns once every server has taken the cut, or the cut has failed."""
        dense, self._num_cuts = self._start.dense, self._num_cuts + 1
        name = self._epoch, self._num_cuts
        try:
            self._folder.check_disk(self._process.name)
            self._folder.make(name)
            yield from self._at("cut")
            yield self._answers(CUT_TIMEOUT, "cut", self._epoch, name)
        except Failed:
            self._abandon(name)
            return
        yield from self._at("all taken")
        self._in_hand = self._process.spawn(self._finish_cut(name, step, dense))

    def finish(self) -> Work:
        """At the end: waits for the cut in hand, and says whether all is in a checkpoint."""
        if self._in_hand is not None:
            yield self._in_hand
        last = self._start.run.trace.num_steps
        self._start.is_saved = self._base is not None and self._base.step == last
        yield 5.0

    @property
    def _is_busy(self) -> bool:
        return self._in_hand is not None and not self._in_hand.is_done

    def _finish_cut(self, name: Name, step: int, dense: int) -> Work:
        folder = self._folder
        try:
            yield self._answers(CUT_TIMEOUT, "cut_written", name)
            yield from self._at("all written")
            cut = folder.find(name)
            if self._base is not None:
                if self._base.step not in folder.checkpoints:
                    raise Wrong(f"epoch {self._epoch}: somebody has removed its base")
                cut.files[:0] = self._base.files
            before = () if self._base is None else self._base.record_files
            cut.record_files = next_files(before, cut.written)
            yield from self._at("linked")
            if not self._rules.committed_after_rename:
                self._tell_all("committed", self._epoch, name, self._base_of(name, step))
                yield from self._at("early")
            folder.check_disk(self._process.name)
            cut = folder.find(name)
            cut.step, cut.dense = step, dense
            yield from self._at("manifest")
            folder.commit(name)
        except Failed:
            self._abandon(name)
            return
        self._base = cut
        yield from self._at("renamed")
        if self._rules.committed_after_rename:
            self._tell_all("committed", self._epoch, name, self._base_of(name, step))
        yield from self._at("told")
        for old in [old for old in folder.checkpoints if old < step]:
            folder.remove(self._epoch, old)
            yield from self._at("removed")

    def _base_of(self, name: Name, step: int) -> Any:
        return name if self._rules.cuts_by_name else step

    def _abandon(self, name: Name) -> None:
        self._tell_all("abandon", self._epoch, name)
        self._folder.discard(name)
        self._sim.point("abandoned")

    def _tell_all(self, name: str, *arguments: Any) -> list[Future]:
        """Each call is a stream of its own, so calls may change places."""
        network = self._world.network
        return [
            Stream(network, self._process, address).call(name, *arguments)
            for address in self._start.addresses
        ]

    def _answers(self, timeout: float, name: str, *arguments: Any) -> Future:
        answers = all_of(self._tell_all(name, *arguments))
        self._process.after(timeout, lambda: answers.fail("no answer"))
        return answers

    def _check_choice(self) -> None:
        newest = -1 if self._base is None else self._base.step
        if newest < self._world.newest_commit:
            raise Wrong(f"epoch {self._epoch} starts from {newest}: a later commit is lost")

    def _at(self, label: str) -> Work:
        """A place at which faults strike."""
        self._sim.point(label)
        yield self._sim.delay(0.5)
