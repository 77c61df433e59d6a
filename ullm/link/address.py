"""Where an engine listens for front ends: ``unix:PATH``, ``unix:@NAME`` or ``HOST:PORT``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import trio

from ullm.errors import ConfigError, ResourceUnavailable

UNIX = "unix:"
EXPECTED = "expected unix:PATH or HOST:PORT"


@dataclass(frozen=True)
class Address:
    """A place to listen or to connect to.

    Args:
        path: of a unix socket; a name in Linux's abstract namespace begins with a zero byte. Empty for TCP.
    """

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, option: str, text: str) -> Address:
        """Read an address.

        Args:
            option: that the text comes from, for errors.

        Raises:
            ConfigError: it is none.
        """
        if text.startswith(UNIX):
            path = text.removeprefix(UNIX)
            if not path.strip("@"):
                raise ConfigError(f"{option} {text}: the path is missing; {EXPECTED}")
            if path.startswith("@") and sys.platform != "linux":
                raise ResourceUnavailable(
                    f"{option} {text}: only Linux has sockets without a file; use unix:PATH"
                )
            return cls(path=f"\0{path[1:]}" if path.startswith("@") else path)
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"{option} {text}: {EXPECTED}")
        return cls(host=host, port=int(port))

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return bool(self.path)

    async def connect(self) -> trio.SocketStream:
        """Connect to an engine that listens there.

        Raises:
            OSError: none does.
        """
        if self.is_unix:
            return await trio.open_unix_socket(self.path)
        return await trio.open_tcp_stream(self.host, self.port)
