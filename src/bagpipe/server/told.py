"""A shard server that makes the secrets it lacks, and what its trainers must be told of it.

Whoever starts it tells them, by a way that strangers can't read.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from pydantic import SecretStr

from bagpipe.config.servers import ServersConfig
from bagpipe.server.credentials import Credentials, client_credentials, is_loopback
from bagpipe.server.made import own_address, with_secrets
from bagpipe.server.start import Address, Served, serving


@dataclass(frozen=True, kw_only=True)
class StartedServer:
    """Where a server is that a run has started, and what trainers show it."""

    address: str
    credentials: Credentials
    hold: socket.socket | None = None
    """Open for as long as this process holds a server that ends with who holds it."""

    def told(self) -> ToldServer:
        """What trainers of other hosts are told of it."""
        token, root = self.credentials.token, self.credentials.root
        return ToldServer(
            address=self.address,
            token=None if token is None else token.get_secret_value(),
            root=None if root is None else root.decode(),
        )


@dataclass(frozen=True, kw_only=True)
class ToldServer:
    """What trainers are told of a server; all of it can be written as JSON."""

    address: str
    token: str | None = field(repr=False)
    root: str | None = field(repr=False)
    """PEM, of the certificate that it has made; None: it has made none."""

    def started(
        self, servers: ServersConfig, *, hold: socket.socket | None = None
    ) -> StartedServer:
        """For a trainer, with what else it needs from files of its host.

        Raises:
            ConfigError: A file can't be read, is open to others or damaged.
        """
        found = client_credentials(servers)
        if self.token is not None:
            found = replace(found, token=SecretStr(self.token))
        if self.root is not None:
            found = replace(found, root=self.root.encode())
        return StartedServer(address=self.address, credentials=found, hold=hold)


@contextmanager
def told_server(served: Served, number: int, *, listen: Address) -> Iterator[ToldServer]:
    """Starts a server with a token of its own where the configuration has none.

    Where other hosts reach it, it makes a certificate, too, if no files of TLS are named.

    Args:
        served: See `serving`.
        number: See `serving`.
        listen: See `serving`.

    Raises:
        ConfigError, StoreError: As `serving`; or no certificate can be made here.
    """
    makes_root = served.servers.tls is None and not is_loopback(listen[0])
    with ExitStack() as stack, ExitStack() as secret_files:
        address = None
        if makes_root:
            address = own_address() if listen[0] == "0.0.0.0" else listen[0]
            made = with_secrets(served.servers, address)
            served = replace(served, servers=secret_files.enter_context(made))
        running = stack.enter_context(
            serving(
                served,
                number,
                listen=listen,
                name=address,
                own_token=SecretStr(secrets.token_hex(32)),
            )
        )
        secret_files.close()
        token, root = running.credentials.token, running.credentials.root
        yield ToldServer(
            address=running.address,
            token=None if token is None else token.get_secret_value(),
            root=root.decode() if makes_root and root is not None else None,
        )
