"""Interfaces and addresses are found by each other; servers' address follows gloo's interface."""

from __future__ import annotations

import socket

import pytest

from bagpipe.native.interfaces import address_of, interface_of
from bagpipe.server.made import own_address


def test_an_interface_and_its_address_are_found_by_each_other() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert address_of("lo") == "127.0.0.1"
    assert interface_of("192.0.2.1") is None
    assert address_of("no-such-one") is None


@pytest.mark.parametrize(
    ("interfaces", "address"),
    [
        ("lo", "127.0.0.1"),
        ("no-such-one,lo", "127.0.0.1"),
        ("", "192.0.2.7"),
        ("no-such-one", "192.0.2.7"),
    ],
)
def test_servers_that_trainers_start_tell_the_address_of_gloos_interface(
    interfaces: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "192.0.2.7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interfaces)
    assert own_address() == address
