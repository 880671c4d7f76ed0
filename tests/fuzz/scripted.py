"""Stand-ins for the kernel: a socket and a stream that do what a script says, a clock that only a wait moves."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

from nodepass.net.stream import TCPStream

PEER = ("192.0.2.7", 4711)

Reply = Callable[[], bytes]
"""What the peer does next: bytes, nothing at its end of stream, or an OSError raised."""


class ScriptedSocket:
    """A connected socket whose peer is a function; `sent` and `heard` are what went either way."""

    family = socket.AF_INET
    _read_event = None

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._held = b""
        self.sent = b""
        self.heard = b""
        self.is_closed = False

    def _wait(self, event: object) -> None:
        """As gevent's sockets wait: here there is always something to read."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        if not self._held:
            self._held = self._reply()
        data = self._held[:size]
        if not flags & socket.MSG_PEEK:
            self._held = self._held[size:]
            self.heard += data
        return data

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def getpeername(self) -> tuple[str, int]:
        return PEER

    def setsockopt(self, *option: Any) -> None:
        """No kernel looks at it."""

    def settimeout(self, seconds: float | None) -> None:
        """The script says when time is up."""

    def fileno(self) -> int:
        return -1 if self.is_closed else 99

    def close(self) -> None:
        self.is_closed = True


class ScriptedStream(TCPStream):
    """The program's stream on such a socket, which always has something to read."""

    __slots__ = ()

    def wait_readable(self) -> None:
        """No event loop looks at it."""


class PlainHandler(logging.Handler):
    """Asserts that a line of the log is one line, whatever a peer has put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def plain_log() -> Iterator[list[str]]:
    """The lines that the program logs meanwhile, each checked to be one printable line."""
    logger, handler = logging.getLogger("nodepass"), PlainHandler()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield handler.lines
    finally:
        logger.handlers, logger.propagate = before
    for line in handler.lines:
        assert line.isprintable(), line


def assert_plain(error: BaseException, longest: int = 400) -> None:
    """Check that an error's text is one printable line of at most so many characters."""
    text = str(error)
    assert text, repr(error)
    assert text.isprintable(), text
    assert len(text) <= longest, text
