"""Programs that fork while they train, run by `test_fork` in a process of their own:
`python -m tests.native.forking FOLDER NAME...`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch
from tests.embeddings.test_lookahead import Batch, Picklable, make_embeddings
from tests.soon import SOON_S, TIMEOUT_S

import bagpipe
from bagpipe.checkpoint.run_folder import claim_run_folder
from bagpipe.errors import UsageError
from bagpipe.feed.source import ProcessSource
from bagpipe.native.jit import is_compiling
from bagpipe.types import Jagged

NUM_BATCHES = 60


def fork(in_child: Callable[[], object]) -> int:
    """Forks; the child leaves as programs do."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(SOON_S))  # instead of waiting for ever
        in_child()
        sys.exit(0)
    return pid


def wait_for(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def go_on(folder: Path) -> None:
    """Children of two kinds that leave, within the stream's block, disturb nothing."""
    embeddings, expected = make_embeddings(), make_embeddings()
    numbers = []
    with bagpipe.lookahead(
        Picklable(NUM_BATCHES), embeddings, cache=70, oracle="process"
    ) as stream:
        for batch in stream:
            embeddings(batch.sparse).values().sum().backward()
            numbers.append(batch.number)
            if batch.number == 5:
                wait_for(fork(lambda: None))
            if batch.number == 8:
                helper = multiprocessing.get_context("fork").Process(target=sys.exit)
                helper.start()
                helper.join()
    assert numbers == list(range(NUM_BATCHES)), numbers
    for batch in bagpipe.lookahead(Picklable(NUM_BATCHES), expected, cache=70):
        expected(batch.sparse).values().sum().backward()
    assert torch.equal(embeddings.tables()["t"][:], expected.tables()["t"][:])


def die(folder: Path) -> None:
    """Is killed while a child lives; tells its pid and that of the oracle process."""
    embeddings = make_embeddings()
    with claim_run_folder(folder):
        stream = bagpipe.lookahead(Picklable(10**6), embeddings, cache=70, oracle="process")
        next(stream)
        assert isinstance(stream._source, ProcessSource)
        assert stream._source.process._process is not None
        reads, writes = os.pipe()
        child = fork(lambda: (signal.alarm(0), os.write(writes, b"!"), time.sleep(TIMEOUT_S)))
        os.read(reads, 1)  # it has let go of what it inherits
        (folder / "pids").write_text(f"{child} {stream._source.process._process.pid}")
        os.kill(os.getpid(), signal.SIGKILL)


def use(folder: Path) -> None:
    """A child that goes on with what it inherits is told what it can't use, and can use the
    rest.
    """
    torch.set_num_threads(2)
    embeddings = make_embeddings()
    large = Jagged(keys=("f",), values=np.arange(4096) % 1000, batch_size=4096)
    expected = embeddings.eval()(large).values()  # with the kernels' threads
    wait_for(fork(lambda: check(torch.equal(embeddings(large).values(), expected))))
    embeddings.train()
    stream = bagpipe.lookahead(Picklable(NUM_BATCHES), embeddings, cache=70)
    batch = next(stream)

    def use_all() -> None:
        for call in (lambda: next(stream), embeddings.tables, embeddings.stop, embeddings.flush):
            try:
                call()
            except UsageError as error:
                check(f"was forked from {os.getppid()}" in str(error))
            else:
                raise AssertionError("a child could use what it can't")
        stream.close()
        embeddings.close()

    wait_for(fork(use_all))
    embeddings(batch.sparse).values().sum().backward()
    rest: list[Batch] = list(stream)
    assert len(rest) == NUM_BATCHES - 1


def compile_meanwhile(folder: Path) -> None:
    """No child is forked in the middle of a compilation, whose half it would free."""

    def compile_many() -> None:
        for number in range(12):
            numba.njit(lambda x, number=number: x + number)(1.0)

    thread = threading.Thread(target=compile_many)
    thread.start()
    while thread.is_alive():
        time.sleep(0.01)
        wait_for(fork(lambda: check(not is_compiling())))


def check(is_right: bool) -> None:
    assert is_right


if __name__ == "__main__":
    programs = {"go_on": go_on, "die": die, "use": use, "compile": compile_meanwhile}
    for name in sys.argv[2:]:
        programs[name](Path(sys.argv[1]))
