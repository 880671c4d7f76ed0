"""How a control or data connection begins, as lines: hello to offer. Frozen dataclasses, to and from bytes. No I/O.

docs/protocol.md describes both versions. The order is decided by `tunnel.handshake`; what follows the offer
is in `signals`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nodepass.errors import OtherProtocolError, ProtocolError
from nodepass.wire.lines import (
    HEX16,
    HEX32,
    HEX64,
    TOKEN,
    check_visible,
    parameter,
    printable,
    recognize,
    split,
    split_strictly,
)
from nodepass.wire.signals import SHUTDOWN

HEARTBEATS = (10, 60_000)  # milliseconds: the bounds of `hb`
PROTOCOLS = ("tcp", "udp")  # of sessions

# First bytes, by which a server tells connections apart, and a client what answers its ClientHello.
SLASH = 0x2F  # a line in the clear
TLS_HANDSHAKE = 0x16  # a ClientHello
TLS_RECORDS = range(0x14, 0x18)  # change_cipher_spec, alert, handshake, application_data

# v2: reasons for which a server rejects a client, and what they mean for the client's operator.
KEY_REQUIRED = "key-required"
KEY_MISMATCH = "key-mismatch"
BUSY = "busy"
VERSION = "version"
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

# v2: the form of each parameter of a query.
_FORMS = {
    "nonce": HEX32,
    "client": HEX16,
    "name": re.compile(r"[A-Za-z0-9._-]{0,64}"),
    "mac": HEX64,
    "sid": HEX32,
    "reason": TOKEN,
    "hb": re.compile(r"[1-9][0-9]{1,4}"),  # milliseconds
}
_PORT = re.compile(rb"[0-9]{1,5}")
_USUAL_DATA = re.compile(rb"//data\?sid=([0-9a-f]{32})")
_TLS_MODES = (b"0", b"1", b"2")


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
    is_check: bool = False  # for the server's log: it comes from `nodepass --check`
    off: str = ""  # `tcp` or `udp`, of which the server then launches nothing: the client would only drop it

    def encode(self) -> bytes:
        more = "&want=from" * self.wants_addresses + "&check=1" * self.is_check + f"&off={self.off}" * bool(self.off)
        return f"//hello?v={self.version}&nonce={self.nonce}&client={self.client}&name={self.name}{more}\n".encode()


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


def parse_first(line: bytes) -> Hello | DataHello:
    """The first line that a server reads in v2. Raises ProtocolError."""
    if usual := _USUAL_DATA.fullmatch(line):  # once for each session
        return DataHello(usual[1].decode())
    host, query, _ = split_strictly(line)
    if host == b"data":
        return DataHello(parameter(line, query, "sid", _FORMS["sid"]))
    if host != b"hello":
        raise ProtocolError(f"neither a hello nor a data connection: {printable(line)}")
    if (version := query.get("v", "")) != "2":
        return Hello("", version=version)
    nonce, client, name = (parameter(line, query, each, _FORMS[each]) for each in ("nonce", "client", "name"))
    off = query.get("off", "")
    return Hello(
        nonce,
        client,
        name,
        query.get("want") == "from",
        is_check=query.get("check") == "1",
        off=off if off in PROTOCOLS else "",
    )


def parse_auth(line: bytes) -> Auth:
    """What a server reads after its challenge. Raises ProtocolError."""
    host, query, _ = split_strictly(line)
    if host != b"auth":
        raise ProtocolError(f"not an auth: {printable(line)}")
    return Auth(parameter(line, query, "mac", _FORMS["mac"]))


def parse_opening(line: bytes) -> Challenge | Refusal | Offer | StartTLS:
    """What a client reads until the handshake is over. Raises ProtocolError."""
    if protocol := recognize(line):
        raise OtherProtocolError(protocol, answers_in(protocol))
    host, query, fragment = split(line)
    if _PORT.fullmatch(host) and "v" not in query:
        return Offer(_data_port(line, host, fragment), int(fragment))
    check_visible(line)
    if host == b"challenge":
        return Challenge(parameter(line, query, "nonce", _FORMS["nonce"]))
    if host == b"error":
        return Refusal(parameter(line, query, "reason", _FORMS["reason"]))
    if line == b"//tls":
        return StartTLS()
    port = _data_port(line, host, fragment)
    if query.get("v") != "2":
        raise ProtocolError(f"an offer of a version that this program does not speak: {printable(line)}")
    heartbeat = int(parameter(line, query, "hb", _FORMS["hb"]))
    if not HEARTBEATS[0] <= heartbeat <= HEARTBEATS[1]:
        raise ProtocolError(f"hb is not from {HEARTBEATS[0]} to {HEARTBEATS[1]}: {printable(line)}")
    sid = parameter(line, query, "sid", _FORMS["sid"]) if "sid" in query else ""
    mac = parameter(line, query, "mac", _FORMS["mac"]) if "mac" in query else ""
    return Offer(port, int(fragment), heartbeat, sid, query.get("mux") == "1", mac)


def answers_in(protocol: str) -> str:
    """The words of a client whose server answers in another protocol."""
    return f"the answer is {protocol}: is this the tunnel address of a nodepass server, and not its target address?"


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
