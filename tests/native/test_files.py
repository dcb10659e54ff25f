"""Files that replace others: whole, or the one that was there stays, and nothing lies beside."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.disks import ForgetfulDisk, files_of_at_most
from tests.soon import SOON_S

from bagpipe.cli.common import save_json
from bagpipe.errors import ConfigError, StoreError
from bagpipe.native.files import remedy, replaced
from bagpipe.plots import save_figure


def write(path: Path, content: bytes) -> None:
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def plot(path: Path) -> None:
    figure = Figure()
    figure.add_subplot().plot(range(9))
    save_figure(figure, path)


EXPORTS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.bin", lambda path: write(path, bytes(5_000))),
    ("a.png", plot),
    ("a.svg", plot),
    ("a.json", lambda path: save_json({"numbers": list(range(2_000))}, path)),
]


@pytest.mark.parametrize(("name", "export"), EXPORTS, ids=[name for name, _ in EXPORTS])
def test_a_full_disk_leaves_the_older_file_alone(
    tmp_path: Path, name: str, export: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    export(path)
    before = path.read_bytes()
    with files_of_at_most(2_000), pytest.raises(ConfigError) as caught:
        export(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]
    assert f"{path}: can't be written: File too large; the file that was there" in str(caught.value)
    assert "Make room, or give another path" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EROFS, "Let the user of this process write there"),
        (errno.EIO, "See to its file system"),
    ],
)
def test_what_to_do_follows_from_what_failed(number: int, what: str) -> None:
    assert remedy(OSError(number, "")) == what


@pytest.mark.parametrize("name", ["nowhere/a.png", ".", "file/a.png"])
def test_a_place_that_cannot_be_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    for export in (plot, lambda path: save_json({}, path)):
        with pytest.raises(ConfigError, match=r"can't be written: (No such|Is a|Not a) "):
            export(tmp_path / name)


def test_how_much_is_needed_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(StoreError, match=r"\(1,234 bytes are needed, [\d,]+ are free\)"),
        replaced(tmp_path / "a", StoreError, needs_bytes=1_234),
    ):
        raise OSError(28, "No space left on device")


def test_an_error_in_between_is_raised_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "a", b"old")
    for error in (StoreError("row 3 is gone"), KeyboardInterrupt(), ZeroDivisionError()):

        def fail(error: BaseException = error) -> None:
            with replaced(tmp_path / "a") as temporary:
                temporary.write_bytes(b"new")
                raise error

        with pytest.raises(type(error)) as caught:
            fail()
        assert caught.value is error
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.xyz: the plot can't be saved: Format 'xyz'"):
        plot(tmp_path / "a.xyz")
    assert os.listdir(tmp_path) == []


def test_rights_and_links_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_pipe_and_a_device_are_written_themselves(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe", b"new")
    reader.join(SOON_S)
    assert read == [b"new"]
    write(Path("/dev/null"), b"new")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(ConfigError, match="/dev/full: can't be written: No space left on device"):
        write(Path("/dev/full"), b"new")


def test_a_long_name_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".json")
    write(path, b"{}")
    assert path.read_bytes() == b"{}"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    save_json({"old": 1}, path)
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from bagpipe.native.files import replaced\n"
        f"with replaced(Path({str(path)!r})) as temporary:\n"
        "    temporary.write_bytes(b'{')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_power_cut_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, left = tmp_path / "disk", tmp_path / "left"
    root.mkdir()
    write(root / "a", b"old")
    disk = ForgetfulDisk(root, monkeypatch)
    write(root / "a", b"old")  # now it is synced

    def cut() -> set[bytes]:
        return {
            (disk.after_a_power_cut(left, lambda written=written: written) / "a").read_bytes()
            for written in (False, True)
        }

    seen: list[set[bytes]] = []
    disk.at_every_event(lambda: seen.append(cut()))
    write(root / "a", b"new")
    disk.at_every_event(lambda: None)
    assert all(contents <= {b"old", b"new"} for contents in seen)
    assert cut() == {b"new"}
    disk.close()
