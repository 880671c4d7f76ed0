"""The wire's signals as frozen dataclasses, to and from bytes. No I/O. docs/protocol.md describes both versions.

A signal is one line on the control connection, shaped like a URL without scheme: `//<host>[?<query>][#<fragment>]`.
Parsers accept what a NodePass v1.0.4 accepts: white space around a line, an ignored query, unknown fragments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nodepass.errors import ProtocolError

MAX_LINE = 4096  # bytes of one signal; the longest that a peer has reason to send is under 200
ID_LENGTH = 8  # bytes: hex digits that the server writes first on a data connection

TCP = 1
UDP = 2
LANE = 3  # v2
KIND_NAMES = {TCP: "tcp", UDP: "udp", LANE: "lane"}
_KINDS = {b"%d" % kind: kind for kind in KIND_NAMES}

DATA_PREFIX = b"//data\n"  # v2: what a data connection begins with where it shares the tunnel port
TLS_RECORD = b"\x16"  # what a TLS handshake begins with

# v2: why a peer is turned away, in the words of the log.
KEY_REQUIRED = "key-required"
KEY_MISMATCH = "key-mismatch"
BUSY = "busy"
VERSION = "version"
SHUTDOWN = "shutdown"
REASONS = {
    KEY_REQUIRED: "the server requires a key and this client has none: give it the same TUNNEL_KEY_FILE",
    KEY_MISMATCH: "the keys of server and client do not match: give both the same TUNNEL_KEY_FILE",
    BUSY: "another client is connected to that server, and alive",
    VERSION: "the other end does not speak this version of the wire",
    SHUTDOWN: "the server is shutting down",
}

_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([123])")
_LINE = re.compile(rb"//([^/?#\s]*)(?:\?([^#\s]*))?(?:#(\S*))?")
_ID = re.compile(rb"[0-9a-f]{8}")
_NONCE = re.compile(r"[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[a-z-]{1,32}")
_MILLISECONDS = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Hello:
    """Client to server, its first line in v2: I speak v2."""

    nonce: str
    version: str = "2"

    def encode(self) -> bytes:
        return f"//hello?v={self.version}&nonce={self.nonce}\n".encode()


@dataclass(frozen=True)
class Challenge:
    """Server to client, v2 with a key: prove that you have it."""

    nonce: str

    def encode(self) -> bytes:
        return f"//challenge?nonce={self.nonce}\n".encode()


@dataclass(frozen=True)
class Auth:
    """Client to server: the proof."""

    mac: str

    def encode(self) -> bytes:
        return f"//auth?mac={self.mac}\n".encode()


@dataclass(frozen=True)
class Refusal:
    """Server to client: you are turned away; the connection is closed behind it."""

    reason: str

    def encode(self) -> bytes:
        return f"//error?reason={self.reason}\n".encode()


@dataclass(frozen=True)
class Offer:
    """Server to client, first line of v1, last of the v2 handshake: where data connections go, and how.

    `heartbeat` is in milliseconds and absent in v1, as is all that follows it.
    """

    data_port: int
    tls: int  # 0, 1 or 2
    heartbeat: int | None = None
    mux: bool = False  # data connections come to the tunnel port, behind DATA_PREFIX
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
    """Server to client: I am here. An empty line, which a v2 client answers with another."""

    def encode(self) -> bytes:
        return b"\n"


@dataclass(frozen=True)
class Unknown:
    """A well-formed line whose meaning a later version may know; to be ignored."""

    line: bytes


HEARTBEAT = Heartbeat()


def parse_hello(line: bytes) -> Hello:
    """The first line that a server reads from a v2 client. Raises ProtocolError."""
    host, query, _ = _parts(line)
    if host != b"hello":
        raise ProtocolError(f"not a hello: {printable(line)}")
    if (version := query.get("v", "")) != "2":
        return Hello("", version)
    return Hello(_field(line, query, "nonce", _NONCE))


def parse_auth(line: bytes) -> Auth:
    """What a server reads behind its challenge. Raises ProtocolError."""
    host, query, _ = _parts(line)
    if host != b"auth":
        raise ProtocolError(f"not an auth: {printable(line)}")
    return Auth(_field(line, query, "mac", _HASH))


def parse_opening(line: bytes) -> Challenge | Refusal | Offer:
    """What a client reads until the handshake is over. Raises ProtocolError."""
    host, query, fragment = _parts(line)
    if host == b"challenge":
        return Challenge(_field(line, query, "nonce", _NONCE))
    if host == b"error":
        return Refusal(_field(line, query, "reason", _TOKEN))
    if not re.fullmatch(rb"[0-9]{1,5}", host) or fragment not in (b"0", b"1", b"2"):
        raise ProtocolError(f"not a tunnel signal: {printable(line)}")
    port, tls = int(host), int(fragment)
    if not 1 <= port <= 65535:
        raise ProtocolError(f"data port out of range: {printable(line)}")
    if query.get("v") != "2":
        return Offer(port, tls)
    return Offer(
        port,
        tls,
        int(_field(line, query, "hb", _MILLISECONDS)),
        query.get("mux") == "1",
        _field(line, query, "fp", _HASH) if "fp" in query else "",
        _field(line, query, "mac", _HASH) if "mac" in query else "",
    )


def _parts(line: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Host, query and fragment; of a parameter given twice the first counts."""
    match = _LINE.fullmatch(line.strip())
    if not match:
        raise ProtocolError(f"malformed signal: {printable(line)}")
    query: dict[str, str] = {}
    for part in (match[2] or b"").decode("latin-1").split("&"):
        name, _, value = part.partition("=")
        query.setdefault(name, value)
    return match[1], query, match[3] or b""


def _field(line: bytes, query: dict[str, str], name: str, form: re.Pattern[str]) -> str:
    value = query.get(name, "")
    if not form.fullmatch(value):
        raise ProtocolError(f"{name} is missing or malformed: {printable(line)}")
    return value


def parse_signal(line: bytes) -> Launch | Heartbeat | Unknown:
    """Any later line that a client reads. Raises ProtocolError."""
    if launch := _LAUNCH.fullmatch(line):  # as nearly all are
        return Launch(launch[1].decode(), int(launch[2]))
    line = line.strip()
    if not line:
        return HEARTBEAT
    host, _, fragment = _parts(line)
    if kind := _KINDS.get(fragment):
        return Launch(parse_id(host), kind)
    return Unknown(line)


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
