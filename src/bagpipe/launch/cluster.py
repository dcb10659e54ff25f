"""A Ray cluster that this process joins, or starts on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bagpipe.config.servers import split_address
from bagpipe.errors import ConfigError

_ANSWER_TIMEOUT_S = 10.0
"""How long a cluster may take to let a connection in. Ray itself tries again for many minutes."""
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # else actors give way to all else
    # what trainers raise when another one has died is told in one sentence, not by each
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # nor does torch show its stack where one is gone
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Of actors, too, where this process starts the cluster. What a user has set stays."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to a cluster until the end.

    Args:
        address: The cluster's; None: the one that RAY_ADDRESS names or that `ray start` has started
            here, else a new one on this machine, as with "local".

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--engine ray needs Ray: install it by `pip install 'bagpipe-recsys[ray]'`"
        ) from error
    _check_answers(ray, address)
    try:
        ray.init(address=address, log_to_driver=True, ignore_reinit_error=True)
    except (ConnectionError, ValueError, OSError) as error:
        raise ConfigError(f"Ray at {address or 'this machine'}: {error}{_token_hint()}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def is_own(ray: Any) -> bool:
    """Whether this process has started the cluster, for itself; Ray has no public way to ask."""
    node = ray._private.worker._global_node  # None: this is a client of Ray's, on no node
    return node is not None and bool(node.is_head())


def _check_answers(ray: Any, address: str | None) -> None:
    """ConfigError: nobody listens where Ray would look for a cluster.

    `ray start` leaves its address in a file, which stays where the cluster is killed.
    """
    left = ""
    if address in (None, "auto"):
        if os.environ.get("RAY_ADDRESS", "auto") in ("", "auto"):
            left = (
                "It was left behind by a cluster that has been killed: forget it with `ray stop`, "
                "or start a cluster on this machine with --address local"
            )
        with suppress(ConnectionError):  # there is none, as Ray will say
            # as Ray does: "auto" may also be a cluster that runs and has left no address
            address = ray._private.services.get_ray_address_from_environment(address, None)
    try:
        where = split_address(address or "")
    except ValueError:  # "local", none at all, or what Ray itself has to make sense of
        return
    try:
        socket.create_connection(where, _ANSWER_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"Ray at {address}: no cluster answers there ({error.strerror or error}). "
            f"{left or 'See that its head runs, and that --address or RAY_ADDRESS names it'}"
        ) from error


def _token_hint() -> str:
    """What Ray does not say: a cluster that wants a token answers nobody who has none."""
    if os.environ.get("RAY_AUTH_MODE") == "token":
        return ". It may have another token than this process (docs/security.md)"
    return (
        ". If it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, to a file that "
        "has it (docs/security.md)"
    )
