"""Calls to all shard servers at once: who they are, and rank 0's for epochs and cuts.

No call is repeated. Errors name the server by its shard and address, and the epoch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as flight
from pydantic import ValidationError

from bagpipe.config.servers import split_address
from bagpipe.errors import StoreError
from bagpipe.server import calls, wire
from bagpipe.server.credentials import Credentials
from bagpipe.server.security import connect, reason
from bagpipe.server.shard import Checkpoint
from bagpipe.store.record_files import RecordFile
from bagpipe.types import Group

TIMEOUT_S = 900.0
"""How long a server may owe an answer, by default: longer than it waits for marks."""
START_TIMEOUT_S = 60.0
"""How long a server may take to say who it is, by default."""
BEGIN_TIMEOUT_S = 1200.0
"""How long a server may take to load a checkpoint, or to write a cut, by default."""

_LIMITS = {"identify": "start_timeout_s", "begin": "begin_timeout_s", "cut": "begin_timeout_s"}
"""By kind of call what limits it, as `[servers]` names it; all others `timeout_s` does."""

Answer = TypeVar("Answer", bound=calls.Message)
Result = TypeVar("Result")


class ServerControl:
    """Connections to all shard servers, and the calls of an epoch.

    Attributes:
        epoch: That which has begun, for messages and errors.
        clients: One a shard.
        staging: Where each server's host reaches it by shared memory.
        runs: The run whose tables each server holds; empty: none yet.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        groups: Sequence[Group],
        seed: int,
        credentials: Credentials | Sequence[Credentials] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        begin_timeout_s: float = BEGIN_TIMEOUT_S,
        run_folder: Path | None = None,
    ) -> None:
        """Asks every server who it is.

        Args:
            addresses: "host:port" of each shard's server, in order.
            groups: All groups of the run.
            seed: What initial records are drawn from.
            credentials: This trainer's; those of each shard, where they differ.
            timeout_s: How long a call may take, except for those below.
            start_timeout_s: How long a server may take to say who it is.
            begin_timeout_s: How long it may take to begin an epoch, to write a cut, or to send all
                of its rows.
            run_folder: The run's, as this host sees it: servers are told paths within it, which
                they may see elsewhere. None: they are told paths as they are.

        Raises:
            StoreError: A server does not answer, or has another shard or other tables.
        """
        self.epoch: int | None = None
        self.timeout_s, self.begin_timeout_s = timeout_s, begin_timeout_s
        self.start_timeout_s, self._run_folder = start_timeout_s, run_folder
        self._addresses = tuple(addresses)
        self._tables = calls.fingerprint(tuple(groups), seed)
        if not isinstance(credentials, Sequence):
            credentials = [credentials or Credentials()] * len(addresses)
        self.clients: list[flight.FlightClient] = []
        try:
            self.clients = [
                connect(*split_address(at), each)
                for at, each in zip(self._addresses, credentials, strict=True)
            ]
            found = self._on_all(self._identify)
            self.staging = tuple(each.staging for each in found)
            self.runs = tuple(each.run for each in found)
        except BaseException:
            self.close()
            raise

    @property
    def num_shards(self) -> int:
        """How many servers there are."""
        return len(self._addresses)

    def check_run(self, run: str | None) -> None:
        """Raises StoreError where a server holds the tables of another run.

        `run` is the name of the one that is to begin, None where it has none yet. A server refuses
        it, too, but then the run's folder has been claimed.
        """
        for shard, found in enumerate(self.runs):
            if found not in ("", run):
                other = StoreError(
                    f"it holds the tables of run {found!r}, not of {run or 'a new one'!r}: restart "
                    "it, or give each run servers of its own"
                )
                raise self.failed(shard, "to be the one wanted", other)

    def begin(
        self, epoch: int, num_ranks: int, checkpoint: Checkpoint | None = None, *, run: str = ""
    ) -> tuple[str, ...]:
        """Opens an epoch on all servers, see `Shard.begin`; rank 0 alone calls it.

        Returns:
            The instance of each server, which all ranks need to join.

        Raises:
            StoreError: A server refuses, or can't read the checkpoint; the start has failed.
        """
        self.epoch = epoch
        if checkpoint is not None:
            checkpoint = replace(checkpoint, folder=self._within(checkpoint.folder))
        call = calls.Begin(epoch=epoch, num_ranks=num_ranks, checkpoint=checkpoint, run=run)
        begun = self._call_all("begin", call, calls.Begun)
        return tuple(each.instance for each in begun)

    def cut(
        self, number: int, folder: Path, *, is_whole: bool = False
    ) -> Callable[[], list[tuple[RecordFile, ...]]]:
        """Takes the cut `epoch.number` on all servers; rank 0 alone calls it, after all flushes.

        When this returns trainers may go on.

        Args:
            number: Counts the epoch's cuts from 1 on.
            folder: Where servers write their files.
            is_whole: Whether all rows are wanted, since the base's files are gone.

        Returns:
            What waits until all files are on disk, and returns what the manifest says of them: by
            group, one of each shard.

        Raises:
            StoreError: A server refuses, at once or from what waits: abandon the cut then.
        """
        call = calls.Cut(
            epoch=self._epoch(), number=number, folder=self._within(folder), is_whole=is_whole
        )

        def take(shard: int) -> Any:
            answers = self._answers(shard, "cut", call)
            self._next(shard, answers, "cut", calls.Taken)
            return answers

        answers = self._on_all(take, self.timeout_s)  # trainers wait for this

        def written() -> list[tuple[RecordFile, ...]]:
            found = self._on_all(
                lambda shard: self._next(shard, answers[shard], "cut", calls.Written)
            )
            return list(zip(*(each.files for each in found), strict=True))

        return written

    def committed(self, number: int) -> bool:
        """The cut's checkpoint is in place, see `Shard.committed`; rank 0 alone calls it.

        Returns:
            Whether all servers had it in hand. The next cut of one that had not has more rows.

        Raises:
            StoreError: A server did not take it; nothing is lost by that either.
        """
        call = calls.End(epoch=self._epoch(), number=number)
        ended = self._call_all("committed", call, calls.Ended)
        return all(each.was_in_hand for each in ended)

    def abandon(self, number: int) -> None:
        """The cut has failed, see `Shard.abandon`; rank 0 alone calls it.

        No answer is waited for, since a server that stands still may be why the cut has failed. The
        next cut abandons this one, too.
        """
        call = calls.End(epoch=self._epoch(), number=number)
        for shard in range(self.num_shards):
            _in_background(partial(self._call, shard, "abandon", call, calls.Ended))

    def clear(self, instances: Sequence[str], group: int) -> None:
        """Forgets the records of a group on all servers, see `Shard.clear`.

        Raises:
            StoreError: A server refuses.
        """
        epoch = self._epoch()
        self._on_all(
            lambda shard: self._call(
                shard,
                "clear",
                calls.Clear(epoch=epoch, instance=instances[shard], group=group),
                calls.Ended,
            )
        )

    def close(self) -> None:
        """Ends the connections; who waits for a server is not waited for. May be called twice."""
        for client in self.clients:
            client.close()

    def failed(
        self, shard: int, doing: str, error: Exception, then: str = "start all trainers again"
    ) -> StoreError:
        """An error that names the server; `doing` says at what it came, `then` what follows."""
        text = reason(error)
        return StoreError(
            f"shard server {shard} of {self.num_shards} at {self._addresses[shard]} failed "
            f"{doing}: {text}. See that it runs and what it logs, then {then}"
        )

    def _within(self, folder: Path) -> Path:
        """The folder as servers are told it."""
        if self._run_folder is None:
            return folder
        return folder.resolve().relative_to(self._run_folder.resolve())

    def _epoch(self) -> int:
        assert self.epoch is not None, "no epoch has begun"
        return self.epoch

    def _identify(self, shard: int) -> calls.Identity:
        found = self._call(shard, "identify", calls.Ask(), calls.Identity)
        wanted = {
            "version": wire.VERSION,
            "num_shards": self.num_shards,
            "shard": shard,
            "tables": self._tables,
        }
        for name, value in wanted.items():
            if getattr(found, name) != value:
                what = f"its {name} is {getattr(found, name)}, here it is {value}"
                if name == "tables":  # a hash, which tells nobody anything
                    what = "it has other tables, another optimizer or another seed"
                other = StoreError(
                    f"{what}: start servers and trainers with one configuration, and give "
                    "addresses in the order of the shards"
                )
                raise self.failed(shard, "to be the one wanted", other)
        return found

    def _on_all(self, ask: Callable[[int], Result], timeout_s: float | None = None) -> list[Result]:
        """Asks all servers at once, and raises the first one's error once all have answered.

        One that has not within `timeout_s` has failed; None: `ask` ends by itself.
        """
        asked = [_in_background(partial(ask, shard)) for shard in range(self.num_shards)]
        late = wait(asked, timeout_s).not_done
        for shard, each in enumerate(asked):
            if each in late:
                error = StoreError(
                    f"it has not answered for {timeout_s:g} s, which servers.timeout_s allows"
                )
                raise self.failed(shard, f"in epoch {self.epoch}", error)
        return [each.result() for each in asked]

    def _call_all(self, kind: str, call: calls.Message, form: type[Answer]) -> list[Answer]:
        return self._on_all(lambda shard: self._call(shard, kind, call, form))

    def _call(self, shard: int, kind: str, call: calls.Message, form: type[Answer]) -> Answer:
        return self._next(shard, self._answers(shard, kind, call), kind, form)

    def _answers(self, shard: int, kind: str, call: calls.Message) -> Any:
        options = flight.FlightCallOptions(timeout=self._limit(kind)[1])
        with self._told(shard, kind):
            return self.clients[shard].do_action(flight.Action(kind, call.encode()), options)

    def _next(self, shard: int, answers: Any, kind: str, form: type[Answer]) -> Answer:
        with self._told(shard, kind):
            found = next(answers, None)
            if found is None:
                raise StoreError("it has ended the call without an answer")
            return form.model_validate_json(found.body.to_pybytes())

    def _limit(self, kind: str) -> tuple[str, float]:
        """The setting that limits a call, and the seconds that it allows."""
        name = _LIMITS.get(kind, "timeout_s")
        return name, getattr(self, name)

    @contextmanager
    def _told(self, shard: int, kind: str) -> Iterator[None]:
        try:
            yield
        except flight.FlightTimedOutError as error:
            name, seconds = self._limit(kind)
            late = StoreError(
                f"it has not answered for {seconds:g} s, which servers.{name} allows; "
                "set that higher if it is still at work"
            )
            raise self._failed_call(shard, kind, late) from error
        except (StoreError, flight.FlightError, pa.ArrowException, ValidationError) as error:
            raise self._failed_call(shard, kind, error) from error

    def _failed_call(self, shard: int, kind: str, error: Exception) -> StoreError:
        epoch = "" if self.epoch is None else f" of epoch {self.epoch}"
        is_of_cut = kind in ("cut", "committed", "abandon")
        then = "wait for the next checkpoint" if is_of_cut else "start all trainers again"
        return self.failed(shard, f"in call {kind}{epoch}", error, then)


def _in_background(work: Callable[[], Result]) -> Future[Result]:
    """Does it on a thread that keeps no process: a server that stands still would be waited for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="bagpipe-call", daemon=True).start()
    return future
