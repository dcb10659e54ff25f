"""A token and a certificate for a server of several hosts whose configuration names none.

The certificate is for the address by which others reach this host, and signs itself. Whoever is to
connect must be given it, and the token, by a way of its own.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bagpipe.config.servers import ServersConfig, TlsConfig
from bagpipe.errors import ConfigError
from bagpipe.native.interfaces import address_of

_DAYS = 3650


def own_address() -> str:
    """The address by which other hosts reach this one, as gloo chooses it for trainers.

    It is that of the interface that GLOO_SOCKET_IFNAME names, the first that has one. Else it is
    the one to which this host's name leads here; loopback where it leads nowhere.
    """
    for interface in os.environ.get("GLOO_SOCKET_IFNAME", "").split(","):
        if interface and (address := address_of(interface)) is not None:
            return address
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)[0][4][0])
    except OSError:
        return "127.0.0.1"


@contextmanager
def with_secrets(servers: ServersConfig, address: str) -> Iterator[ServersConfig]:
    """The section with what it lacks of a token and a certificate for `address`.

    They are in files that only this user can read, and that are gone at the end.

    Raises:
        ConfigError: No certificate can be made here.
    """
    with TemporaryDirectory(prefix="bagpipe-") as name:  # which only this user may enter
        folder, made = Path(name), dict[str, Path | TlsConfig]()
        if servers.token_file is None and servers.token_variable is None:
            made["token_file"] = folder / "token"
            _write(folder / "token", secrets.token_hex(32))
        if servers.tls is None:
            made["tls"] = _certificate(folder, address)
        yield servers.model_copy(update=made)


def _certificate(folder: Path, address: str) -> TlsConfig:
    certificate, key = folder / "host.pem", folder / "host.key"
    _write(key, "")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", str(_DAYS)]
    command += ["-subj", "/CN=bagpipe", "-addext", f"subjectAltName=IP:{address}"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise ConfigError(
            f"a shard server that other hosts reach needs TLS, and no certificate can be made with "
            f"openssl here ({why}): install it, or set [servers.tls] (docs/security.md)"
        ) from error
    return TlsConfig(root=certificate, certificate=certificate, key=key)


def _write(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
