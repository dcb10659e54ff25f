"""A run under torchrun whose processes can be found and killed, for `recovery`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bagpipe.checkpoint.files import list_checkpoints
from bagpipe.errors import ConfigError
from benchmarks.recovery.settings import NUM_TABLES, Event, RecoveryBench

_MARK = "BAGPIPE_RECOVERY"
_LOOK_EVERY_S = 0.01
_RUN = """
[data]
kind = "synthetic"
num_samples = 1_000_000_000
num_validation_samples = 64
num_embeddings = {sizes}
skew = 1.1
[embeddings]
embedding_dim = {dim}
optimizer = {{ kind = "rowwise_adagrad", lr = 0.01 }}
[model]
kind = "dlrm"
bottom = {bottom}
top = {top}
[cache]
size = {cache_rows}
lookahead = {lookahead}
[train]
batch_size = {batch_size}
steps = 1_000_000
device = "cpu"
[checkpoint]
every_steps = {every_steps}
keep = 2
[log]
folder = "{folder}"
tensorboard = false
[servers]
num_shards = 1
"""


@dataclass(frozen=True, kw_only=True)
class Died:
    """When what had to end before others could begin had ended, by the monotonic clock."""

    killed_s: float
    noticed_s: float
    ended_s: float


class Run:
    """Starts at once; `close` ends all of it."""

    def __init__(self, bench: RecoveryBench, folder: Path) -> None:
        self._bench, self._folder = bench, folder
        self._events = folder / "events.jsonl"
        self._events.touch()
        self._file = folder / "run.toml"
        group = bench.group
        self._file.write_text(
            _RUN.format(
                sizes=[group.tables[0].num_embeddings] * NUM_TABLES,
                dim=bench.embedding_dim,
                bottom=[*bench.bottom, bench.embedding_dim],
                top=[*bench.top],
                cache_rows=max(1, int(bench.cache_share * group.num_rows)),
                lookahead=bench.lookahead,
                batch_size=bench.batch_size,
                every_steps=bench.every_steps,
                folder=folder / "run",
            )
        )
        self._out = (folder / "out").open("w")
        self._launcher = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=99"),
            "--local-addr=127.0.0.1",  # else the host's name, which need not lead anywhere
            *(f"--nproc-per-node={self._bench.num_trainers}", "-m", "benchmarks.recovery.trainer"),
            *(str(self._file), str(self._events)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", _MARK: str(self._folder)}
        return subprocess.Popen(
            command, env=environment, stdout=self._out, stderr=subprocess.STDOUT
        )

    def await_filled(self) -> dict[str, float]:
        """Waits for the checkpoint of all rows; seconds of what comes before the first death."""
        began_s = time.monotonic()
        self._await("trainers that have met", lambda: "filling" in self._moments())
        self._await("every row to be written", lambda: "filled" in self._moments())
        self._await("a checkpoint of all rows", lambda: bool(self._checkpoints()))
        told = self._moments()
        return {
            "start": told["filling"] - began_s,
            "fill": told["filled"] - told["filling"],
            "checkpoint": time.monotonic() - told["filled"],
        }

    def await_checkpoint(self) -> None:
        """Waits for a checkpoint that is newer than all there are, and for some steps behind it."""
        before = set(self._checkpoints())
        self._await("a checkpoint", lambda: bool(set(self._checkpoints()) - before))
        step = self._step() + 5
        self._await("steps behind the checkpoint", lambda: self._step() >= step)

    def checkpoint_bytes(self) -> int:
        """Bytes of the newest checkpoint."""
        return sum(file.stat().st_size for file in self._checkpoints()[-1].iterdir())

    def kill(self, victim: str) -> Died:
        """Kills one process, and waits until all trainers have ended; starts a dead launcher anew.

        Raises:
            ConfigError: There is no such process, or the trainers do not end.
        """
        found = self._processes()
        trainers = [pid for name, pid in found.items() if name.startswith("rank ")]
        name = f"rank {self._bench.num_trainers - 1}" if victim == "trainer" else victim
        if name not in found:
            raise ConfigError(f"the run has no {name} to kill; its last words: {self._words()}")
        killed_s = time.monotonic()
        os.kill(found[name], signal.SIGKILL)
        others = [pid for pid in trainers if pid != found[name]]
        self._await("a trainer to notice", lambda: not all(map(_is_alive, others)), restarts=True)
        noticed_s = time.monotonic()
        self._await("trainers to end", lambda: not any(map(_is_alive, others)), restarts=True)
        ended_s = time.monotonic()
        if victim == "launcher":
            self._launcher.wait()
            self._launcher = self._launch()
        return Died(killed_s=killed_s, noticed_s=noticed_s, ended_s=ended_s)

    def await_first_step(self, since_s: float) -> dict[str, Event]:
        """The first event of each name since then, once rank 0 has trained a step."""

        def first() -> dict[str, Event]:
            found: dict[str, Event] = {}
            for event in self._told():
                if event.at_s > since_s and (event.rank == 0 or event.name == "up"):
                    found.setdefault(event.name, event)
            return found

        self._await("a step of trainers that were started again", lambda: "step" in first())
        return first()

    def close(self) -> None:
        """Kills what is left of it."""
        for pid in [self._launcher.pid, *self._others()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._launcher.wait()
        self._out.close()

    def _await(self, what: str, is_so: Callable[[], bool], *, restarts: bool = False) -> None:
        deadline = time.monotonic() + self._bench.timeout_s
        while not is_so():
            has_ended = not restarts and self._launcher.poll() is not None
            if has_ended or time.monotonic() > deadline:
                raise ConfigError(
                    f"waiting for {what}: the run has ended, or {self._bench.timeout_s:g} s are "
                    f"over; its last words: {self._words()}"
                )
            time.sleep(_LOOK_EVERY_S)

    def _words(self) -> str:
        return (self._folder / "out").read_text()[-2000:]

    def _told(self) -> list[Event]:
        lines = self._events.read_text().splitlines()
        return [Event(**json.loads(line)) for line in lines if line.endswith("}")]

    def _moments(self) -> dict[str, float]:
        return {event.name: event.at_s for event in self._told()}

    def _step(self) -> int:
        """The last step of the newest start."""
        return next((event.step for event in reversed(self._told()) if event.name == "step"), -1)

    def _checkpoints(self) -> list[Path]:
        return list_checkpoints(self._folder / "run" / "checkpoints")

    def _processes(self) -> dict[str, int]:
        found = {"launcher": self._launcher.pid}
        for pid in self._others():
            command = _of_process(pid, "cmdline")
            rank = re.search(r"(?:^|\0)RANK=(\d+)", _of_process(pid, "environ"))
            if "spawn_main" in command:
                found["oracle"] = pid
            elif "bagpipe.server.local" in command:
                found["server"] = pid
            elif "benchmarks.recovery.trainer" in command and rank is not None:
                found[f"rank {rank[1]}"] = pid
        return found

    def _others(self) -> list[int]:
        """All processes of this run but torchrun: they have inherited a variable of its own."""
        mark = f"\0{_MARK}={self._folder}\0"
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [
            pid
            for pid in found
            if pid != self._launcher.pid
            and mark in f"\0{_of_process(pid, 'environ')}\0"
            and _is_alive(pid)
        ]


def _of_process(pid: int, what: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/{what}").read_text()
    return ""


def _is_alive(pid: int) -> bool:
    fields = _of_process(pid, "stat").rpartition(")")[2].split()
    return bool(fields) and fields[0] != "Z"
