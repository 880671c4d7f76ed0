"""Lines, as both versions of the wire have them: their form, their parameters, and a stream cut into them. No I/O.

A line is shaped like a URL without a scheme: `//<host>[?<query>][#<fragment>]`. In v1 a parser accepts what NodePass
v1.0.4 accepts: white space around a line, an ignored query, unknown fragments. In v2 a line is taken byte for byte,
because the proofs of the key cover whole lines. What the lines mean is in `negotiation` and `signals`.
"""

from __future__ import annotations

import re

from nodepass.errors import ProtocolError

MAX_OPENING = 512  # bytes of a line of v2's handshake
MAX_LINE = 4096  # bytes of any other line; the longest that either end has reason to send is under 200

PROXY_PROTOCOL = "the PROXY protocol"

HEX16, HEX32, HEX64 = (re.compile(f"[0-9a-f]{{{size}}}") for size in (16, 32, 64))
TOKEN = re.compile(r"[a-z-]{1,32}")

_LINE = re.compile(rb"//([^/?#\s]*)(?:\?([^#\s]*))?(?:#(\S*))?")
_OTHERS = (
    ("HTTP", re.compile(rb"HTTP/|(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH|CONNECT|TRACE|PRI) ")),
    ("SSH", re.compile(rb"SSH-")),
    (PROXY_PROTOCOL, re.compile(rb"PROXY |\r\n\r\n\x00\r\nQUIT\n")),
)
RECOGNIZED = 16  # bytes from which each of these can be recognized
_VISIBLE = re.compile(rb"[\x21-\x7e]*")


def split(line: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Host, query and fragment; of a parameter given twice the first counts. Raises ProtocolError."""
    match = _LINE.fullmatch(line.strip())
    if not match:
        raise ProtocolError(f"malformed signal: {printable(line)}")
    query: dict[str, str] = {}
    for part in (match[2] or b"").decode("latin-1").split("&"):
        name, _, value = part.partition("=")
        query.setdefault(name, value)
    return match[1], query, match[3] or b""


def split_strictly(line: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """As `split`, in v2. Raises ProtocolError."""
    check_visible(line)
    return split(line)


def check_visible(line: bytes) -> None:
    """Raise ProtocolError where a byte cannot be in a line of v2."""
    if not _VISIBLE.fullmatch(line):
        raise ProtocolError(f"a byte that a line cannot have: {printable(line)}")


def parameter(line: bytes, query: dict[str, str], name: str, form: re.Pattern[str]) -> str:
    """A parameter that must have its form. Raises ProtocolError."""
    value = query.get(name)
    if value is None or not form.fullmatch(value):
        raise ProtocolError(f"{name} is missing or malformed: {printable(line)}")
    return value


def printable(data: bytes, limit: int = 60) -> str:
    """A peer's bytes for a log line: cut, and escaped so that they cannot forge another line."""
    return repr(data[:limit])[1:] + ("…" if len(data) > limit else "")


def recognize(data: bytes) -> str:
    """Which other protocol a peer's first bytes are, of those that are often met at the wrong port; "" where none."""
    return next((name for name, form in _OTHERS if form.match(data)), "")


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
