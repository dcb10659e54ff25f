"""What a trainer of shared staging may do wrong, on purpose too: it harms no server, nor others."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.server.staged import GROUP, ROOM_BYTES, Host, place
from tests.soon import SOON_S, TIMEOUT_S
from tests.store_contract import rows_of

from bagpipe.errors import StoreError
from bagpipe.server.staging import (
    HEADER_BYTES,
    MAX_ROWS,
    MAX_UNDER_WAY,
    StagingStream,
    is_near,
)
from bagpipe.server.wire import Place, What

__all__ = ["place"]

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


WRONG_REQUESTS = {
    "another epoch": ({"epoch": 9}, "epoch 9 is not served, epoch 3 is"),
    "another instance": ({"instance": "ab" * 16}, "another life of this server"),
    "no rank": ({"rank": 2}, "has 2 trainers and no rank 2"),
    "no group": ({"group": 1}, "names group 1, there are 1"),
    "another slot": ({"slot": 1}, "slot 1"),
    "no staging": ({"place": Place.INLINE}, "place INLINE"),
    "between floats": ({"offset": 6}, "offset 6: it must be STAGING, slot 0 and a multiple of 4"),
    "behind the end": ({"offset": ROOM_BYTES - 8}, "56 bytes from 1,048,568 on of memory that has"),
    "far behind": ({"offset": 2**62}, "memory that has 1,048,576"),
    "a write": ({"what": What.WRITE}, "opened for a FETCH has a WRITE"),
    "an answer": ({"what": What.ANSWER}, "opened for a FETCH has a ANSWER"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
def test_a_wrong_header_is_an_error_and_others_are_served(place: Host, name: str) -> None:
    values, facts = WRONG_REQUESTS[name]
    stream = place.stream(What.FETCH)
    stream.send(place.header(**{"what": What.FETCH, **values}), rows_of(1, 2))
    with pytest.raises(StoreError, match=facts):
        stream.receive()
    place.check_serves()


@pytest.mark.parametrize("row", [-1, GROUP.num_rows, 2**62, -(2**63)])
@pytest.mark.parametrize("what", [What.FETCH, What.WRITE])
def test_a_row_out_of_range_is_an_error_and_others_are_served(
    place: Host, what: What, row: int
) -> None:
    stream = place.stream(what)
    stream.send(place.header(what), rows_of(1, row))
    with pytest.raises(StoreError, match="lies outside group"):
        stream.receive()
    place.check_serves()


def raw(place: Host, *files: int, opening: bytes | None = None) -> socket.socket:
    """A connection whose opening brings any files, and is any bytes."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(SOON_S)
    connection.connect(f"\0{place.server.address}")
    greeting = place.header(What.FETCH).encode() if opening is None else opening
    socket.send_fds(connection, [greeting], list(files))
    return connection


def told(connection: socket.socket) -> str:
    """The error that ends a connection."""
    with connection:
        text = connection.recv(1 << 16)[HEADER_BYTES:].decode()
        with contextlib.suppress(ConnectionResetError):  # what was sent was not read to the end
            assert connection.recv(1) == b""
    return text


def memory_file(size_bytes: int, seals: int, flags: int = 0) -> int:
    file = os.memfd_create("test", os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(file, size_bytes)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def read_only_file(place: Host) -> int:
    return os.open(f"/proc/self/fd/{place.memory.file}", os.O_RDONLY)


WRONG_FILES: dict[str, tuple[Callable[[Host, Path], int], str]] = {
    "a plain file": (
        lambda _, folder: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
        "no memory file",
    ),
    "a pipe": (lambda *_: os.pipe()[0], "no memory file"),
    "a socket": (lambda *_: socket.socket().detach(), "no memory file"),
    "the null device": (lambda *_: os.open("/dev/null", os.O_RDWR), "no memory file"),
    "a file that may get smaller": (lambda *_: memory_file(8_192, 0), "may get smaller: seal it"),
    "an empty file": (lambda *_: memory_file(0, SEALS), "has 0 bytes, must have 4,096 to"),
    "half a page": (lambda *_: memory_file(2_048, SEALS), "has 2,048 bytes, must have 4,096 to"),
    "a huge file": (lambda *_: memory_file(1 << 41, SEALS), "has 2,199,023,255,552 bytes, must"),
    "a file that can't be written": (
        lambda *_: memory_file(8_192, SEALS | fcntl.F_SEAL_WRITE),
        "can't map the memory file",
    ),
    "a descriptor for reading": (lambda place, _: read_only_file(place), "can't map the memory"),
    "huge pages": (
        lambda *_: memory_file(1 << 21, SEALS, os.MFD_HUGETLB),
        "has huge pages: use small ones",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_file_is_an_error_and_others_are_served(
    place: Host, name: str, tmp_path: Path
) -> None:
    make, facts = WRONG_FILES[name]
    file = make(place, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert facts in told(raw(place, file))
    os.close(file)
    place.check_serves()
    assert len(os.listdir("/proc/self/fd")) < before + 3  # the server keeps none of them


def test_no_file_and_two_files_are_errors(place: Host) -> None:
    assert "brings 0 files, must bring 1" in told(raw(place))
    assert "brings 2 files, must bring 1" in told(raw(place, place.memory.file, place.memory.file))
    place.check_serves()


def test_openings_that_are_none_are_errors(place: Host) -> None:
    draw = random.Random(3)
    good = place.header(What.FETCH).encode()
    wrong = [b"x", good[:-1], good + b"x", draw.randbytes(HEADER_BYTES)]
    wrong += [bytes([*good[:at], good[at] ^ 0xFF, *good[at + 1 :]]) for at in range(8)]
    wrong.append(place.header(What.ANSWER).encode())
    for opening in wrong:
        assert told(raw(place, place.memory.file, opening=opening))
    place.check_serves()


def test_messages_that_are_none_are_errors(place: Host) -> None:
    good = place.header(What.FETCH).encode()
    wrong = [b"x", good[:-1], good + b"x", good + bytes(7), good + bytes(8 * MAX_ROWS + 1)]
    wrong += [good + bytes(8 * MAX_ROWS + 8), random.Random(4).randbytes(HEADER_BYTES)]
    for message in wrong:
        connection = raw(place, place.memory.file)
        assert len(connection.recv(1 << 16)) == HEADER_BYTES  # the opening is answered
        connection.send(message)
        assert told(connection)
    place.check_serves()


def num_descriptors_of(file: int) -> int:
    """How many descriptors of this process lead to the same file."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # another thread has closed it
            found += os.path.samestat(os.fstat(int(name)), os.fstat(file))
    return found


def test_a_file_handed_over_with_a_request_is_not_kept(place: Host) -> None:
    connection = raw(place, place.memory.file)
    connection.recv(1 << 16)
    before = num_descriptors_of(place.memory.file)
    for _ in range(20):
        request = place.header(What.FETCH).encode() + rows_of(1).tobytes()
        socket.send_fds(connection, [request], [place.memory.file] * 5)
        assert len(connection.recv(1 << 16)) == HEADER_BYTES
    assert num_descriptors_of(place.memory.file) == before
    connection.close()


def test_the_memory_can_not_get_smaller_and_may_lose_its_pages(place: Host) -> None:
    """The server writes to pages that were taken away from the file: they come anew."""
    with pytest.raises(PermissionError):
        os.ftruncate(place.memory.file, mmap.PAGESIZE)
    place.check_serves()
    hole = ["fallocate", "--punch-hole", "--offset", "0", "--length", str(ROOM_BYTES)]
    target = f"/proc/{os.getpid()}/fd/{place.memory.file}"
    subprocess.run([*hole, target], check=True)
    place.check_serves()


def test_trainers_that_go_in_the_middle_are_forgotten(place: Host) -> None:
    request = place.header(What.FETCH).encode() + rows_of(1).tobytes()
    for _ in range(10):
        raw(place, place.memory.file).close()  # before the opening is answered
        connection = raw(place, place.memory.file)
        for _ in range(MAX_UNDER_WAY):
            connection.send(request)
        connection.close()  # before anything is answered
    place.check_serves()


def test_a_trainer_that_reads_nothing_holds_up_nobody(place: Host) -> None:
    request = place.header(What.FETCH).encode() + rows_of(1).tobytes()
    connection = raw(place, place.memory.file)
    connection.setblocking(False)
    num_sent = 0
    with contextlib.suppress(BlockingIOError):
        while num_sent < 100_000:
            connection.send(request)
            num_sent += 1
    assert MAX_UNDER_WAY < num_sent < 100_000
    place.check_serves()
    connection.close()


def test_those_who_say_nothing_hold_up_nobody(place: Host) -> None:
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
    for connection in silent:
        connection.connect(f"\0{place.server.address}")
    place.check_serves()
    for connection in silent:
        connection.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_sent_away(
    place: Host, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import os, socket, sys; os.setuid(65534);"
        "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "connection.connect(chr(0) + sys.argv[1]); print(connection.recv(10))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, place.server.address], capture_output=True, text=True
    )
    assert ended.stdout == "b''\n"
    assert "of user 65534 was refused shared memory of this server of user 0" in caplog.text
    place.check_serves()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_has_the_name_gets_no_memory(place: Host) -> None:
    name = "bagpipe-test-" + secrets.token_hex(8)
    code = (
        "import os, socket, sys; os.setuid(65534);"
        "listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "listener.bind(chr(0) + sys.argv[1]); listener.listen(); print('ready', flush=True);"
        "print([socket.recv_fds(listener.accept()[0], 99, 1)[:2] for _ in range(2)])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert not is_near(name)
        with pytest.raises(StoreError, match=f"process {other.pid} of user 65534 is there"):
            StagingStream(name, place.memory, place.header(What.FETCH), timeout_s=TIMEOUT_S)
        assert other.stdout.readline() == "[(b'', []), (b'', [])]\n"
