"""A run of two trainers over shard servers, of which processes are killed or stopped at random.

Up to seed 69 the trainers start a server on their host, and faults come after random steps. From
then on there are two servers at given addresses, and faults come within a flush, a cut or a
recovery (`tests/train/phases.py`).

As a program it tries seeded cases, or those that are named: `python -m tests.train.kills 0 1 2`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.processes import is_alive, of_process
from tests.train.phases import LASTS_S, PHASES, num_told
from tests.train.phases import VARIABLE as PHASES_FILE
from tests.train.test_servers import dense_of, tables_of

from bagpipe.checkpoint.files import list_checkpoints

NUM_STEPS = 160
RUN = """
[data]
kind = "synthetic"
num_samples = 20000
num_validation_samples = 500
num_embeddings = [3000, 500, 40]
num_dense = 3
[embeddings]
embedding_dim = 4
optimizer = {{ kind = "adagrad", lr = 0.05 }}
[model]
kind = "dlrm"
bottom = [8, 4]
top = [8, 1]
[cache]
size = "10%"
lookahead = 5
[train]
batch_size = 64
steps = {steps}
wait_timeout_s = {wait_timeout_s}
[checkpoint]
every_steps = 30
every_s = 3.0
keep = 2
[log]
folder = "{folder}"
every_steps = 10
tensorboard = false
[servers]
addresses = {addresses}
timeout_s = 20.0
start_timeout_s = 30.0
"""
VICTIMS = ("rank 0", "rank 1", "oracle", "server", "launcher")
SERVERS = ("server 0", "server 1")
NUM_SEEDS = 100
FIRST_IN_PHASES = 70
"""From this seed on there are two servers at addresses, and faults come within phases."""
_LIMIT_S = 240.0
_WAIT_TIMEOUT_S = 45.0
"""After which a trainer gives up one that is stopped."""
_SERVER_STOPS_S = 25.0
"""For which a server at an address is stopped: longer than its trainers wait."""
_FOLDER = "RUN_OF_A_TEST"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to whom, and when."""

    victims: tuple[str, ...]
    at_step: int
    delay_s: float = 0.0
    stops: bool = False
    """Whether it is stopped, and goes on once it has been replaced, rather than killed."""
    phase: str = ""
    """In the next one of these after that step; empty: anywhere."""

    def __str__(self) -> str:
        where = f" in a {self.phase}" if self.phase else ""
        return (
            f"{' and '.join(self.victims)} {'stopped' if self.stops else 'killed'} "
            f"{self.delay_s:.2f} s{where} after step {self.at_step}"
        )


def random_faults(seed: int) -> list[Fault]:
    """One or two faults; two victims at a time in every fifth case.

    From seed 60 on trainers and oracles are stopped, too.
    """
    draw = random.Random(seed)
    if seed >= FIRST_IN_PHASES:
        return _faults_in_a_phase(draw, PHASES[seed % len(PHASES)])
    stoppable = {"server"} if seed < 60 else set(VICTIMS) - {"launcher"}
    faults = []
    for _ in range(draw.choice([1, 1, 2])):
        victims = tuple(draw.sample(VICTIMS, 2 if draw.random() < 0.2 else 1))
        faults.append(
            Fault(
                victims=victims,
                at_step=draw.choice([0, 10, 40, 60, 80, 120, 150]),
                delay_s=draw.random(),
                stops=len(victims) == 1 and victims[0] in stoppable and draw.random() < 0.4,
            )
        )
    return sorted(faults, key=lambda fault: fault.at_step)


def _faults_in_a_phase(draw: random.Random, phase: str) -> list[Fault]:
    """One fault within the phase; before a recovery another one, which leads to it."""
    everyone = [name for name in VICTIMS if name != "server"] + list(SERVERS)
    victims = tuple(draw.sample(everyone, 2 if draw.random() < 0.3 else 1))
    at_step = draw.choice([0, 10, 40, 60, 80, 100])
    fault = Fault(
        victims=victims,
        at_step=at_step,
        delay_s=draw.uniform(0.0, LASTS_S),
        stops=len(victims) == 1 and victims[0] in SERVERS and draw.random() < 0.3,
        phase=phase,
    )
    if phase != "recovery":
        return [fault]
    first = draw.choice(["rank 0", "rank 1", *SERVERS])
    return [Fault(victims=(first,), at_step=at_step, delay_s=draw.random()), fault]


def write_run(
    folder: Path,
    *,
    steps: int = NUM_STEPS,
    wait_timeout_s: float = 1800.0,
    addresses: Sequence[str] = (),
) -> Path:
    file = folder / "run.toml"
    text = RUN.format(
        folder=folder / "run",
        steps=steps,
        wait_timeout_s=wait_timeout_s,
        addresses=list(addresses),
    )
    file.write_text(text)
    return file


def _free_addresses(number: int) -> list[str]:
    with ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in found]


class Run:
    """A run under torchrun, started again by hand where torchrun itself is killed."""

    def __init__(
        self, folder: Path, *, stops_trainers: bool = False, in_phases: bool = False
    ) -> None:
        wait_timeout_s = _WAIT_TIMEOUT_S if stops_trainers else 1800.0
        addresses = _free_addresses(len(SERVERS)) if in_phases else []
        self.folder = folder
        self._file = write_run(folder, wait_timeout_s=wait_timeout_s, addresses=addresses)
        self._phases = folder / "phases"
        self._module = "tests.train.phases" if in_phases else "bagpipe"
        self._stopped: list[int] = []
        self.hits: list[str] = []
        """Who was there to be killed or stopped."""
        self._out = (folder / "out").open("a")
        self._servers = {name: self._serve(name) for name in SERVERS[: len(addresses)]}
        self._launcher = self._launch()

    def _launch(self) -> subprocess.Popen[bytes]:
        return self._start(
            *("torch.distributed.run", "--standalone", "--max-restarts=9", "--nproc-per-node=2"),
            *("-m", self._module, "train", str(self._file), "--resume"),
        )

    def _serve(self, name: str) -> subprocess.Popen[bytes]:
        return self._start(self._module, "serve", str(self._file), "--shard", name[-1])

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        own = {"OMP_NUM_THREADS": "1", _FOLDER: str(self.folder), PHASES_FILE: str(self._phases)}
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=os.environ | own,
            stdout=self._out,
            stderr=subprocess.STDOUT,
        )

    def finish(self, faults: list[Fault]) -> None:
        """Lets the faults happen, and waits for the end. AssertionError: it does not come."""
        for fault in faults:
            if not self._await(lambda fault=fault: self._step() >= fault.at_step):  # type: ignore[misc]
                break
            before = num_told(self._phases, fault.phase)
            if fault.phase and not self._await(
                lambda fault=fault, before=before: num_told(self._phases, fault.phase) > before  # type: ignore[misc]
            ):
                break
            time.sleep(fault.delay_s)
            self._strike(fault)
        self._await(lambda: self._launcher.poll() is not None)
        assert self._launcher.returncode == 0, self.output()
        for pid in self._stopped:  # replaced: what it still does must harm nobody
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for server in self._servers.values():
            server.terminate()
        self._out.close()

    def _strike(self, fault: Fault) -> None:
        found = self._processes()
        hit = [name for name in fault.victims if name in found]
        self.hits += hit
        for name in hit:
            with suppress(ProcessLookupError):
                os.kill(found[name], signal.SIGSTOP if fault.stops else signal.SIGKILL)
        for name in hit:
            if name not in self._servers:
                self._stopped += [found[name]] if fault.stops else []
            elif fault.stops:  # nobody can replace it at its address
                time.sleep(_SERVER_STOPS_S)
                os.kill(found[name], signal.SIGCONT)
            else:
                self._servers[name].wait()
                self._servers[name] = self._serve(name)
        if "launcher" in fault.victims:
            self._launcher.wait()
            self._launcher = self._launch()  # at once: its trainers may still be there

    def output(self) -> str:
        return (self.folder / "out").read_text()[-6000:]

    def kill(self) -> None:
        """Ends all that is left."""
        for pid in [self._launcher.pid, *self._others()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._launcher.wait()
        self._out.close()

    def orphans(self) -> list[int]:
        """Processes of this run that are still there some seconds after its end."""
        deadline = time.monotonic() + 30
        while (left := self._others()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _await(self, is_so: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + _LIMIT_S
        while not is_so():
            if self._launcher.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)
        return True

    def _step(self) -> int:
        """The latest step that was told, in any of the starts."""
        log = self.folder / "run" / "log.jsonl"
        with suppress(OSError):
            steps = re.findall(r'"step": (\d+)', log.read_text())
            return int(steps[-1]) if steps else -1
        return -1

    def _processes(self) -> dict[str, int]:
        found = {"launcher": self._launcher.pid}
        for pid in self._others():
            command, variables = of_process(pid, "cmdline"), of_process(pid, "environ")
            rank = re.search(r"(?:^|\0)RANK=(\d)", variables)
            if "spawn_main" in command:
                found["oracle"] = pid
            elif "bagpipe.server.local" in command:
                found["server"] = pid
            elif f"{self._module}\0train" in command and rank is not None:
                found[f"rank {rank[1]}"] = pid
        return found | {name: server.pid for name, server in self._servers.items()}

    def _others(self) -> list[int]:
        """All processes of this run but torchrun: they have inherited a variable of its own."""
        mark = f"\0{_FOLDER}={self.folder}\0"
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
        return [
            pid
            for pid in found
            if mark in f"\0{of_process(pid, 'environ')}\0"
            and is_alive(pid)
            and pid != self._launcher.pid
        ]


def assert_ends_as_undisturbed(folder: Path, faults: list[Fault], undisturbed: Path) -> list[str]:
    """Trains in `folder` with faults: the same parameters to the bit, and nothing is left.

    Returns:
        Who was killed or stopped.
    """
    stopped = {victim for fault in faults if fault.stops for victim in fault.victims}
    run = Run(
        folder,
        stops_trainers=bool(stopped - {"server", *SERVERS}),
        in_phases=any(fault.phase for fault in faults),
    )
    try:
        run.finish(faults)
        assert list_checkpoints(folder / "run" / "checkpoints"), run.output()
        assert dense_of(folder / "run") == dense_of(undisturbed / "run"), faults
        assert tables_of(folder / "run") == tables_of(undisturbed / "run"), faults
        assert run.orphans() == [], run.output()
    finally:
        run.kill()
    return run.hits


def train_undisturbed(folder: Path) -> None:
    """A whole run in `folder`; nothing of it is left, also where this is interrupted."""
    run = Run(folder)
    try:
        run.finish([])
    finally:
        run.kill()


def main(seeds: list[int]) -> int:
    """Tries all cases, and tells of each as a row of a table.

    Returns:
        How many did not end as they should.
    """
    num_failed = 0
    with tempfile.TemporaryDirectory() as name:
        undisturbed = Path(name) / "undisturbed"
        undisturbed.mkdir()
        train_undisturbed(undisturbed)
        for seed in seeds:
            folder, faults = Path(name) / str(seed), random_faults(seed)
            folder.mkdir()
            started = time.monotonic()
            try:
                hits = ", ".join(assert_ends_as_undisturbed(folder, faults, undisturbed))
            except AssertionError as error:
                num_failed, hits = num_failed + 1, f"FAILED: {error}"
            elapsed_s = time.monotonic() - started
            what = "; ".join(map(str, faults))
            sys.stdout.write(f"| {seed} | {what} | {hits} | {elapsed_s:.0f} |\n")
            sys.stdout.flush()
    return num_failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started is ended
    sys.exit(main([int(seed) for seed in sys.argv[1:]] or list(range(NUM_SEEDS))))
