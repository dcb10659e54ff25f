"""What the ends of a connection prove themselves with, read from files and the environment.

A server that other hosts can reach has TLS and a token, or does not start; and to another host no
trainer speaks without. Secrets come from files that only their owner can read, or from environment
variables. They are held where no repr, log or error shows them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import stat
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretBytes, SecretStr

from bagpipe.config.servers import ServersConfig, TlsConfig, split_address
from bagpipe.errors import ConfigError

_TOKEN = re.compile(r"[!-~]{16,4096}")
"""Visible ASCII, as a header takes it. 16 characters can't be guessed if they are drawn."""
_MAX_FILE_BYTES = 1 << 20
_MAKE_TOKEN = "make one with `openssl rand -hex 32`"
_WANTED_TLS = "servers.tls.certificate and servers.tls.key"
_WANTED_TOKEN = "servers.token_file or servers.token_variable"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certificate with the chain behind it, and its private key, both PEM."""

    chain: bytes = field(repr=False)
    key: SecretBytes

    def ssl_context(self, trainers_root: bytes | None = None) -> ssl.SSLContext:
        """What a server made with Python's `ssl` needs.

        Args:
            trainers_root: PEM. Clients must have a certificate that it signed; None: need none.

        Raises:
            ssl.SSLError: They are no certificate and its key, or the key has a password.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # it reads files only; this one has no name and ends here
        with open(os.memfd_create("bagpipe-tls", os.MFD_CLOEXEC), "wb") as file:
            file.write(self.chain + b"\n" + self.key.get_secret_value())
            file.flush()
            # with a password, since a key that wants one would ask on the terminal
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
        if trainers_root is not None:
            context.load_verify_locations(cadata=trainers_root.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What one end of a connection proves itself with, and checks the other by."""

    token: SecretStr | None = None
    root: bytes | None = field(default=None, repr=False)
    """PEM. None: no TLS."""
    certificate: Certificate | None = None
    """This end's own."""
    mutual: bool = False
    """Whether servers want a certificate of trainers, signed by `root`."""


def server_credentials(config: ServersConfig, host: str) -> Credentials:
    """Reads what a server that listens on `host` needs.

    Raises:
        ConfigError: A file can't be read, is open to others or damaged; or the host is not
            loopback, and there is no token or no certificate.
    """
    tls = config.tls
    if not is_loopback(host):
        wanted = [] if tls is not None and tls.certificate is not None else [_WANTED_TLS]
        wanted += [] if _names_token(config) else [_WANTED_TOKEN]
        if wanted:
            raise ConfigError(
                f"a shard server on {host} can be reached from other hosts, so it needs TLS and a "
                f"token: set {' and '.join(wanted)}, or listen on 127.0.0.1"
            )
    if tls is not None and tls.certificate is None:
        raise ConfigError(
            f"servers.tls: a server needs its own certificate: set {_WANTED_TLS} beside root"
        )
    return _credentials(config, certificate=True)


def client_credentials(config: ServersConfig) -> Credentials:
    """Reads what a trainer needs.

    Raises:
        ConfigError: A file can't be read, is open to others or damaged; or the token would travel
            to another host without TLS.
    """
    far = [at for at in config.addresses if not is_loopback(split_address(at)[0])]
    wanted = [] if config.tls is not None else ["servers.tls.root"]
    wanted += [] if _names_token(config) else [_WANTED_TOKEN]
    if far and wanted:
        raise ConfigError(
            f"servers.addresses: {far[0]} is another host, which is spoken to by TLS and with a "
            f"token only: set {' and '.join(wanted)}"
        )
    return _credentials(config, certificate=config.tls is not None and config.tls.mutual)


def _names_token(config: ServersConfig) -> bool:
    return config.token_file is not None or config.token_variable is not None


def _credentials(config: ServersConfig, *, certificate: bool) -> Credentials:
    tls = config.tls
    return Credentials(
        token=_read_token(config),
        root=None if tls is None else _read_root(tls.root),
        certificate=_read_certificate(tls) if tls is not None and certificate else None,
        mutual=tls is not None and tls.mutual,
    )


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is reached from this host only.

    Raises:
        ConfigError: The name is not known.
    """
    try:
        found = {at[4][0] for at in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise ConfigError(
            f"host {host!r} is not known here ({error.strerror}): give an address, or a name that "
            "this host can look up"
        ) from error
    return all(ipaddress.ip_address(str(at).partition("%")[0]).is_loopback for at in found)


def _read_token(config: ServersConfig) -> SecretStr | None:
    if config.token_file is not None:
        key = f"servers.token_file = {str(config.token_file)!r}"
        text = _read(config.token_file, key, secret=True).decode("utf-8", "replace").strip()
    elif config.token_variable is not None:
        key = f"servers.token_variable = {config.token_variable!r}"
        text = os.environ.get(config.token_variable, "").strip()
        if not text:
            raise ConfigError(f"{key}: the environment has no such variable, or an empty one")
    else:
        return None
    if not _TOKEN.fullmatch(text):
        raise ConfigError(
            f"{key}: the token has {len(text):,} characters; it must be 16 to 4,096 letters, "
            f"digits and signs without spaces: {_MAKE_TOKEN}"
        )
    return SecretStr(text)


def _read_root(path: Path) -> bytes:
    key = f"servers.tls.root = {str(path)!r}"
    root = _read(path, key)
    try:
        ssl.create_default_context(cadata=root.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: has no PEM certificate ({error})") from error
    return root


def _read_certificate(tls: TlsConfig) -> Certificate:
    assert tls.certificate is not None
    assert tls.key is not None
    named = f"servers.tls.certificate = {str(tls.certificate)!r}"
    certificate = Certificate(
        chain=_read(tls.certificate, named),
        key=SecretBytes(_read(tls.key, f"servers.tls.key = {str(tls.key)!r}", secret=True)),
    )
    try:
        certificate.ssl_context()
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{named} and servers.tls.key = {str(tls.key)!r}: are no PEM certificate and its "
            f"private key without a password ({error})"
        ) from error
    return certificate


def _read(path: Path, key: str, *, secret: bool = False) -> bytes:
    """Reads a small file; of a secret one only the owner may know.

    A file of root's may be open to its group, as secrets are that a container gets.
    """
    try:
        # does not wait for the other end of a pipe
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{key}: is no regular file")
            open_to = stat.S_IMODE(status.st_mode) & (0o037 if status.st_uid == 0 else 0o077)
            if secret and (open_to or status.st_uid not in (0, os.geteuid())):
                raise ConfigError(
                    f"{key}: others may read or change it (mode {status.st_mode & 0o777:o}, user "
                    f"{status.st_uid}): chmod 600, and let it belong to the user that runs this"
                )
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{key}: can't be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{key}: has more than {_MAX_FILE_BYTES:,} bytes")
    return content
