"""The server's process of `network`: prints port and instance, and serves until its input ends."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

import numpy as np
from pydantic import SecretBytes, SecretStr

from bagpipe.errors import ConfigError
from bagpipe.native.memory import keep_freed_memory
from bagpipe.server.credentials import Certificate, Credentials
from bagpipe.server.flight import ShardServer
from bagpipe.server.shard import Shard
from bagpipe.store import MemoryStore
from bagpipe.store.cuts import CutStore
from benchmarks.network.bare import BareServer
from benchmarks.network.settings import End

SEED, EPOCH = 1, 1
_LOAD_ROWS = 1 << 16


def main() -> None:
    """Serves what its argument tells."""
    keep_freed_memory()  # as servers do
    end = End.told(sys.argv[1])
    if end.arm == "bare":
        with BareServer(end.host, end.group) as bare:
            serve(bare.port)
        return
    store = CutStore(MemoryStore(end.group, SEED))
    shard = Shard([end.group], SEED, 0, 1, [store])
    instance = shard.begin(EPOCH, 1)
    _fill(store)
    own = credentials(Path(end.folder), of_server=True) if end.arm == "tls" else None
    with closing(ShardServer(shard, end.host, 0, own)) as server:
        serve(server.port, instance)


def credentials(folder: Path, *, of_server: bool) -> Credentials:
    """What `make_credentials` wrote."""
    chain, key = (folder / name for name in ("server.pem", "server.key"))
    certificate = Certificate(chain=chain.read_bytes(), key=SecretBytes(key.read_bytes()))
    return Credentials(
        token=SecretStr((folder / "token").read_text()),
        root=(folder / "root.pem").read_bytes(),
        certificate=certificate if of_server else None,
    )


def make_credentials(folder: Path, host: str) -> None:
    """Writes a root, a server's certificate for `host`, and a token.

    Raises:
        ConfigError: trustme is not installed.
    """
    try:
        import trustme
    except ImportError as error:
        raise ConfigError("--arm tls needs the package trustme: install it") from error
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "root.pem")
    issued = authority.issue_cert(host)
    (folder / "server.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / "server.key")
    (folder / "token").write_text("0123456789abcdef" * 4)


def _fill(store: CutStore) -> None:
    """Writes every row, so that a fetch copies, and computes nothing."""
    group = store.group
    for begin in range(0, group.num_rows, _LOAD_ROWS):
        rows = np.arange(begin, min(begin + _LOAD_ROWS, group.num_rows))
        store.write(rows, np.ones((len(rows), group.record_width), np.float32))


def serve(port: int, instance: str = "none") -> None:
    sys.stdout.write(f"{port} {instance}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
