"""Whether a token is right, and how often an address may be wrong.

An address that showed too many wrong tokens is refused for a while, with the right one, too: else
guessing would go on at full speed. A call without a token is no guess and shuts nobody out, so that
a scanner behind the same address does no harm. Streams that are open go on.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pydantic import SecretStr

SCHEME = "Bearer "
"""What stands before the token in the header `authorization`."""
_MAX_ADDRESSES = 4096

_log = logging.getLogger(__name__)


class Logins:
    """Says of each call whether it may go on; any thread may ask.

    Args:
        token: The right one, of which only a digest is kept; None: everybody may go on.
        max_failures: So many wrong tokens an address may show within one window.
        window_s: The window, from the first of them on.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        token: SecretStr | None,
        *,
        max_failures: int = 10,
        window_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digest = None if token is None else _digest(token.get_secret_value())
        self._max_failures, self._window_s, self._clock = max_failures, window_s, clock
        self._lock = threading.Lock()
        # address -> (when its window ends, wrong tokens within it); the oldest windows first
        self._failures: OrderedDict[str, tuple[float, int]] = OrderedDict()
        self.num_refused = 0
        """Calls that were refused, for any reason."""

    def refusal(self, address: str, shown: Sequence[str | bytes]) -> str | None:
        """Why a call is refused; None where it may go on.

        Args:
            address: The caller's.
            shown: The values of its headers `authorization`.
        """
        if self._digest is None:
            return None
        wait_s = self._wait_s(address)
        if wait_s == 0 and self._is_right(shown, self._digest):
            return None
        with self._lock:
            self.num_refused += 1
        if wait_s > 0:
            return f"too many wrong tokens from {address}: try again in {wait_s:.0f} s"
        if not shown:
            return "a token is wanted: set it in servers.token_file or servers.token_variable"
        self._failed(address)
        return "the token is wrong"

    def _is_right(self, shown: Sequence[str | bytes], right: bytes) -> bool:
        # one and no other, so that nobody in between can add a guess of their own
        value = shown[0] if len(shown) == 1 else ""
        token = value.removeprefix(SCHEME) if isinstance(value, str) else ""
        # digests take equally long to compare, whatever the token's length
        return hmac.compare_digest(_digest(token), right) and value == SCHEME + token

    def _wait_s(self, address: str) -> float:
        with self._lock:
            ends, failures = self._failures.get(address, (0.0, 0))
            return max(0.0, ends - self._clock()) if failures >= self._max_failures else 0.0

    def _failed(self, address: str) -> None:
        """Counts a wrong token. It is logged where it is an address's first or last in a while."""
        with self._lock:
            now = self._clock()
            ends, failures = self._failures.get(address, (0.0, 0))
            if ends <= now:
                self._failures.pop(address, None)
                ends, failures = now + self._window_s, 0
            failures += 1
            self._failures[address] = ends, failures
            if len(self._failures) > _MAX_ADDRESSES:
                self._failures.popitem(last=False)
        if failures == 1:
            _log.warning("a login from %s was refused: its token is wrong", address)
        if failures == self._max_failures:
            _log.warning(
                "%d wrong tokens from %s: its logins are refused for %.0f s",
                *(failures, address, ends - now),
            )


def address_of(host: str) -> str:
    """The address by which a caller is counted; of IPv6 its network, since a host has 2^64 of them.

    Args:
        host: An IP address; anything else is its own address.
    """
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:100]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
