"""The actors of a run on Ray: a shard server, and a trainer."""

from __future__ import annotations

import os
import queue
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig
from bagpipe.native.interfaces import interface_of
from bagpipe.server.told import ToldServer
from bagpipe.train.loop import Result
from bagpipe.train.trainer import StopRequest, train

LOOK_EVERY_S = 0.5
"""How often an actor is asked for a sign of life."""


@dataclass(frozen=True, kw_only=True)
class ActorPlace:
    """Where an actor runs."""

    node: str
    host: str
    port: int
    """Free, for rank 0's meeting."""


class ServerActor:
    """A shard server; it lives as long as the actor."""

    def __init__(self, config: RunConfig, number: int, host: str | None, folder: str) -> None:
        from bagpipe.server.start import served_of
        from bagpipe.server.told import told_server

        _go_to(folder)
        self._stack = ExitStack()
        listen = (host or _own_host(), 0)
        self._told = self._stack.enter_context(
            told_server(served_of(config), number, listen=listen)
        )

    def told(self) -> ToldServer:
        """Where trainers reach it, and what they show it."""
        return self._told

    def look(self) -> bool:
        """A sign of life."""
        return True


class TrainerActor:
    """One rank."""

    def __init__(self, folder: str) -> None:
        _go_to(folder)
        self._told: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._stop = StopRequest()

    def place(self) -> ActorPlace:
        """Where it is."""
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return ActorPlace(node=ray.get_runtime_context().get_node_id(), host=_own_host(), port=port)

    def run(
        self,
        config: RunConfig,
        servers: Sequence[ToldServer],
        environment: dict[str, str],
        resume: bool,
        overwrite: bool,
        start_from: Path | None,
    ) -> Result:
        """Trains as this rank, to the end."""
        os.environ.update(environment)
        # else trainers meet at the address of this machine's name, which may be loopback
        if (interface := interface_of(_own_host())) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        from bagpipe.launch.torchrun import joined_trainers

        with joined_trainers(config.train.wait_timeout_s) as peers:
            return train(
                config,
                reporter=_Teller(self._told),
                resume=resume,
                overwrite=overwrite,
                start_from=start_from,
                peers=peers,
                stop=self._stop,
                servers=[told.started(config.servers or ServersConfig()) for told in servers],
            )

    def look(self) -> list[tuple[str, tuple[Any, ...]]]:
        """A sign of life, and what has been told since the last one."""
        told = []
        with suppress(queue.Empty):
            while True:
                told.append(self._told.get_nowait())
        return told

    def stop(self, number: int) -> None:
        """Asks it to end after a step, with a checkpoint."""
        self._stop.signal = signal.Signals(number)


class _Teller:
    """A reporter that keeps what it is told, for the supervisor to fetch."""

    def __init__(self, told: queue.SimpleQueue[tuple[str, tuple[Any, ...]]]) -> None:
        self._told = told
        self._advanced_at = 0.0

    def start(self, step: int, num_steps: int) -> None:
        self._told.put(("start", (step, num_steps)))

    def advance(self, step: int) -> None:
        # some a second are enough for a bar
        if time.monotonic() - self._advanced_at > LOOK_EVERY_S / 2:
            self._advanced_at = time.monotonic()
            self._told.put(("advance", (step,)))

    def show(self, averages: Any) -> None:
        self._told.put(("show", (averages,)))

    def evaluating(self, num_done: int, num_batches: int) -> None:
        self._told.put(("evaluating", (num_done, num_batches)))

    def say(self, text: str) -> None:
        self._told.put(("say", (text,)))


def _own_host() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _go_to(folder: str) -> None:
    """To the supervisor's folder, to which paths of a configuration are relative."""
    if Path(folder).is_dir():
        os.chdir(folder)
