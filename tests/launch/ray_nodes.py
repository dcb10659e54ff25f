"""A Ray cluster of several nodes on one machine: each has an address, a name and processes of its
own, and dies as a machine does, with all of them at once.

A node is a host of `benchmarks.links` with namespaces for processes, mounts and its name beside
that of its network. Ray's files and shared memory are each node's own; all other files are common,
as a run's folder has to be. Whoever joins shows a token.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.links import Host, Link, linked_hosts

_PORT = 6379
_OBJECT_STORE_BYTES = 80_000_000
_START_TIMEOUT_S = 60.0
_OWN_FILES = (
    "mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && mount -t tmpfs none /dev/shm"
    " && mount --bind $HOSTS /etc/hosts && hostname $NAME && exec "
)


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of the cluster."""

    host: Host
    pid: int
    """Of its first process, with which all others end."""
    environment: dict[str, str]

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Starts a command on this node."""
        entered = ["nsenter", "-t", str(self.pid), "-m", "-n", "-u", "-p", f"--wdns={os.getcwd()}"]
        return subprocess.Popen(
            [*entered, *command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self) -> None:
        """Ends all processes of this node at once."""
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def ray_nodes(num_nodes: int, folder: Path) -> Iterator[Sequence[Node]]:
    """Makes a cluster, on whose first node nothing runs but what is started there by hand.

    Args:
        num_nodes: With the first one.
        folder: For the token and what nodes print.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    with ExitStack() as stack:
        network = stack.enter_context(linked_hosts(num_nodes, Link(gbit_per_s=10)))
        # as on many machines a node's own name leads to loopback
        names = " ".join(f"node{number}" for number in range(num_nodes))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {names}\n")
        head = network.hosts[0].address
        nodes = []
        for number, host in enumerate(network.hosts):
            where = ["--num-cpus=2", f"--address={head}:{_PORT}"]
            if number == 0:
                where = ["--num-cpus=0", "--head", f"--port={_PORT}", "--include-dashboard=false"]
            process = _started(
                host.command(*_as_machine()),
                [*where, f"--node-ip-address={host.address}"],
                environment | {"HOSTS": str(folder / "hosts"), "NAME": f"node{number}"},
                folder / f"node{number}.log",
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # and with it the node's first process
            nodes.append(Node(host=host, pid=_first_child(process), environment=environment))
        _wait_for(nodes)
        yield nodes


def _as_machine() -> list[str]:
    return ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]


def _started(
    machine: Sequence[str], where: Sequence[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block"]
    ray += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    with log.open("w") as told:
        return subprocess.Popen(
            [*machine, "sh", "-c", _OWN_FILES + '"$@"', "sh", *ray],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=told,
        )


def _first_child(process: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not (found := children.read_text().split()):
        assert time.monotonic() < deadline, process.args
        time.sleep(0.01)
    return int(found[0])


def _wait_for(nodes: Sequence[Node]) -> None:
    """Waits until the cluster has all nodes."""
    code = "import ray; ray.init(address='auto', logging_level='ERROR'); print(len(ray.nodes()))"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        asking = nodes[0].start(sys.executable, "-W", "ignore", "-c", code)
        told = asking.communicate(timeout=_START_TIMEOUT_S)[0]
        if told.strip().endswith(str(len(nodes))):
            return
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
