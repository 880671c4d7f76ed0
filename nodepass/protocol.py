"""Wire v1: signals as frozen dataclasses, to and from bytes. No I/O.

A signal is one line on the control connection, shaped like a URL without scheme: `//<host>[?<query>][#<fragment>]`.
Both parsers accept what a NodePass v1.0.4 accepts: white space around a line, an ignored query, unknown fragments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nodepass.errors import ProtocolError

MAX_LINE = 4096  # bytes of one signal; the longest that a peer has reason to send is under 200
ID_LENGTH = 8  # bytes: hex digits that the server writes first on a data connection

TCP = 1
UDP = 2
KIND_NAMES = {TCP: "tcp", UDP: "udp"}

_LINE = re.compile(rb"//([^/?#\s]*)(?:\?([^#\s]*))?(?:#(\S*))?")
_ID = re.compile(rb"[0-9a-f]{8}")


@dataclass(frozen=True)
class Tunnel:
    """Server to client, first line: where data connections go, and their TLS mode (0, 1 or 2)."""

    data_port: int
    tls: int

    def encode(self) -> bytes:
        return b"//%d#%d\n" % (self.data_port, self.tls)


@dataclass(frozen=True)
class Launch:
    """Server to client: the data connection `id` now carries a session of this kind (TCP or UDP)."""

    id: str
    kind: int

    def encode(self) -> bytes:
        return b"//%b#%d\n" % (self.id.encode(), self.kind)


@dataclass(frozen=True)
class Heartbeat:
    """Server to client: I am here. An empty line."""

    def encode(self) -> bytes:
        return b"\n"


@dataclass(frozen=True)
class Unknown:
    """A well-formed line whose meaning a later version may know; to be ignored."""

    line: bytes


HEARTBEAT = Heartbeat()


def parse_tunnel(line: bytes) -> Tunnel:
    """The first line that a client reads. Raises ProtocolError."""
    match = _LINE.fullmatch(line.strip())
    if not match or not re.fullmatch(rb"[0-9]{1,5}", match[1]) or match[3] not in (b"0", b"1", b"2"):
        raise ProtocolError(f"not a tunnel signal: {printable(line)}")
    port = int(match[1])
    if not 1 <= port <= 65535:
        raise ProtocolError(f"data port out of range: {printable(line)}")
    return Tunnel(port, int(match[3]))


def parse_signal(line: bytes) -> Launch | Heartbeat | Unknown:
    """Any later line that a client reads. Raises ProtocolError."""
    line = line.strip()
    if not line:
        return HEARTBEAT
    match = _LINE.fullmatch(line)
    if not match:
        raise ProtocolError(f"malformed signal: {printable(line)}")
    if match[3] not in (b"1", b"2"):
        return Unknown(line)
    return Launch(parse_id(match[1]), int(match[3]))


def parse_id(data: bytes) -> str:
    """The id of a data connection, as text. Raises ProtocolError."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 hex digits: {printable(data)}")
    return data.decode()


def printable(data: bytes, limit: int = 60) -> str:
    """A peer's bytes for a log line: escaped, so that they can forge none, and cut."""
    return repr(data[:limit])[1:] + ("…" if len(data) > limit else "")


class LineBuffer:
    """Splits a byte stream into lines of at most MAX_LINE bytes.

    A longer line is skipped up to its end and counted in `skipped`; what is held never exceeds MAX_LINE.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._held = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        *ended, rest = data.split(b"\n")
        lines = [line for end in ended if (line := self._end(end)) is not None]
        self._hold(rest)
        return lines

    def _hold(self, part: bytes) -> None:
        if self._skipping:
            return
        if len(self._held) + len(part) > MAX_LINE:
            self.skipped += 1
            self._skipping, self._held = True, b""
        else:
            self._held += part

    def _end(self, part: bytes) -> bytes | None:
        self._hold(part)
        line = None if self._skipping else self._held
        self._skipping, self._held = False, b""
        return line
