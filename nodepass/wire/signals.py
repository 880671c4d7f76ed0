"""The wire's signals: frozen dataclasses, to and from bytes. No I/O. docs/protocol.md describes both versions.

A signal is one line, shaped like a URL without a scheme: `//<host>[?<query>][#<fragment>]`. In v1 a parser accepts what
NodePass v1.0.4 accepts: white space around a line, an ignored query, unknown fragments. In v2 a line is taken byte for
byte, because the proofs of the key cover whole lines. When a signal is sent is decided by `tunnel.handshake` and
`tunnel.control`, which call this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address

from nodepass.errors import ProtocolError
from nodepass.hostport import split_host_port

MAX_OPENING = 512  # bytes of a line of v2's handshake
MAX_LINE = 4096  # bytes of any other line; the longest that either end has reason to send is under 200
HEARTBEATS = (10, 60_000)  # milliseconds: the bounds of `hb`

# What the two ends of a data connection write first.
ID_LENGTH = 8  # bytes: hex digits that the server writes

# First bytes, by which a server tells connections apart, and a client who answers its ClientHello.
SLASH = 0x2F  # a line in the clear
TLS_HANDSHAKE = 0x16  # a ClientHello
TLS_RECORDS = range(0x14, 0x18)

# Kinds of sessions.
TCP = 1
UDP = 2  # v1
LANE = 3  # v2
KIND_NAMES = {TCP: "tcp", UDP: "udp", LANE: "lane"}

# v2: reasons for which a server rejects a client, and what they mean for the client's operator.
KEY_REQUIRED = "key-required"
KEY_MISMATCH = "key-mismatch"
BUSY = "busy"
VERSION = "version"
SHUTDOWN = "shutdown"
NO_TLS = "no-tls"
UNKNOWN_NAME = "unknown-name"
REASONS = {
    KEY_REQUIRED: "the server requires a key and this client has none; set the same key on both ends",
    KEY_MISMATCH: "server and client have different keys for this tunnel, or different names, or what they said was"
    " changed on its way (possible man in the middle)",
    BUSY: "another client is connected and responding",
    VERSION: "the server does not support this version of the wire or of TLS",
    SHUTDOWN: "the server is shutting down",
    NO_TLS: "the server does not use TLS (tls=0) and this client requires it",
    UNKNOWN_NAME: "the server has no tunnel of this name; set the same name= on both ends",
}

# v2: why an end says goodbye.
REPLACED = "replaced"
RELOAD = "reload"
BYES = {
    SHUTDOWN: "the peer is shutting down",
    REPLACED: "another client has taken this one's place",
    RELOAD: "the tunnel's key has been removed or changed",
}

# v2: the form of each parameter of a query.
_HEX16, _HEX32, _HEX64 = (re.compile(f"[0-9a-f]{{{size}}}") for size in (16, 32, 64))
_TOKEN = re.compile(r"[a-z-]{1,32}")
_COUNT = re.compile(r"[0-9]{1,9}")
_FORMS = {
    "nonce": _HEX32,
    "client": _HEX16,
    "name": re.compile(r"[A-Za-z0-9._-]{0,64}"),
    "mac": _HEX64,
    "sid": _HEX32,
    "reason": _TOKEN,
    "hb": re.compile(r"[1-9][0-9]{1,4}"),  # milliseconds
    "idle": _COUNT,
    "ok": re.compile(r"[01]"),
}

_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([13])")  # v2, without addresses
_V1_LAUNCH = re.compile(rb"//([0-9a-f]{8})#([12])")
_LINE = re.compile(rb"//([^/?#\s]*)(?:\?([^#\s]*))?(?:#(\S*))?")
_VISIBLE = re.compile(rb"[\x21-\x7e]*")
_ID = re.compile(rb"[0-9a-f]{8}")
_PORT = re.compile(rb"[0-9]{1,5}")
_TLS_MODES = (b"0", b"1", b"2")
_V1_KINDS = {b"1": TCP, b"2": UDP}
_KINDS = {b"1": TCP, b"3": LANE}


@dataclass(frozen=True)
class Hello:
    """Client to server, its first line in v2; under TLS the first one inside.

    `client` is random and stays the same for a process and tunnel; `name` is the tunnel's.
    """

    nonce: str
    client: str = ""
    name: str = ""
    wants_addresses: bool = False  # launches are to carry the visitor's address
    version: str = "2"

    def encode(self) -> bytes:
        addresses = "&want=from" if self.wants_addresses else ""
        return (
            f"//hello?v={self.version}&nonce={self.nonce}&client={self.client}&name={self.name}{addresses}\n".encode()
        )


@dataclass(frozen=True)
class StartTLS:
    """Server to client, the answer to a hello in the clear where the server uses TLS: the ClientHello follows."""

    def encode(self) -> bytes:
        return b"//tls\n"


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
    """Server to client, v2: the client is rejected, for one of REASONS; the server then closes the connection."""

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
    sid: str = ""  # what data connections begin with, where it is not plain which client they belong to
    mux: bool = False  # data connections go to the tunnel port
    mac: str = ""  # the server's proof, where it has a key

    @property
    def version(self) -> int:
        return 1 if self.heartbeat is None else 2

    def encode(self) -> bytes:
        query = ""
        if self.heartbeat is not None:
            query = f"?v=2&hb={self.heartbeat}"
            query += f"&sid={self.sid}" if self.sid else ""
            query += "&mux=1" if self.mux else ""
            query += f"&mac={self.mac}" if self.mac else ""
        return f"//{self.data_port}{query}#{self.tls}\n".encode()


@dataclass(frozen=True)
class DataHello:
    """Client to server, v2: the first line of a data connection where the offer has a `sid`."""

    sid: str

    def encode(self) -> bytes:
        return f"//data?sid={self.sid}\n".encode()


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


def parse_first(line: bytes) -> Hello | DataHello:
    """The first line that a server reads in v2. Raises ProtocolError."""
    host, query, _ = _split_strictly(line)
    if host == b"data":
        return DataHello(_parameter(line, query, "sid"))
    if host != b"hello":
        raise ProtocolError(f"neither a hello nor a data connection: {printable(line)}")
    if (version := query.get("v", "")) != "2":
        return Hello("", version=version)
    nonce, client, name = (_parameter(line, query, each) for each in ("nonce", "client", "name"))
    return Hello(nonce, client, name, query.get("want") == "from")


def parse_auth(line: bytes) -> Auth:
    """What a server reads after its challenge. Raises ProtocolError."""
    host, query, _ = _split_strictly(line)
    if host != b"auth":
        raise ProtocolError(f"not an auth: {printable(line)}")
    return Auth(_parameter(line, query, "mac"))


def parse_opening(line: bytes) -> Challenge | Refusal | Offer | StartTLS:
    """What a client reads until the handshake is over. Raises ProtocolError."""
    host, query, fragment = _split(line)
    if _PORT.fullmatch(host) and "v" not in query:
        return Offer(_data_port(line, host, fragment), int(fragment))
    _check_visible(line)
    if host == b"challenge":
        return Challenge(_parameter(line, query, "nonce"))
    if host == b"error":
        return Refusal(_parameter(line, query, "reason"))
    if line == b"//tls":
        return StartTLS()
    port = _data_port(line, host, fragment)
    if query.get("v") != "2":
        raise ProtocolError(f"an offer of a version that this program does not speak: {printable(line)}")
    heartbeat = int(_parameter(line, query, "hb"))
    if not HEARTBEATS[0] <= heartbeat <= HEARTBEATS[1]:
        raise ProtocolError(f"hb is not from {HEARTBEATS[0]} to {HEARTBEATS[1]}: {printable(line)}")
    sid = _parameter(line, query, "sid") if "sid" in query else ""
    mac = _parameter(line, query, "mac") if "mac" in query else ""
    return Offer(port, int(fragment), heartbeat, sid, query.get("mux") == "1", mac)


def without_mac(line: bytes, mac: str) -> bytes:
    """An offer as its proof covers it: without the parameter `mac`, which stands last. Raises ProtocolError."""
    before, found, after = line.partition(f"&mac={mac}#".encode())
    if not found:
        raise ProtocolError(f"mac is not the last parameter: {printable(line)}")
    return before + b"#" + after


def _data_port(line: bytes, host: bytes, fragment: bytes) -> int:
    if not _PORT.fullmatch(host) or fragment not in _TLS_MODES:
        raise ProtocolError(f"not a tunnel signal: {printable(line)}")
    if not 1 <= int(host) <= 65535:
        raise ProtocolError(f"data port out of range: {printable(line)}")
    return int(host)


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


def _split_strictly(line: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """As `_split`, in v2. Raises ProtocolError."""
    _check_visible(line)
    return _split(line)


def _check_visible(line: bytes) -> None:
    if not _VISIBLE.fullmatch(line):
        raise ProtocolError(f"a byte that a line cannot have: {printable(line)}")


def _parameter(line: bytes, query: dict[str, str], name: str) -> str:
    """A parameter that must have its form. Raises ProtocolError."""
    value = query.get(name)
    if value is None or not _FORMS[name].fullmatch(value):
        raise ProtocolError(f"{name} is missing or malformed: {printable(line)}")
    return value


def parse_v1_signal(line: bytes) -> Signal:
    """What a client reads after the handshake in v1. Raises ProtocolError."""
    if launch := _V1_LAUNCH.fullmatch(line):  # as nearly all are
        return Launch(launch[1].decode(), int(launch[2]))
    line = line.strip()
    if not line:
        return HEARTBEAT
    host, _, fragment = _split(line)
    if kind := _V1_KINDS.get(fragment):
        return Launch(parse_id(host), kind)
    return Unknown(line)


def parse_signal(line: bytes) -> Signal:
    """What either end reads after the handshake in v2. Raises ProtocolError."""
    if launch := _LAUNCH.fullmatch(line):  # as most are
        return Launch(launch[1].decode(), int(launch[2]))
    host, query, fragment = _split_strictly(line)
    if host == b"beat":
        if "ok" in query:
            return BeatAnswer(_parameter(line, query, "ok") == "1")
        return Beat(int(_parameter(line, query, "idle")))
    if host == b"bye":
        return Bye(_parameter(line, query, "reason"))
    if kind := _KINDS.get(fragment):
        visitor, local = (_address(query.get(each, "")) for each in ("from", "to"))
        return Launch(parse_id(host), kind, visitor, local)
    return Unknown(line)


def _address(text: str) -> str:
    """`ip:port` or `[ip]:port` as it is; nothing where the text is no such address."""
    try:
        host, _ = split_host_port(text)
        if ip_address(host).version == 6 and "%" in host:
            raise ValueError("a zone means nothing on another machine")
    except ValueError:
        return ""
    return text


def parse_id(data: bytes) -> str:
    """The id of a data connection, as text. Raises ProtocolError."""
    if not _ID.fullmatch(data):
        raise ProtocolError(f"not an id of 8 hex digits: {printable(data)}")
    return data.decode()


def printable(data: bytes, limit: int = 60) -> str:
    """A peer's bytes for a log line: cut, and escaped so that they cannot forge another line."""
    return repr(data[:limit])[1:] + ("…" if len(data) > limit else "")


class LineBuffer:
    """Splits a byte stream into lines of at most `limit` bytes.

    A longer line is skipped up to its end and counted in `skipped`; no more than `limit` bytes are held.
    """

    def __init__(self, limit: int = MAX_LINE) -> None:
        self.limit = limit
        self.skipped = 0
        self._held = b""
        self._skipping = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a next line has arrived."""
        return not self._held and not self._skipping

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        *ended, rest = data.split(b"\n")
        lines = [line for end in ended if (line := self._end(end)) is not None]
        self._hold(rest)
        return lines

    def _hold(self, part: bytes) -> None:
        if self._skipping:
            return
        if len(self._held) + len(part) > self.limit:
            self.skipped += 1
            self._skipping, self._held = True, b""
        else:
            self._held += part

    def _end(self, part: bytes) -> bytes | None:
        self._hold(part)
        line = None if self._skipping else self._held
        self._skipping, self._held = False, b""
        return line
