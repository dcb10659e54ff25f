"""The section of shard servers: where they are, and how trainers and servers prove who they are.

What is wrong in the files that it names is for `bagpipe.server.security` to say, on the host that
has them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from bagpipe.config.base import Seconds, Section

MAX_SHARDS = 1024
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]{0,252}):([0-9]{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Splits "host:port" or "[IPv6]:port".

    Returns:
        The host, without brackets, and the port, from 0 to 65,535.

    Raises:
        ValueError: It is neither.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65_535:
        raise ValueError(f'{address!r} is no address: must be "host:port" or "[IPv6]:port"')
    return match[1].strip("[]"), int(match[2])


def _check_address(address: str) -> str:
    if split_address(address)[1] == 0:
        raise ValueError(f"{address!r}: trainers can't find a server at port 0")
    return address


Address: TypeAlias = Annotated[str, AfterValidator(_check_address)]


class TlsConfig(Section):
    """Files of TLS, all PEM. Each host has its own under these names, or all have the same."""

    root: Path
    """The certificates by which servers' certificates are checked; with `mutual`, trainers' too."""
    certificate: Path | None = None
    """A server's own certificate, and the chain behind it; with `mutual` also a trainer's."""
    key: Path | None = None
    """Its private key, readable by its owner only."""
    mutual: bool = False
    """Whether servers want a certificate of every trainer."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or neither")
        if self.mutual and self.certificate is None:
            raise ValueError("mutual = true needs certificate and key, on trainers' hosts too")
        return self


class ServersConfig(Section):
    """Shard servers: each has one part of all tables."""

    num_shards: int | None = Field(default=None, ge=1, le=MAX_SHARDS)
    """How many servers; as many as there are addresses, or 1, when left out."""
    addresses: tuple[Address, ...] = Field(default=(), max_length=MAX_SHARDS)
    """Where they are, shard by shard, e.g. ["host1:7007", "host2:7007"]. Left out: trainers start
    them on their own host."""
    token_file: Path | None = None
    """A file with the token that trainers show, readable by its owner only."""
    token_variable: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    """Or the environment variable that has it."""
    tls: TlsConfig | None = None
    start_timeout_s: Seconds = 120.0
    """How long trainers wait at their start for servers to answer."""
    timeout_s: Seconds = 300.0
    """How long a request may take, with the wait for other ranks' writes."""
    begin_timeout_s: Seconds = 1200.0
    """How long a server may take to load its rows of a checkpoint, or to write those of one. It may
    load 100 GB at 100 MB/s, and other ranks wait no longer than half an hour for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.token_file is not None and self.token_variable is not None:
            raise ValueError("token_file and token_variable are both given: give one")
        if self.addresses and self.num_shards not in (None, len(self.addresses)):
            raise ValueError(
                f"num_shards = {self.num_shards} and {len(self.addresses)} addresses: give each "
                "shard one address"
            )
        for address in self.addresses:
            if self.addresses.count(address) > 1:
                raise ValueError(f"address {address!r} is given to more than one shard")
        return self

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return self.num_shards or len(self.addresses) or 1
