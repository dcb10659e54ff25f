"""Network interfaces of this machine, and their IPv4 addresses."""

from __future__ import annotations

import fcntl
import socket
import struct

_ADDRESS_OF_INTERFACE = 0x8915
"""Linux's SIOCGIFADDR."""
_NAME_BYTES = 255


def address_of(interface: str) -> str | None:
    """The IPv4 address of that network interface; None: there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            told = fcntl.ioctl(
                asking,
                _ADDRESS_OF_INTERFACE,
                struct.pack("256s", interface.encode()[:_NAME_BYTES]),
            )
        except OSError:
            return None
    return socket.inet_ntoa(told[20:24])


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with that IPv4 address; None: there is none."""
    names = (name for _, name in socket.if_nameindex())
    return next((name for name in names if address_of(name) == address), None)
