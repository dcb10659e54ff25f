"""As much of Ray as the supervisor of a run speaks to, without processes.

Actors are not made: what each of their methods answers is said beforehand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from bagpipe.launch.actors import ActorPlace
from bagpipe.server.told import ToldServer

TOLD = ToldServer(address="127.0.0.1:1", token=None, root=None)
Answers = Mapping[str, Callable[[], object]]


class RayError(Exception):
    """Base of Ray's own."""


class GetTimeoutError(RayError):
    """No answer in time."""


class RayTaskError(RayError):
    """What a method raised is its `cause`."""


class ActorDiedError(RayError):
    """An actor can't be started."""


class FakeRay:
    """A module `ray`, for `sys.modules`."""

    exceptions = SimpleNamespace(
        RayError=RayError,
        GetTimeoutError=GetTimeoutError,
        RayTaskError=RayTaskError,
        ActorDiedError=ActorDiedError,
    )

    def __init__(self, answers: Answers, *, are_done: bool, is_own: bool) -> None:
        """Has no actors yet.

        Args:
            answers: By an actor's method; those left out are of actors that are well.
            are_done: Whether methods have come to their end when somebody waits for them.
            is_own: Whether this process starts the cluster.
        """
        node = SimpleNamespace(is_head=lambda: is_own)
        self.left_address: str | None = None
        """That which `ray start` has left on this machine."""
        self.running_address: str | None = None
        """That of a cluster here that has left none."""
        self._private = SimpleNamespace(
            worker=SimpleNamespace(_global_node=node),
            services=SimpleNamespace(get_ray_address_from_environment=self._address_here),
        )
        self._are_done = are_done
        self._answers: Answers = {
            "told": lambda: TOLD,
            "place": lambda: ActorPlace(node="node", host="127.0.0.1", port=1),
            "look": list,
            "run": lambda: None,
            **answers,
        }
        self.started: list[tuple[str, tuple[Any, ...]]] = []
        """The class and the arguments of each actor."""
        self.timeouts: list[float | None] = []
        """Of each `get`."""

    def _address_here(self, address: str | None, folder: None) -> str | None:
        """As Ray 2.60 looks for a cluster."""
        address = os.environ.get("RAY_ADDRESS") or address
        if address not in (None, "auto"):
            return address
        found = self.left_address
        if address == "auto":
            found = self.running_address or found
            if found is None:
                raise ConnectionError("Could not find any running Ray instance.")
        return found

    def init(self, **_: object) -> None:
        """Connects."""

    def shutdown(self) -> None:
        """Parts."""

    def cluster_resources(self) -> dict[str, float]:
        """No GPU."""
        return {}

    def remote(self, kind: type) -> Any:
        """What makes actors of that class."""

        def start(*arguments: object) -> Any:
            self.started.append((kind.__name__, arguments))
            return SimpleNamespace(
                **{
                    name: SimpleNamespace(remote=lambda *_, answer=answer: answer)
                    for name, answer in self._answers.items()
                }
            )

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        """The answer, or all of them."""
        self.timeouts.append(timeout)
        return [answer() for answer in asked] if isinstance(asked, Sequence) else asked()

    def wait(self, asked: Sequence[Any], **_: object) -> tuple[Sequence[Any], Sequence[Any]]:
        """All have answered, or none."""
        return (asked, []) if self._are_done else ([], asked)

    def kill(self, actor: object, **_: object) -> None:
        """Ends nothing."""


def use_fake_ray(
    monkeypatch: pytest.MonkeyPatch,
    *,
    are_done: bool = True,
    is_own: bool = False,
    **answers: Callable[[], object],
) -> FakeRay:
    """`import ray` gives the one that answers so, until the test ends."""
    ray = FakeRay(answers, are_done=are_done, is_own=is_own)
    monkeypatch.setitem(sys.modules, "ray", ray)
    keep_environment(monkeypatch)
    return ray


def keep_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for actors goes when the test ends, and no cluster is named."""
    for name in ("RAY_worker_niceness", "RAY_IGNORE_UNHANDLED_ERRORS", "TORCH_CPP_LOG_LEVEL"):
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
