"""Certificates and tokens for tests, and the section of a configuration that names their files."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path

import trustme

from bagpipe.config.servers import ServersConfig, TlsConfig

TOKEN = "0123456789abcdef" * 4


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


class Files:
    """A folder with a root, and certificates that it signs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = trustme.CA()
        self.root = folder / "root.pem"
        self.authority.cert_pem.write_to_path(self.root)
        self.token = self.secret("token", TOKEN + "\n")

    def secret(self, name: str, text: str | bytes, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(mode)
        return path

    def issue(
        self, name: str, *hosts: str, expired: bool = False, early: bool = False
    ) -> tuple[Path, Path]:
        """The files of a certificate for `hosts`, and of its key."""
        until = datetime(2020, 1, 1, tzinfo=UTC) if expired else None
        begin = datetime(2990, 1, 1, tzinfo=UTC) if early else None
        issued = self.authority.issue_cert(*hosts, not_before=begin, not_after=until)
        chain = self.folder / f"{name}.pem"
        chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return chain, self.secret(f"{name}.key", issued.private_key_pem.bytes())

    def tls(self, name: str | None = "both", *, mutual: bool = False) -> TlsConfig:
        """TLS with the certificate of a name, made for this host where there is none yet."""
        if name is None:
            return TlsConfig(root=self.root)
        if not (self.folder / f"{name}.pem").exists():
            self.issue(name, "localhost", "127.0.0.1")
        return TlsConfig(
            root=self.root,
            certificate=self.folder / f"{name}.pem",
            key=self.folder / f"{name}.key",
            mutual=mutual,
        )

    def config(self, *, mutual: bool = False) -> ServersConfig:
        """TLS and a token, for servers and trainers of this host."""
        return ServersConfig(token_file=self.token, tls=self.tls(mutual=mutual))
