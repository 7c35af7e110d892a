"""HOST:PORT as users write it, and whether it can be listened at."""

from __future__ import annotations

import socket
from typing import NamedTuple

from flashtalk_cli.errors import UsageError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Address(NamedTuple):
    """Where to listen."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    @property
    def family(self) -> socket.AddressFamily:
        """What kind of socket listens there."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(option: str, text: str) -> Address:
    """`HOST:PORT`, `[::1]:PORT`, or only `PORT`, which is this machine's loopback. Raises `UsageError`."""
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or LOOPBACK[0]
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UsageError(f"{option} is {text!r}; give HOST:PORT such as 127.0.0.1:9100, or only a port")
    return Address(host, int(port))


def check_free(option: str, address: Address) -> None:
    """`UsageError` when nobody could listen there now."""
    with socket.socket(address.family, socket.SOCK_STREAM) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            line.bind(tuple(address))
        except OSError as error:
            raise UsageError(
                f"{option}: cannot listen at {address} ({error.strerror}); choose another"
            ) from None
