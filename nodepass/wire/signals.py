"""The wire's signals: frozen dataclasses, to and from bytes. No I/O. docs/protocol.md describes both versions.

A signal is one line on the control connection, shaped like a URL without a scheme: `//<host>[?<query>][#<fragment>]`.
Parsers accept what NodePass v1.0.4 accepts: white space around a line, an ignored query, unknown fragments. When a
signal is sent is decided by `tunnel.handshake` and `tunnel.control`, which call this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nodepass.errors import ProtocolError

MAX_LINE = 4096  # bytes of one signal; the longest that either end has reason to send is under 200

# What a data connection begins with.
ID_LENGTH = 8  # bytes: hex digits that the server writes first
DATA_PREFIX = b"//data\n"  # v2: what the client writes first where data connections share the tunnel port
TLS_RECORD = b"\x16"  # the first byte of a TLS handshake

# Kinds of sessions.
TCP = 1
UDP = 2
LANE = 3  # v2
KIND_NAMES = {TCP: "tcp", UDP: "udp", LANE: "lane"}
_KINDS = {b"%d" % kind: kind for kind in KIND_NAMES}

# v2: reasons for which a server refuses a client, and what they mean for the client's operator.
KEY_REQUIRED = "key-required"
KEY_MISMATCH = "key-mismatch"
BUSY = "busy"
VERSION = "version"
SHUTDOWN = "shutdown"
REASONS = {
    KEY_REQUIRED: "the server requires a key and this client has none; set the same TUNNEL_KEY_FILE on both ends",
    KEY_MISMATCH: "the keys of server and client do not match; set the same TUNNEL_KEY_FILE on both ends",
    BUSY: "another client is connected and responding",
    VERSION: "the server does not support this version of the wire",
    SHUTDOWN: "the server is shutting down",
}

# v2: the form of each parameter of a query.
_NONCE = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FORMS = {
    "nonce": _NONCE,
    "mac": _SHA256,
    "fp": _SHA256,
    "reason": re.compile(r"[a-z-]{1,32}"),
    "hb": re.compile(r"[1-9][0-9]{0,8}"),  # milliseconds
}

_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([123])")
_LINE = re.compile(rb"//([^/?#\s]*)(?:\?([^#\s]*))?(?:#(\S*))?")
_ID = re.compile(rb"[0-9a-f]{8}")
_PORT = re.compile(rb"[0-9]{1,5}")
_TLS_MODES = (b"0", b"1", b"2")


@dataclass(frozen=True)
class Hello:
    """Client to server, its first line in v2: the client speaks this version."""

    nonce: str
    version: str = "2"

    def encode(self) -> bytes:
        return f"//hello?v={self.version}&nonce={self.nonce}\n".encode()


@dataclass(frozen=True)
class Challenge:
    """Server to client, v2 with a key: the client must prove that it has the key."""

    nonce: str

    def encode(self) -> bytes:
        return f"//challenge?nonce={self.nonce}\n".encode()


@dataclass(frozen=True)
class Auth:
    """Client to server, its answer to a challenge: proves the key."""

    mac: str

    def encode(self) -> bytes:
        return f"//auth?mac={self.mac}\n".encode()


@dataclass(frozen=True)
class Refusal:
    """Server to client, v2: the client is refused, for one of REASONS; the server then closes the connection."""

    reason: str

    def encode(self) -> bytes:
        return f"//error?reason={self.reason}\n".encode()


@dataclass(frozen=True)
class Offer:
    """Server to client, the only line of v1's handshake and the last of v2's: says where data connections go, and how.

    `heartbeat` is in milliseconds; it and everything after it is absent in v1.
    """

    data_port: int
    tls: int  # 0, 1 or 2
    heartbeat: int | None = None
    mux: bool = False  # data connections go to the tunnel port, and begin with DATA_PREFIX
    fingerprint: str = ""  # SHA-256 of the certificate in DER, with tls=1
    mac: str = ""  # the server's proof, where it has a key

    @property
    def version(self) -> int:
        return 1 if self.heartbeat is None else 2

    def encode(self) -> bytes:
        query = ""
        if self.heartbeat is not None:
            query = f"?v=2&hb={self.heartbeat}"
            query += "&mux=1" if self.mux else ""
            query += f"&fp={self.fingerprint}" if self.fingerprint else ""
            query += f"&mac={self.mac}" if self.mac else ""
        return f"//{self.data_port}{query}#{self.tls}\n".encode()


@dataclass(frozen=True)
class Launch:
    """Server to client: the data connection `id` now carries a session of this kind (TCP, UDP or LANE)."""

    id: str
    kind: int

    def encode(self) -> bytes:
        return b"//%b#%d\n" % (self.id.encode(), self.kind)


@dataclass(frozen=True)
class Heartbeat:
    """Server to client, an empty line: the server is alive. A v2 client answers with the same."""

    def encode(self) -> bytes:
        return b"\n"


@dataclass(frozen=True)
class Unknown:
    """A well-formed line that a later version may know; its reader ignores it."""

    line: bytes


HEARTBEAT = Heartbeat()


def parse_hello(line: bytes) -> Hello:
    """The first line that a server reads from a v2 client. Raises ProtocolError."""
    host, query, _ = _split(line)
    if host != b"hello":
        raise ProtocolError(f"not a hello: {printable(line)}")
    if (version := query.get("v", "")) != "2":
        return Hello("", version)
    return Hello(_parameter(line, query, "nonce"))


def parse_auth(line: bytes) -> Auth:
    """What a server reads after its challenge. Raises ProtocolError."""
    host, query, _ = _split(line)
    if host != b"auth":
        raise ProtocolError(f"not an auth: {printable(line)}")
    return Auth(_parameter(line, query, "mac"))


def parse_opening(line: bytes) -> Challenge | Refusal | Offer:
    """What a client reads until the handshake is over. Raises ProtocolError."""
    host, query, fragment = _split(line)
    if host == b"challenge":
        return Challenge(_parameter(line, query, "nonce"))
    if host == b"error":
        return Refusal(_parameter(line, query, "reason"))
    if not _PORT.fullmatch(host) or fragment not in _TLS_MODES:
        raise ProtocolError(f"not a tunnel signal: {printable(line)}")
    port, tls = int(host), int(fragment)
    if not 1 <= port <= 65535:
        raise ProtocolError(f"data port out of range: {printable(line)}")
    if query.get("v") != "2":
        return Offer(port, tls)
    return Offer(
        port,
        tls,
        int(_parameter(line, query, "hb")),
        query.get("mux") == "1",
        _parameter(line, query, "fp") if "fp" in query else "",
        _parameter(line, query, "mac") if "mac" in query else "",
    )


def _split(line: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Host, query and fragment; of a parameter given twice the first counts. Raises ProtocolError."""
    match = _LINE.fullmatch(line.strip())
    if not match:
        raise ProtocolError(f"malformed signal: {printable(line)}")
    query: dict[str, str] = {}
    for part in (match[2] or b"").decode("latin-1").split("&"):
        name, _, value = part.partition("=")
        query.setdefault(name, value)
    return match[1], query, match[3] or b""


def _parameter(line: bytes, query: dict[str, str], name: str) -> str:
    """A parameter that must have its form. Raises ProtocolError."""
    value = query.get(name, "")
    if not _FORMS[name].fullmatch(value):
        raise ProtocolError(f"{name} is missing or malformed: {printable(line)}")
    return value


def parse_signal(line: bytes) -> Launch | Heartbeat | Unknown:
    """What either end reads after the handshake. Raises ProtocolError."""
    if launch := _LAUNCH.fullmatch(line):  # as nearly all are
        return Launch(launch[1].decode(), int(launch[2]))
    line = line.strip()
    if not line:
        return HEARTBEAT
    host, _, fragment = _split(line)
    if kind := _KINDS.get(fragment):
        return Launch(parse_id(host), kind)
    return Unknown(line)


def parse_id(data: bytes) -> str:
    """The id of a data connection, as text. Raises ProtocolError."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 hex digits: {printable(data)}")
    return data.decode()


def printable(data: bytes, limit: int = 60) -> str:
    """A peer's bytes for a log line: cut, and escaped so that they cannot forge another line."""
    return repr(data[:limit])[1:] + ("…" if len(data) > limit else "")


class LineBuffer:
    """Splits a byte stream into lines of at most MAX_LINE bytes.

    A longer line is skipped up to its end and counted in `skipped`; no more than MAX_LINE bytes are held.
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
