"""SOURCE_ADDRESS and TARGET_SOURCE_ADDRESS: the address, or the interface, that a client's sockets are bound to.

It need not be there when the program starts: each dial tries again, and its error names the setting. `look` says at the
start, and for `nodepass --check`, whether it is there now. Errors are OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import Any

from nodepass.config.outbound import Source
from nodepass.config.settings import Settings
from nodepass.errors import reason, with_words
from nodepass.net.sockets import Bind

_BIND_ADDRESS_NO_PORT = 24  # <linux/in.h>: the port is chosen at the connect, as without a bind


class SourceAddress:
    """What sockets are bound to before they connect."""

    def __init__(self, name: str, source: Source) -> None:
        """`name`: of the setting."""
        self._text = f"{name}={source}"
        self._source = source
        self._family = socket.AF_INET6 if ":" in source.address else socket.AF_INET

    def bind(self, sock: Any) -> None:
        """Bind a new socket. Raises OSError."""
        try:
            if self._source.interface:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._source.interface.encode())
            elif self._source.address:
                self._bind_address(sock)
        except OSError as error:
            raise with_words(error, self._explain(error)) from None

    def look(self) -> OSError | None:
        """Why nothing can be bound to it now; None where it is there."""
        try:
            with contextlib.closing(socket.socket(self._family, socket.SOCK_STREAM)) as sock:
                self.bind(sock)
        except OSError as error:
            return error
        return None

    def _bind_address(self, sock: Any) -> None:
        if sock.family != self._family:
            one, other = ("IPv6", "IPv4") if self._family == socket.AF_INET6 else ("IPv4", "IPv6")
            raise OSError(errno.EAFNOSUPPORT, f"an address of {one} cannot connect to one of {other}")
        if sock.type & socket.SOCK_STREAM:
            with contextlib.suppress(OSError):  # not everywhere: then the kernel chooses a port of all that are free
                sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        sock.bind((self._source.address, 0))

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{self._text}: this machine has no such address"
        if error.errno == errno.ENODEV:
            return f"{self._text}: this machine has no such interface"
        if error.errno == errno.EPERM:
            return f"{self._text}: not permitted; an interface needs Linux 5.7 or CAP_NET_RAW"
        return f"{self._text}: {reason(error)}"


def bind_of(source: Source, name: str) -> Bind | None:
    """How to bind sockets to what the setting of this name says; None where routing chooses."""
    return SourceAddress(name, source).bind if source else None


def find_missing(settings: Settings) -> list[OSError]:
    """What the two settings name and this machine does not have now."""
    sources = {"SOURCE_ADDRESS": settings.source_address, "TARGET_SOURCE_ADDRESS": settings.target_source_address}
    found = (SourceAddress(name, source).look() for name, source in sources.items() if source)
    return [error for error in found if error]
