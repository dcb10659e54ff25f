"""Trainers started by torchrun.

The command is `torchrun --nproc-per-node=N -m bagpipe train run.toml`, with `--nnodes` on several
hosts.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from bagpipe.distributed.alone import ALONE, Peers
from bagpipe.distributed.communicator import Communicator
from bagpipe.distributed.trainers import Launcher

_LOOK_AFTER = timedelta(seconds=1)
"""How long a rank waits for rank 0's answer before it looks whether there is another rank 0."""
_MEETING = "bagpipe/meeting"
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"

_EXIT_SECONDS = 10
"""How long a rank that failed, or whose launcher has ended, may take to end before it is killed."""


@contextmanager
def joined_trainers(wait_timeout_s: float) -> Iterator[Peers]:
    """This process's connections to the other trainers, of whom there may be none.

    A rank waits `wait_timeout_s` for another one, also for rank 0 while that saves.
    """
    num_trainers = int(os.environ.get("WORLD_SIZE", "1"))
    if num_trainers == 1:
        yield ALONE
        return
    if torchrun_launcher() is not None:
        end_with(os.getppid())
    num_on_host = int(os.environ.get("LOCAL_WORLD_SIZE", num_trainers))
    backend = "gloo"
    if torch.cuda.device_count() >= num_on_host and dist.is_nccl_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=wait_timeout_s)
    store, rank, _ = next(rendezvous("env://", timeout=timeout))
    store = meet(store, rank, num_trainers, timeout)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=num_trainers, timeout=timeout
    )
    try:
        yield Communicator.from_default_group(timeout=timeout)
    except BaseException:
        # A thread may wait for messages that never come, and the interpreter for it. Once this
        # process is gone the others see it.
        if threading.current_thread() is threading.main_thread():
            end_soon()
        raise
    dist.destroy_process_group()


def end_with(launcher: int, within_s: float = _EXIT_SECONDS) -> None:
    """Lets this process end so soon after the process that has started it, if need be by force.

    Nobody would start the trainers again. Most notice it, since the place where they meet is gone,
    too. But one that waits for its oracle process, which waits for another trainer, would not.
    """

    def wait() -> None:
        with suppress(ProcessLookupError):  # it is gone already
            select.select([os.pidfd_open(launcher)], [], [])
        time.sleep(within_s)
        with suppress(OSError, ValueError):  # who read it may be gone, too
            sys.stderr.write(
                f"error: the process that started this trainer ({launcher}) has ended: start it "
                "again with --resume, and the run goes on from its newest checkpoint\n"
            )
        os._exit(2)

    threading.Thread(target=wait, name="launcher", daemon=True).start()


def end_soon() -> None:
    """Lets this process end once its error is told, without taking its objects apart.

    That would take seconds, and more on a busy machine, in which the others wait to start again.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_EXIT_SECONDS)
    atexit.register(_end_at_once)


def _end_at_once() -> None:
    logging.shutdown()
    for told in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            told.flush()
    # as the interpreter would: an error was printed with its traceback, or else in one sentence
    os._exit(1 if hasattr(sys, "last_value") else 2)


def torchrun_launcher() -> Launcher | None:
    """The torchrun that has started this process; None: none has."""
    run, restarts = os.environ.get("TORCHELASTIC_RUN_ID"), os.environ.get(_RESTARTS, "0")
    if run is None:
        return None
    where = [os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")]
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # else rank 0 may be on another one later
        where.append(socket.gethostname())
    return Launcher(name=" ".join(["torchrun", run, *where]), is_restart=restarts != "0")


def meet(store: Store, rank: int, num_trainers: int, timeout: timedelta) -> Store:
    """A part of the key-value store that this start of the trainers alone uses.

    torchrun keeps its store when it starts trainers again. The addresses of those before are still
    there, and a rank that is faster than the others would take them for theirs. So rank 0 draws a
    name, and the others wait for its answer under that name, which an older rank 0 does not give.

    Raises:
        DistError: Not all ranks have come within `timeout`.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set(_MEETING, own)
        for other in range(1, num_trainers):
            here = f"bagpipe/{own}/here/{other}"
            store.wait([here], timeout)
            store.set(f"bagpipe/{own}/seen/{store.get(here).decode()}", "")
        return PrefixStore(own, store)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        store.wait([_MEETING], timeout)
        start = store.get(_MEETING).decode()
        store.set(f"bagpipe/{start}/here/{rank}", own)
        try:
            store.wait([f"bagpipe/{start}/seen/{own}"], _LOOK_AFTER)
        except (RuntimeError, dist.DistError):
            if time.monotonic() > deadline:
                raise
        else:
            return PrefixStore(start, store)
