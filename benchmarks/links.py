"""Hosts with a network between them, on one machine.

A host is a network namespace. A veth pair leads from each to a switch, a bridge in a namespace of
its own. Each end of a pair sends at the link's rate (`tc tbf`), so a host sends and receives that
much at the same time, and two hosts that send to a third share its link. Nothing of the machine's
own network is touched.

A delay is added by a relay on the switch (`benchmarks.relay`), since not every kernel has netem.
TCP's congestion control is Reno everywhere, whatever the machine's own is. BBR, the default of some
machines, leaves 3 % of such a link unused.

This needs Linux, root, and `ip` and `tc` of iproute2.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bagpipe.errors import ConfigError

_SWITCH_ADDRESS = "10.77.0.254"
_CONGESTION_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_QUEUE_MS = 50
_BURST_S, _LEAST_BURST_BYTES = 5e-4, 3_200
"""How long an idle link saves up what it may then send at once: a real one saves nothing."""
_LARGEST_SEGMENT_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class Link:
    """What leads from each host to the switch, the same both ways."""

    gbit_per_s: float
    delay_ms: float = 0.0
    """Each way from host to host, for connections that go by `Network.way_to`."""

    def __post_init__(self) -> None:
        if not 0 < self.gbit_per_s <= 100 or not 0 <= self.delay_ms <= 1_000:
            raise ConfigError(
                f"a link of {self.gbit_per_s:g} Gbit/s with {self.delay_ms:g} ms: give it up to "
                "100 Gbit/s and 1,000 ms"
            )

    @property
    def bytes_per_s(self) -> float:
        """Bytes on the wire a second, headers of TCP, IP and Ethernet among them."""
        return self.gbit_per_s * 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace with one address."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """What to start so that `command` runs on this host; it replaces itself by that."""
        return ["ip", "netns", "exec", self.namespace, *command]


class Network:
    """Hosts, and the way from one to another."""

    def __init__(self, hosts: Sequence[Host], switch: Host, link: Link, stack: ExitStack) -> None:
        """Made by `linked_hosts`."""
        self.hosts, self.link = tuple(hosts), link
        self._switch, self._stack = switch, stack

    def way_to(self, host: Host, port: int) -> tuple[str, int]:
        """Address and port to connect to from another host, so that the delay is met."""
        if not self.link.delay_ms:
            return host.address, port
        target = ("--to", f"{host.address}:{port}", "--delay-ms", str(self.link.delay_ms))
        command = self._switch.command(sys.executable, "-m", "benchmarks.relay", *target)
        relay = self._stack.enter_context(running(command))
        return self._switch.address, int(first_line(relay))


def why_not() -> str | None:
    """Why hosts can't be linked on this machine; None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 is missing: install it"
    name = _new_name()
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"the kernel refuses a network namespace: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def linked_hosts(num_hosts: int, link: Link) -> Iterator[Network]:
    """Makes hosts and takes them away again.

    Args:
        num_hosts: 1 to 200.
        link: what each host has.

    Raises:
        ConfigError: this machine can't; the message says why.
    """
    if not 1 <= num_hosts <= 200:
        raise ConfigError(f"{num_hosts} hosts: give 1 to 200")
    reason = why_not()
    if reason is not None:
        raise ConfigError(f"can't make hosts on this machine: {reason}")
    name = _new_name()
    switch = Host(namespace=f"{name}-switch", address=_SWITCH_ADDRESS)
    hosts = [
        Host(namespace=f"{name}-{number}", address=f"10.77.0.{number + 1}")
        for number in range(num_hosts)
    ]
    with ExitStack() as stack:
        for host in (switch, *hosts):
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "del", host.namespace)
            _run(*host.command("sh", "-c", f"echo reno > {_CONGESTION_CONTROL}"))
        _batch(switch, _switch_lines())
        for number, host in enumerate(hosts):
            _connect(host, switch, f"port{number}", link)
        yield Network(hosts, switch, link, stack)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes to its input and from its output, which ends with the block.

    It is asked to end by the end of its input, and killed if it does not.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    """What a process prints first, once it is ready.

    Raises:
        ConfigError: it ended before.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise ConfigError(f"{process.args!r} ended with status {process.wait()} at its start")
    return line.strip()


def _new_name() -> str:
    return f"bagpipe-{os.getpid()}-{secrets.token_hex(2)}"


def _switch_lines() -> list[str]:
    return [
        "link set lo up",
        "link add switch type bridge",
        f"address add {_SWITCH_ADDRESS}/24 dev switch",
        "link set switch up",
    ]


def _connect(host: Host, switch: Host, port: str, link: Link) -> None:
    _run(
        *("ip", "link", "add", "name", "wire", "netns", host.namespace, "type", "veth"),
        *("peer", "name", port, "netns", switch.namespace),
    )
    _batch(switch, [f"link set {port} master switch", f"link set {port} up"])
    _batch(host, ["link set lo up", f"address add {host.address}/24 dev wire", "link set wire up"])
    burst_bytes = max(int(link.bytes_per_s * _BURST_S), _LEAST_BURST_BYTES)
    # what is larger than a burst would be cut into packets one by one
    segment_bytes = min(int(burst_bytes * 0.9), _LARGEST_SEGMENT_BYTES)
    for namespace, device in ((host.namespace, "wire"), (switch.namespace, port)):
        _run("ip", "-n", namespace, "link", "set", device, "gso_max_size", str(segment_bytes))
        _run(
            *("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf"),
            *("rate", f"{int(link.gbit_per_s * 1e9)}bit", "burst", f"{burst_bytes}b"),
            *("latency", f"{_QUEUE_MS}ms"),
        )


def _batch(host: Host, lines: Sequence[str]) -> None:
    _run("ip", "-n", host.namespace, "-batch", "-", given="\n".join(lines))


def _run(*command: str, given: str = "") -> None:
    ended = subprocess.run(command, input=given, capture_output=True, text=True)
    if ended.returncode:
        raise ConfigError(
            f"can't make hosts on this machine: {' '.join(command)}: {ended.stderr.strip()}"
        )
