"""Who may speak to a shard server by Flight: who shows the token, in each call and thus stream.

`GuardedServer` is the only Flight server there is. It asks each call for the token before it reads
anything of it, and only its own checked methods are open to what derives from it. A refused
stranger learns that a token is wanted, and nothing else. What all of this defends against, and what
it does not, stands in docs/security.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.flight as flight
from pydantic import SecretStr

from bagpipe.errors import ConfigError
from bagpipe.server.credentials import Credentials
from bagpipe.server.logins import SCHEME, Logins, address_of

_SHOWN = "shown"
_SERVED = {
    flight.FlightMethod.DO_PUT,
    flight.FlightMethod.DO_EXCHANGE,
    flight.FlightMethod.DO_ACTION,
}
_ENDPOINTS = {
    *("do_put", "do_exchange", "do_action", "do_get"),
    *("list_flights", "get_flight_info", "get_schema", "list_actions"),
}


def location(host: str, port: int, credentials: Credentials) -> flight.Location:
    """Where a server is, or listens: with TLS or without, as the credentials have it."""
    bracketed = f"[{host}]" if ":" in host else host
    scheme = "grpc+tcp" if credentials.root is None else "grpc+tls"
    return flight.Location(f"{scheme}://{bracketed}:{port}")


class _Shown(flight.ServerMiddleware):  # type: ignore[misc]
    """What a call has in its headers `authorization`."""

    def __init__(self, values: Sequence[str | bytes]) -> None:
        super().__init__()
        self.values = values


class _Gate(flight.ServerMiddlewareFactory):  # type: ignore[misc]
    """Turns away what is not served, before its endpoint: some send a traceback with an error."""

    def start_call(self, info: Any, headers: Mapping[str, Sequence[str | bytes]]) -> _Shown:
        if info.method not in _SERVED:
            raise flight.FlightUnauthorizedError("not served")
        # the caller's address is known later only
        return _Shown(headers.get("authorization", ()))


class GuardedServer(flight.FlightServerBase):  # type: ignore[misc]
    """A Flight server that looks at nothing before the login.

    What derives from it implements `put`, `exchange` and `action`, with the arguments of Flight's
    `do_put`, `do_exchange` and `do_action`. It can't implement those, which check the login, nor
    any other endpoint: those are closed to all.

    Args:
        host: Where to listen.
        port: 0: any that is free; `port` then says which.
        credentials: The server's.
        logins: By default those with the credentials' token.

    Raises:
        ConfigError: It can't listen there.
    """

    def __init__(
        self, host: str, port: int, credentials: Credentials, logins: Logins | None = None
    ) -> None:
        self.logins = logins or Logins(credentials.token)
        own = credentials.certificate
        tls: dict[str, Any] = {}
        if own is not None:
            tls["tls_certificates"] = [(own.chain, own.key.get_secret_value())]
            tls["verify_client"] = credentials.mutual
            tls["root_certificates"] = credentials.root if credentials.mutual else None
        try:
            at = location(host, port, credentials)
            super().__init__(at, middleware={_SHOWN: _Gate()}, **tls)
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
        """Raises FlightUnauthenticatedError unless the call may go on."""
        refusal = self.logins.refusal(
            _caller(context.peer()), context.get_middleware(_SHOWN).values
        )
        if refusal is not None:
            raise flight.FlightUnauthenticatedError(refusal)


def _caller(peer: str) -> str:
    """The address in gRPC's name of a peer, "ipv4:10.0.0.7:4321" or "ipv6:%5B::1%5D:4321"."""
    host = peer.partition(":")[2].rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
    return address_of(host.strip("[]") or peer)


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
        return {"authorization": SCHEME + self._token.get_secret_value()}


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


def reason(error: Exception) -> str:
    """Why a call of a client failed, in the words of the settings where they are the cause.

    gRPC tells what went wrong with TLS in a text only, so its words are looked for.
    """
    text = str(error)
    if isinstance(error, flight.FlightError) and error.extra_info:
        return str(error.extra_info.decode(errors="replace"))  # as the server said it
    if isinstance(error, flight.FlightTimedOutError):
        return "it did not answer in time"
    if isinstance(error, flight.FlightUnauthenticatedError | flight.FlightUnauthorizedError):
        return text.partition(". Detail:")[0]
    if isinstance(error, flight.FlightUnavailableError):
        found = (told for words, told in _UNAVAILABLE.items() if words in text)
        return next(found, "nobody answers there, or the connection was lost")
    return text


_CLOSED = (
    "it has closed the connection: it may want TLS, or a certificate of this host "
    "(servers.tls.mutual), or it has ended"
)
_UNAVAILABLE = {
    "Connection refused": "nobody listens there",
    "hostname lookup error": "this host knows no host of that name",
    "wrong version number": "it does not speak TLS: set servers.tls on both ends, or on neither",
    "certificate has expired": "its certificate has expired: renew servers.tls.certificate there, "
    "or set the clock here",
    "certificate is not yet valid": "its certificate is not valid yet: set the clocks",
    "not in peer certificate": "its certificate is for other names than this address: have one "
    "made for it, or use a name that it has in servers.addresses",
    "certificate verify failed": "its certificate was not signed by servers.tls.root of this host",
    **dict.fromkeys(
        ("Socket closed", "Connection reset", "Broken pipe", "certificate required"), _CLOSED
    ),
}
