"""Who may speak to a shard server: a token for each stream, and a limit on guesses.

`GuardedServer` is the only Flight server there is. It asks each call, thus each stream, for the
token before it reads anything of it, and only its own checked methods are open to what derives from
it. A refused stranger learns that a token is wanted, and nothing else. What all of this defends
against, and what it does not, stands in docs/security.md.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.flight as flight
from pydantic import SecretStr

from bagpipe.errors import ConfigError
from bagpipe.server.credentials import Credentials

_MAX_FAILURES = 10
_WINDOW_S = 60.0
_MAX_ADDRESSES = 4096
_LOGIN = "login"
_SCHEME = "Bearer "
_SERVED = {
    flight.FlightMethod.DO_PUT,
    flight.FlightMethod.DO_EXCHANGE,
    flight.FlightMethod.DO_ACTION,
}
_ENDPOINTS = {
    *("do_put", "do_exchange", "do_action", "do_get"),
    *("list_flights", "get_flight_info", "get_schema", "list_actions"),
}

_log = logging.getLogger(__name__)


def location(host: str, port: int, credentials: Credentials) -> flight.Location:
    """Where a server is, or listens: with TLS or without, as the credentials have it."""
    bracketed = f"[{host}]" if ":" in host else host
    scheme = "grpc+tcp" if credentials.root is None else "grpc+tls"
    return flight.Location(f"{scheme}://{bracketed}:{port}")


class LoginLimit:
    """Counts wrong tokens by address, and refuses an address that sent too many.

    A right token of that address is refused, too, until the window has passed: else guessing would
    go on at full speed. Open streams go on.

    Args:
        max_failures: So many wrong tokens an address may send within one window.
        window_s: The window, from the first of them on.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        max_failures: int = _MAX_FAILURES,
        window_s: float = _WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failures, self._window_s, self._clock = max_failures, window_s, clock
        self._lock = threading.Lock()
        # address -> (when its window ends, wrong tokens within it); the oldest windows first
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self.num_refused = 0

    def wait_s(self, address: str) -> float:
        """How long the address is refused; 0 where it may try."""
        with self._lock:
            ends, failures = self._failures.get(address, (0.0, 0))
            return max(0.0, ends - self._clock()) if failures >= self._max_failures else 0.0

    def failed(self, address: str) -> int:
        """Counts a failure; returns how many the address has now within its window."""
        with self._lock:
            now = self._clock()
            self.num_refused += 1
            ends, failures = self._failures.get(address, (0.0, 0))
            if ends <= now:
                self._failures.pop(address, None)
                ends, failures = now + self._window_s, 0
            self._failures[address] = ends, failures + 1
            if len(self._failures) > _MAX_ADDRESSES:
                self._failures.popitem(last=False)
            return failures + 1


class _Login(flight.ServerMiddleware):  # type: ignore[misc]
    """What a call showed: whether there was a token, and whether it was right."""

    def __init__(self, given: bool, right: bool) -> None:
        super().__init__()
        self.given, self.right = given, right


class _Gate(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Turns away what is not served, and compares each call's token.

    It keeps a digest, so that neither the time of a comparison nor a dump tells the token.
    """

    def __init__(self, token: SecretStr | None) -> None:
        super().__init__()
        self._digest = None if token is None else _digest(token.get_secret_value())

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> _Login:
        # here and not in the endpoints, some of which send a traceback with every error
        if info.method not in _SERVED:
            raise flight.FlightUnauthorizedError("not served")
        if self._digest is None:
            return _Login(given=False, right=True)
        given = headers.get("authorization", ())
        # one and no other, so that nobody in between can add a guess of their own
        value = given[0] if len(given) == 1 else ""
        token = value.removeprefix(_SCHEME) if isinstance(value, str) else ""
        same = hmac.compare_digest(_digest(token), self._digest)
        return _Login(given=bool(given), right=same and value != token)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class GuardedServer(flight.FlightServerBase):  # type: ignore[misc]
    """A Flight server that looks at nothing before the login.

    What derives from it implements `put`, `exchange` and `action`, with the arguments of Flight's
    `do_put`, `do_exchange` and `do_action`. It can't implement those, which check the login, nor
    any other endpoint: those are closed to all.

    Args:
        host: Where to listen.
        port: 0: any that is free; `port` then says which.
        credentials: The server's.
        limit: Of failed logins.

    Raises:
        ConfigError: It can't listen there.
    """

    def __init__(
        self, host: str, port: int, credentials: Credentials, limit: LoginLimit | None = None
    ) -> None:
        self.logins = limit or LoginLimit()
        own = credentials.certificate
        tls: dict[str, Any] = {}
        if own is not None:
            tls["tls_certificates"] = [(own.chain, own.key.get_secret_value())]
            tls["verify_client"] = credentials.mutual
            tls["root_certificates"] = credentials.root if credentials.mutual else None
        gate = {_LOGIN: _Gate(credentials.token)}
        try:
            super().__init__(location(host, port, credentials), middleware=gate, **tls)
        except (OSError, pyarrow.ArrowException) as error:
            raise ConfigError(
                f"can't listen on {host}, port {port}: another server is there, or the address is "
                "another host's: choose another, or port 0"
            ) from error

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        unguarded = sorted(set(cls.__dict__) & _ENDPOINTS)
        if unguarded:
            raise TypeError(f"{cls.__name__}.{unguarded[0]} would serve calls without a login")

    def put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """A stream of a client that is known; see `FlightServerBase.do_put`."""
        raise flight.FlightUnauthorizedError("not served")

    def exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """A stream of a client that is known; see `FlightServerBase.do_exchange`."""
        raise flight.FlightUnauthorizedError("not served")

    def action(self, context: Any, action: Any) -> Iterable[Any]:
        """A request of a client that is known; see `FlightServerBase.do_action`."""
        raise flight.FlightUnauthorizedError("not served")

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._log_in(context)
        self.put(context, descriptor, reader, writer)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        self._log_in(context)
        self.exchange(context, descriptor, reader, writer)

    def do_action(self, context: Any, action: Any) -> Iterable[Any]:
        self._log_in(context)
        return self.action(context, action)

    def _log_in(self, context: Any) -> None:
        """Raises FlightUnauthenticatedError unless the call showed the token."""
        address = network_of(context.peer())
        wait_s = self.logins.wait_s(address)
        if wait_s > 0:
            raise flight.FlightUnauthenticatedError(
                f"too many wrong tokens from {address}: try again in {wait_s:.0f} s"
            )
        login = context.get_middleware(_LOGIN)
        if login is not None and login.right:
            return
        given = login is not None and login.given
        if given:
            _log_failure(address, self.logins.failed(address))
        raise flight.FlightUnauthenticatedError(
            "the token is wrong" if given else "a token is wanted: set it in servers.token_file"
        )


def _log_failure(address: str, failures: int) -> None:
    """Says so, but of an address that goes on only where it is first, and where it is refused."""
    if failures == 1:
        _log.warning("a login from %s was refused: wrong token", address)
    elif failures == _MAX_FAILURES:
        _log.warning(
            "%d wrong tokens from %s: its logins are refused for up to %.0f s",
            *(failures, address, _WINDOW_S),
        )


def network_of(peer: str) -> str:
    """The address in gRPC's name of a peer; of IPv6 the network of a host, which has 2^64 of them.

    For example "ipv4:10.0.0.7:4321" is "10.0.0.7".
    """
    host = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
    try:
        found = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return peer[:100]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class _ShowsToken(flight.ClientMiddlewareFactory):  # type: ignore[misc]
    def __init__(self, token: SecretStr) -> None:
        super().__init__()
        self._token = token

    def start_call(self, info: Any) -> _Header:
        return _Header(self._token)


class _Header(flight.ClientMiddleware):  # type: ignore[misc]
    def __init__(self, token: SecretStr) -> None:
        super().__init__()
        self._token = token

    def sending_headers(self) -> dict[str, str]:
        return {"authorization": _SCHEME + self._token.get_secret_value()}


def connect(host: str, port: int, credentials: Credentials) -> flight.FlightClient:
    """Makes a client, each call of which shows the token. Nothing is sent yet.

    It does not go through a proxy, whatever the environment says: a proxy would see the token where
    there is no TLS, and tables are not what proxies are for.
    """
    own = credentials.certificate
    tls: dict[str, Any] = {} if credentials.root is None else {"tls_root_certs": credentials.root}
    if own is not None:
        tls |= {"cert_chain": own.chain, "private_key": own.key.get_secret_value()}
    middleware = [_ShowsToken(credentials.token)] if credentials.token else None
    return flight.FlightClient(
        location(host, port, credentials),
        middleware=middleware,
        generic_options=[("grpc.enable_http_proxy", 0)],
        **tls,
    )
