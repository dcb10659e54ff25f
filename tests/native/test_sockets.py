"""A connection is there when it is said to be."""

from __future__ import annotations

import secrets
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.soon import SOON_S

from bagpipe.native.sockets import connect_unix


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_signal_does_not_end_the_wait_for_room(kind: socket.SocketKind) -> None:
    """As when a process that was stopped goes on."""
    name, main = f"\0bagpipe-test-{secrets.token_hex(8)}", threading.get_ident()

    def interrupt_and_accept() -> bytes:
        for _ in range(20):
            time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGUSR1)
        with listener.accept()[0], listener.accept()[0] as accepted:
            return accepted.recv(9)

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with (
            socket.socket(socket.AF_UNIX, kind) as listener,
            socket.socket(socket.AF_UNIX, kind) as first,
            socket.socket(socket.AF_UNIX, kind) as second,
            ThreadPoolExecutor(1) as pool,
        ):
            listener.settimeout(SOON_S)
            listener.bind(name)
            listener.listen(0)
            first.connect(name)  # there is room for one
            received = pool.submit(interrupt_and_accept)
            connect_unix(second, name)
            second.send(b"hello")
            assert received.result(SOON_S) == b"hello"
    finally:
        signal.signal(signal.SIGUSR1, before)
