"""A run on Ray: shard servers that outlive the trainers, and trainers that are started together.

    supervisor    this process: starts actors, asks each for a sign of life, shows rank 0's progress
    servers       an actor a shard, spread over the nodes; Ray starts one again when it dies
    trainers      an actor a rank; when one dies all of them are replaced, and resume

All that makes a restart safe is in `train()` and the servers (docs/protocol.md): the supervisor
decides nothing but who is started when. Ray Train is not used. It would start trainers again in
twice the time, in one gigabyte more, and tables must outlive the trainers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagpipe.config.run import RunConfig
from bagpipe.config.servers import ServersConfig
from bagpipe.errors import BackgroundError, BagpipeError, ConfigError, LostError, StoreError
from bagpipe.launch.actors import LOOK_EVERY_S, ServerActor, TrainerActor
from bagpipe.launch.cluster import is_own, ray_cluster
from bagpipe.server.told import ToldServer
from bagpipe.train.loop import Result
from bagpipe.train.report import Reporter
from bagpipe.train.trainer import StopRequest

LIFE_TIMEOUT_S = 30.0
"""How long an actor may owe a sign of life, by default."""
_LIFE_TIMEOUTS_S = (1.0, 86_400.0)
_LAST_WORDS_S = 10.0
"""How long trainers may take to say why they end, once the first of them has ended."""
_START_TIMEOUT_S = 120.0
_NUM_CPUS = 0.01
"""Of an actor: so little that a laptop has enough. With none Ray would place actors at random, and
also on a head that has no CPUs so that nothing runs there."""
_MAX_FAILURES = 5
"""Starts in a row in which no step was trained, after which the run is given up."""
_GO_ON = "go on from the newest checkpoint with --resume"
_RESTARTABLE = (BackgroundError, StoreError)
"""Errors of somebody else's death; all other ones come again."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """How many actors a run has, and how long one may owe a sign of life."""

    num_trainers: int
    num_servers: int
    life_timeout_s: float = LIFE_TIMEOUT_S

    def __post_init__(self) -> None:
        least, most = _LIFE_TIMEOUTS_S
        if not least <= self.life_timeout_s <= most:
            raise ConfigError(
                f"--life-timeout {self.life_timeout_s:g}: must be from {least:g} to {most:,.0f} s"
            )


def train_on_ray(
    config: RunConfig,
    roles: Roles,
    *,
    reporter: Reporter,
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    start_from: Path | None = None,
) -> Result:
    """Trains on a Ray cluster, through the death of any actor.

    Args:
        config: The run's. Where its `[servers]` has addresses, no servers are started.
        roles: How many actors to start.
        reporter: Told what rank 0 tells, and of deaths.
        address: The cluster's; None: the one of this environment, or a new one on this machine.
        resume: Whether to go on from the newest checkpoint; a restart always does.
        overwrite: Whether the first start may remove the checkpoints of an earlier run.
        start_from: As for `train`.

    Raises:
        ConfigError: Ray is not installed, is not at that address, or has too few GPUs.
        LostError: Actors died in start after start, or after a signal that ends the run.
        BagpipeError: What a trainer raised that another start would not mend.
    """
    with ray_cluster(address) as ray, ExitStack() as stack:
        servers = _Servers(ray, config, roles)
        stack.callback(servers.end)
        stop, failures = stack.enter_context(StopRequest()), 0
        while True:
            trainers = _Trainers(ray, servers, roles, reporter, start_from)
            try:
                return trainers.run(stop, resume=resume, overwrite=overwrite)
            except _DiedError as death:
                failures = 0 if trainers.num_steps else failures + 1
                if stop.signal is not None:
                    raise LostError(
                        f"{stop.signal.name} came, and then {death}: the last steps may be in "
                        f"no checkpoint: {_GO_ON}"
                    ) from death
                if failures == _MAX_FAILURES:
                    raise LostError(
                        f"given up after {failures} starts without a step: {death}: mend the "
                        f"cause, of which trainers and servers may have printed more; {_GO_ON}"
                    ) from death
                reporter.say(f"{death}; all trainers start again")
                resume, overwrite = True, False
            finally:
                trainers.end()


class _DiedError(Exception):
    """An actor is gone; all trainers are to be started again."""


class _Servers:
    """The servers of all shards."""

    def __init__(self, ray: Any, config: RunConfig, roles: Roles) -> None:
        self._ray, self._timeout_s = ray, roles.life_timeout_s
        self.config = config
        """For trainers, too."""
        where = config.servers or ServersConfig()
        self._actors: list[Any] = []
        if where.addresses:
            return
        where = where.model_copy(update={"num_shards": roles.num_servers})
        self.config = config.model_copy(update={"servers": where})
        # nodes may join any other cluster, also one that has a single node now
        host = "127.0.0.1" if is_own(ray) else None
        actor = ray.remote(ServerActor).options(
            num_cpus=_NUM_CPUS,
            max_restarts=-1,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
        )
        self._actors = [
            actor.remote(self.config, number, host, os.getcwd())
            for number in range(roles.num_servers)
        ]

    def told(self) -> list[ToldServer]:
        """Where they are now, once all are up; none where the configuration has their addresses."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            asked = [actor.told.remote() for actor in self._actors]
            try:
                told: list[ToldServer] = self._ray.get(asked, timeout=_START_TIMEOUT_S)
                return told
            except self._ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, BagpipeError):
                    raise error.cause from None
                raise
            except self._ray.exceptions.ActorDiedError as error:
                raise StoreError(
                    f"a shard server can't be started: {_last_line(error)}: see what it printed"
                ) from None
            except self._ray.exceptions.RayError as error:  # Ray is starting it again
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"a shard server did not start within {_START_TIMEOUT_S:g} s: "
                        f"{_first_line(error)}"
                    ) from None
                time.sleep(LOOK_EVERY_S)

    def check(self) -> None:
        """Replaces servers that do not answer. _DiedError: one did not."""
        looks = [actor.look.remote() for actor in self._actors]
        for number, (actor, look) in enumerate(zip(self._actors, looks, strict=True)):
            try:
                self._ray.get(look, timeout=self._timeout_s)
            except self._ray.exceptions.GetTimeoutError:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.kill(actor, no_restart=False)
                raise _DiedError(
                    f"shard server {number} has given no sign of life for {self._timeout_s:g} s"
                ) from None
            except self._ray.exceptions.RayError:
                raise _DiedError(f"shard server {number} is gone") from None

    def end(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)


class _Trainers:
    """One start of all trainers."""

    def __init__(
        self,
        ray: Any,
        servers: _Servers,
        roles: Roles,
        reporter: Reporter,
        start_from: Path | None,
    ) -> None:
        self._ray, self._servers, self._reporter = ray, servers, reporter
        self._told = servers.told()
        self._start_from, self._timeout_s = start_from, roles.life_timeout_s
        self.num_steps = 0
        """Told by rank 0 since this start."""
        wants_gpu = (
            servers.config.train.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        )
        actor = ray.remote(TrainerActor).options(
            num_cpus=_NUM_CPUS,
            num_gpus=int(wants_gpu),
            max_restarts=0,
            max_concurrency=3,
            scheduling_strategy="SPREAD",
        )
        self._actors = [actor.remote(os.getcwd()) for _ in range(roles.num_trainers)]

    def run(self, stop: StopRequest, *, resume: bool, overwrite: bool) -> Result:
        """Trains to the end. _DiedError: somebody has died."""
        results = self._start(resume=resume, overwrite=overwrite)
        is_told = False
        while True:
            ended, _ = self._ray.wait(results, num_returns=len(results), timeout=LOOK_EVERY_S)
            if len(ended) == len(results) or any(map(self._has_failed, ended)):
                break
            self._look()
            self._servers.check()
            if stop.signal is not None and not is_told:
                is_told = True
                for actor in self._actors:
                    actor.stop.remote(int(stop.signal))
        return self._outcome(results)

    def end(self) -> None:
        """Ends all trainers, those that are stopped, too."""
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _start(self, *, resume: bool, overwrite: bool) -> list[Any]:
        try:
            places = self._ray.get(
                [actor.place.remote() for actor in self._actors], timeout=_START_TIMEOUT_S
            )
        except self._ray.exceptions.GetTimeoutError:
            raise ConfigError(
                f"the Ray cluster did not start {len(self._actors)} trainers within "
                f"{_START_TIMEOUT_S:g} s: it has too few GPUs, no free CPU, or no memory: start "
                "fewer, or add nodes"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise _DiedError(f"a trainer died at its start ({_first_line(error)})") from None
        # ranks of a node are neighbours
        order = sorted(range(len(places)), key=lambda index: (places[index].node, index))
        self._actors = [self._actors[index] for index in order]
        places = [places[index] for index in order]
        nodes = [place.node for place in places]
        meeting = {"MASTER_ADDR": places[0].host, "MASTER_PORT": str(places[0].port)}
        return [
            actor.run.remote(
                self._servers.config,
                self._told,
                meeting
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(places)),
                    "LOCAL_RANK": str(nodes[:rank].count(nodes[rank])),
                    "LOCAL_WORLD_SIZE": str(nodes.count(nodes[rank])),
                    "GROUP_RANK": nodes[rank],
                },
                resume,
                overwrite,
                self._start_from,
            )
            for rank, actor in enumerate(self._actors)
        ]

    def _look(self) -> None:
        """Shows what rank 0 has told. _DiedError: a trainer is gone, or gives no sign of life."""
        looks = [actor.look.remote() for actor in self._actors]
        for rank, look in enumerate(looks):
            try:
                told = self._ray.get(look, timeout=self._timeout_s)
            except self._ray.exceptions.GetTimeoutError:
                raise _DiedError(
                    f"rank {rank} has given no sign of life for {self._timeout_s:g} s"
                ) from None
            except self._ray.exceptions.RayError as error:
                raise _DiedError(f"rank {rank} is gone ({_first_line(error)})") from None
            for name, arguments in told if rank == 0 else ():
                self.num_steps += name == "advance"
                getattr(self._reporter, name)(*arguments)

    def _has_failed(self, result: Any) -> bool:
        try:
            self._ray.get(result)
        except self._ray.exceptions.RayError:
            return True
        return False

    def _outcome(self, results: Sequence[Any]) -> Result:
        """Rank 0's result, or the error that says most of why there is none."""
        self._ray.wait(list(results), num_returns=len(results), timeout=_LAST_WORDS_S)
        errors: list[tuple[int, BaseException]] = []
        for rank, result in enumerate(results):
            try:
                self._ray.get(result, timeout=0)
            except self._ray.exceptions.RayTaskError as error:
                errors.append((rank, error.cause))
            except self._ray.exceptions.GetTimeoutError:
                continue  # it waits for the one that has failed, which says why
            except self._ray.exceptions.RayError as error:
                errors.append((rank, error))
        with suppress(_DiedError):
            self._look()
        for _, cause in errors:
            if isinstance(cause, BagpipeError) and not isinstance(cause, _RESTARTABLE):
                raise cause
        if errors:
            rank, cause = errors[0]
            raise _DiedError(f"rank {rank} has ended ({_first_line(cause)})")
        outcome: Result = self._ray.get(results[0])
        return outcome


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
