"""A relay that adds a delay to each direction of TCP connections: `python -m benchmarks.relay`.

It stands for the length of a wire where the kernel has no netem. Bytes are read as they come, and
passed on a fixed time later, so bandwidth is kept. Each direction has two threads. They sleep to
within 0.1 ms, where an event loop's timers round up to whole milliseconds.

What it can't show is a sender's own windows over a long wire: each side talks to the relay, which
answers at once. The relay holds up to 8 MB a direction, 10 Gbit/s for 6 ms.
"""

from __future__ import annotations

import argparse
import queue
import socket
import sys
import threading
import time
from contextlib import suppress

_CHUNK_BYTES = 1 << 16
_MAX_HELD_CHUNKS = 128

_Held = queue.Queue[tuple[float, bytes]]  # when to pass a chunk on, and the chunk; empty: the end


def main() -> None:
    """Prints its port, and relays until its input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, required=True, help="each way")
    arguments = parser.parse_args()
    host, _, port = arguments.to.rpartition(":")
    with socket.create_server(("", 0), backlog=128) as listener:
        print(listener.getsockname()[1], flush=True)  # noqa: T201
        threading.Thread(
            target=_accept,
            args=(listener, (host, int(port)), arguments.delay_ms / 1e3),
            daemon=True,
        ).start()
        sys.stdin.read()


def _accept(listener: socket.socket, target: tuple[str, int], delay_s: float) -> None:
    while True:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(target)
        except OSError:  # nobody is there: whoever connects to the relay learns it by the end
            near.close()
            continue
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            held: _Held = queue.Queue(_MAX_HELD_CHUNKS)
            for work in (_take_in, _pass_on):
                thread_arguments = (source if work is _take_in else sink, held, delay_s)
                threading.Thread(target=work, args=thread_arguments, daemon=True).start()


def _take_in(source: socket.socket, held: _Held, delay_s: float) -> None:
    chunk = b"more"
    while chunk:
        try:
            chunk = source.recv(_CHUNK_BYTES)
        except OSError:
            chunk = b""
        held.put((time.monotonic() + delay_s, chunk))


def _pass_on(sink: socket.socket, held: _Held, delay_s: float) -> None:
    """Goes on taking chunks when the sink is gone, so that its source's thread ends as well."""
    while True:
        due, chunk = held.get()
        time.sleep(max(due - time.monotonic(), 0.0))
        with suppress(OSError):
            if not chunk:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(chunk)


if __name__ == "__main__":
    main()
