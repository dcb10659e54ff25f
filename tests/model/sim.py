"""Discrete events: a clock, processes that can be killed and stopped, messages, faults at points.

Nothing here knows what it simulates. All chance comes from one seeded generator, so a case is
repeated exactly.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

Work = Generator["Future | float", Any, Any]
"""What a process does: it yields futures to wait for, and times to let pass."""


class Failed(Exception):
    """Something that a process needs is gone or refuses; who does not expect it ends."""


class Wrong(AssertionError):
    """What an undisturbed run would not show."""


class Sim:
    """The clock, the events to come, and the points at which faults strike."""

    def __init__(self, seed: int) -> None:
        self.rng, self.now = random.Random(seed), 0.0
        self.passed: Counter[str] = Counter()  # how often each point has been passed
        self.faults: dict[tuple[str, int], list[Callable[[], None]]] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (self.now + delay, self._num_events, call))

    def run(self, until: float, is_over: Callable[[], bool] = lambda: False) -> None:
        while self._events and self._events[0][0] <= until and not is_over():
            self.now, _, call = heapq.heappop(self._events)
            call()

    def delay(self, mean: float = 1.0) -> float:
        return self.rng.expovariate(1.0 / mean)

    def point(self, label: str) -> None:
        """Says that a place in the protocol is reached. Faults strike after the current event."""
        self.passed[label] += 1
        for fault in self.faults.get((label, self.passed[label]), ()):
            self.after(0.0, fault)


class Future:
    """A result that comes later, or a failure."""

    def __init__(self) -> None:
        self.is_done, self.value, self.error = False, None, ""
        self._calls: list[Callable[[Future], None]] = []

    def set(self, value: Any = None) -> None:
        self._finish(value, "")

    def fail(self, error: str) -> None:
        self._finish(None, error)

    def then(self, call: Callable[[Future], None]) -> None:
        if self.is_done:
            call(self)
        else:
            self._calls.append(call)

    def _finish(self, value: Any, error: str) -> None:
        if self.is_done:
            return
        self.is_done, self.value, self.error = True, value, error
        calls, self._calls = self._calls, []
        for call in calls:
            call(self)


def all_of(futures: Sequence[Future]) -> Future:
    """Comes with all values once all have come, or fails as soon as one has failed."""
    whole, num_left = Future(), len(futures)

    def note(future: Future) -> None:
        nonlocal num_left
        num_left -= 1
        if future.error:
            whole.fail(future.error)
        elif num_left == 0:
            whole.set([each.value for each in futures])

    for future in futures:
        future.then(note)
    if not futures:
        whole.set([])
    return whole


class Process:
    """One process: what it does waits while it is stopped, and never comes after it is killed."""

    def __init__(self, sim: Sim, name: str) -> None:
        self.sim, self.name, self.state = sim, name, "running"
        self.why = ""
        self.at_end: list[Callable[[], None]] = []
        self._held: deque[Callable[[], None]] = deque()

    @property
    def is_alive(self) -> bool:
        return self.state != "dead"

    def do(self, call: Callable[[], None]) -> None:
        if self.state == "stopped":
            self._held.append(call)
        elif self.state == "running":
            try:
                call()
            except Failed as error:
                self.kill(str(error))

    def after(self, delay: float, call: Callable[[], None]) -> None:
        self.sim.after(delay, lambda: self.do(call))

    def spawn(self, work: Work) -> Future:
        """Starts some work; the future comes when it is over. A failure ends the process."""
        ended = Future()
        self.do(lambda: self._advance(work, ended, Future()))
        return ended

    def kill(self, why: str = "killed") -> None:
        if self.state != "dead":
            self.state, self.why = "dead", why
            self._held.clear()
            for call in self.at_end:
                call()

    def stop(self) -> None:
        if self.state == "running":
            self.state = "stopped"

    def go_on(self) -> None:
        if self.state == "stopped":
            self.state = "running"
            while self._held and self.state == "running":
                self.do(self._held.popleft())

    def _advance(self, work: Work, ended: Future, came: Future) -> None:
        try:
            wanted = work.throw(Failed(came.error)) if came.error else work.send(came.value)
        except StopIteration as end:
            ended.set(end.value)
            return
        if isinstance(wanted, Future):
            wanted.then(lambda future: self.do(lambda: self._advance(work, ended, future)))
        else:
            self.after(wanted, lambda: self._advance(work, ended, Future()))


class Network:
    """Addresses, and messages that are late or lost by chance."""

    def __init__(self, sim: Sim, *, late: float, lost: float) -> None:
        """`late` and `lost` are the shares of messages that are."""
        self.sim, self._late, self._lost = sim, late, lost
        self.at: dict[str, Any] = {}  # by address the server's process
        self.num_streams = 0

    def delay(self) -> float:
        return self.sim.delay(40.0 if self.sim.rng.random() < self._late else 0.5)

    def loses(self) -> bool:
        return self.sim.rng.random() < self._lost


class Stream:
    """Messages of one client to whoever is at an address, in their order, and the answers.

    Where a server is started anew at its address, what is on its way reaches the new process: as
    bad as a client that connects again by itself. A lost message breaks the stream: nothing behind
    it arrives, and the client sees that later.
    """

    def __init__(self, network: Network, client: Process, address: str) -> None:
        self._network, self._client, self._address = network, client, address
        network.num_streams += 1
        self.number = network.num_streams
        self._last_arrival = 0.0
        self._is_broken = False

    def call(self, name: str, *arguments: Any) -> Future:
        answer, network = Future(), self._network
        breaks = network.loses() and not self._is_broken
        loses_request = breaks and network.sim.rng.random() < 0.5
        if self._is_broken or loses_request:
            self._is_broken = True
            self._tell(lambda: answer.fail(f"{self._address}: connection lost"))
            return answer
        self._is_broken = breaks
        sim = network.sim
        self._last_arrival = max(self._last_arrival, sim.now + network.delay())

        def reply(value: Any, error: str) -> None:
            if answer.is_done:
                return
            if breaks:
                value, error = None, f"{self._address}: connection lost"
            self._tell(lambda: answer.fail(error) if error else answer.set(value))

        def arrive() -> None:
            server = network.at[self._address]
            if server.is_alive:
                server.do(lambda: server.receive(name, arguments, reply))
                server.at_end.append(lambda: reply(None, f"{server.name} died"))
            else:
                reply(None, f"{self._address}: nobody is there")

        sim.after(self._last_arrival - sim.now, arrive)
        return answer

    def _tell(self, call: Callable[[], None]) -> None:
        self._client.after(self._network.delay(), call)
