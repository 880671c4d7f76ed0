"""Signals: the lines on a control connection after the handshake. Frozen dataclasses, to and from bytes. No I/O.

docs/protocol.md describes both versions. When a signal is sent is decided by `tunnel.control` and its callers; what
comes before is in `negotiation`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_pton

from nodepass.errors import ProtocolError
from nodepass.wire.lines import TOKEN, parameter, printable, split, split_strictly

ID_LENGTH = 8  # bytes of a data connection's id: hex digits, which the server writes first on it

# Kinds of sessions.
TCP = 1
UDP = 2  # v1
LANE = 3  # v2
KIND_NAMES = {TCP: "tcp", UDP: "udp", LANE: "lane"}

# v2: why an end says goodbye.
SHUTDOWN = "shutdown"
REPLACED = "replaced"
RELOAD = "reload"
CERTIFICATE = "certificate"
BYES = {
    SHUTDOWN: "the peer is shutting down",
    REPLACED: "another client has taken this one's place",
    RELOAD: "the peer begins again: the tunnel's key has changed, or a new process takes over",
    CERTIFICATE: "the client refused this server's certificate: it must be valid, have the name in the client's URL,"
    " and come from a CA that the client's system or SSL_CERT_FILE has",
}

_COUNT = re.compile(r"[0-9]{1,9}")
_YES_OR_NO = re.compile(r"[01]")
_LAUNCH = re.compile(rb"//([0-9a-f]{8})(?:\?from=([0-9A-Fa-f.:\[\]]+)&to=([0-9A-Fa-f.:\[\]]+))?#([13])")  # v2
_V1_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([12])")
_ID = re.compile(rb"[0-9a-f]{8}")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]|([0-9.]+)):([0-9]{1,5})")
_V1_KINDS = {b"1": TCP, b"2": UDP}
_KINDS = {b"1": TCP, b"3": LANE}


@dataclass(frozen=True)
class Launch:
    """Server to client: the data connection `id` now carries a session of this kind (TCP, UDP or LANE).

    `visitor` and `local` are `ip:port` of the visitor and of the address that it connected to, where the client wants
    them.
    """

    id: str
    kind: int
    visitor: str = ""
    local: str = ""

    def encode(self) -> bytes:
        query = f"?from={self.visitor}&to={self.local}" if self.visitor else ""
        return b"//%b%b#%d\n" % (self.id.encode(), query.encode(), self.kind)


@dataclass(frozen=True)
class Heartbeat:
    """Server to client in v1, an empty line: the server is alive."""

    def encode(self) -> bytes:
        return b"\n"


@dataclass(frozen=True)
class Beat:
    """Server to client in v2: the server is alive, and has so many idle data connections."""

    idle: int

    def encode(self) -> bytes:
        return b"//beat?idle=%d\n" % self.idle


@dataclass(frozen=True)
class BeatAnswer:
    """Client to server in v2, at once: the client is alive; `ok` says whether its target answers."""

    ok: bool

    def encode(self) -> bytes:
        return b"//beat?ok=%d\n" % self.ok


@dataclass(frozen=True)
class Bye:
    """Either end in v2, its last line: why it leaves, one of BYES."""

    reason: str

    def encode(self) -> bytes:
        return f"//bye?reason={self.reason}\n".encode()


@dataclass(frozen=True)
class Unknown:
    """A well-formed line that a later version may know; its reader ignores it."""

    line: bytes

    def encode(self) -> bytes:
        return self.line + b"\n"


HEARTBEAT = Heartbeat()

Signal = Launch | Heartbeat | Beat | BeatAnswer | Bye | Unknown


def parse_v1_signal(line: bytes) -> Signal:
    """What a client reads after the handshake in v1. Raises ProtocolError."""
    if launch := _V1_LAUNCH.fullmatch(line):  # as nearly all are
        return Launch(launch[1].decode(), int(launch[2]))
    line = line.strip()
    if not line:
        return HEARTBEAT
    host, _, fragment = split(line)
    if kind := _V1_KINDS.get(fragment):
        return Launch(parse_id(host), kind)
    return Unknown(line)


def parse_signal(line: bytes) -> Signal:
    """What either end reads after the handshake in v2. Raises ProtocolError."""
    if launch := _LAUNCH.fullmatch(line):  # as most are
        addresses = [_address(text.decode()) for text in (launch[2], launch[3]) if text]
        return Launch(launch[1].decode(), int(launch[4]), *addresses)
    host, query, fragment = split_strictly(line)
    if host == b"beat":
        if "ok" in query:
            return BeatAnswer(parameter(line, query, "ok", _YES_OR_NO) == "1")
        return Beat(int(parameter(line, query, "idle", _COUNT)))
    if host == b"bye":
        return Bye(parameter(line, query, "reason", TOKEN))
    if kind := _KINDS.get(fragment):
        visitor, local = (_address(query.get(each, "")) for each in ("from", "to"))
        return Launch(parse_id(host), kind, visitor, local)
    return Unknown(line)


def _address(text: str) -> str:
    """`ip:port` or `[ip]:port` as it is; nothing where the text is no such address, which has no zone."""
    match = _ADDRESS.fullmatch(text)
    if not match or int(match[3]) > 65535:
        return ""
    try:
        inet_pton(AF_INET6 if match[1] else AF_INET, match[1] or match[2])
    except OSError:
        return ""
    return text


def parse_id(data: bytes) -> str:
    """The id of a data connection, as text. Raises ProtocolError."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 hex digits: {printable(data)}")
    return data.decode()
