"""CONNECT: a connection through a proxy that speaks HTTP/1.1 (RFC 9110, section 9.3.6).

The proxy's answer ends where the bytes of the server begin, and a server of wire v1 speaks first: so no read asks for
more than the answer must still have. Nothing that the proxy sends is kept but the head of its answer, of LARGEST_HEAD
bytes at most; the deadline is the caller's. `ways` calls this, once it is connected to the proxy.

Not a library: python-socks reads up to 64 KiB at once and drops what is not the answer, and takes a head that comes in
two segments for a whole one.
"""

from __future__ import annotations

import base64
import re

from nodepass.config.outbound import Credentials
from nodepass.config.urls import Address
from nodepass.errors import ProxyError
from nodepass.net.stream import Stream
from nodepass.wire.lines import printable

LARGEST_HEAD = 16384  # bytes: as much as servers of HTTP take in a request
_END = b"\r\n\r\n"
_BEGIN = b"HTTP/1."
_SHORTEST = len(b"HTTP/1.1 200\r\n\r\n")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: ([^\r\n]*))?\r\n")
_SCHEME = re.compile(rb"^proxy-authenticate:[ \t]*([A-Za-z0-9-]{1,32})", re.IGNORECASE | re.MULTILINE)
_SAID = 60  # characters of what a proxy gives as its reason
_buffer = memoryview(bytearray(_SHORTEST))

AUTHENTICATION_REQUIRED = 407
_REASONS = {
    400: "does not accept CONNECT to {0}",
    403: "does not allow connections to {0}",
    405: "does not accept CONNECT to {0}",
    500: "failed to connect to {0}",
    501: "does not accept CONNECT to {0}",
    502: "cannot reach {0}",
    503: "cannot reach {0}",
    504: "got no answer from {0}",
}


def connect(stream: Stream, host: str, port: int, credentials: Credentials | None) -> None:
    """Have the proxy connect to the host, which it looks up. Raises OSError; ProxyError where the proxy refuses."""
    stream.write(request(host, port, credentials))
    head = _read_head(stream, LARGEST_HEAD)
    room = LARGEST_HEAD - len(head)
    while (status := parse_status(head))[0] < 200:  # an interim answer
        head = _read_head(stream, room)
        room -= len(head)
    number, said = status
    if number >= 300:
        raise ProxyError(_explain(number, said, head, str(Address(host, port)), credentials), str(number))


def request(host: str, port: int, credentials: Credentials | None) -> bytes:
    """The request for a connection to this host."""
    place = str(Address(host, port))
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if credentials:
        pair = base64.b64encode(f"{credentials.user}:{credentials.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {pair}")
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def parse_status(head: bytes) -> tuple[int, str]:
    """The status of an answer, and the reason that it gives, for a line of the log. Raises ProxyError."""
    match = _STATUS.match(head)
    if not match:
        raise ProxyError(f"does not answer in HTTP/1.1: {printable(head)}")
    return int(match[1]), printable(match[2] or b"", _SAID)[1:-1]


def _read_head(stream: Stream, room: int) -> bytes:
    """The head of an answer, of at most `room` bytes, and not one byte more. Raises OSError."""
    head = b""
    while not head.endswith(_END):
        received = stream.recv_into(_buffer[: min(_lacks(head), room - len(head))]) if len(head) < room else -1
        if received < 0:
            raise ProxyError(f"sends more than {LARGEST_HEAD} bytes before its answer ends")
        if not received:
            said = f" after {printable(head)}" if head else " without an answer"
            raise ProxyError(f"closes the connection{said}")
        head += bytes(_buffer[:received])
        if head[: len(_BEGIN)] != _BEGIN[: len(head)]:
            raise ProxyError(f"does not answer in HTTP/1.1: {printable(head)}")
    return head


def _lacks(head: bytes) -> int:
    """How many bytes must follow these, at least, before the head ends."""
    for size in (3, 2, 1):
        if head.endswith(_END[:size]):
            return max(len(_END) - size, _SHORTEST - len(head))
    return max(len(_END), _SHORTEST - len(head))


def _explain(number: int, said: str, head: bytes, place: str, credentials: Credentials | None) -> str:
    """Why there is no connection, in words that follow the proxy's name."""
    status = f"{number} {said}".strip()
    if number == AUTHENTICATION_REQUIRED:
        schemes = [each.decode() for each in _SCHEME.findall(head)]
        if schemes and "basic" not in (each.lower() for each in schemes):
            return f"accepts no user and password, only {', '.join(schemes[:4])} ({status})"
        if credentials:
            return f"rejects the user and password ({status})"
        return f"requires a user and a password, see TUNNEL_PROXY_AUTH_FILE ({status})"
    words = _REASONS.get(number, "refuses a connection to {0}").format(place)
    return f"{words} ({status})" + ("; many proxies allow port 443 only" if number == 403 else "")
