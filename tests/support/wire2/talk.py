"""Either end of a connection of wire v2 while it is spoken on: lines and bytes, in the clear at first, then inside TLS.

A `Talk` is a stream as well: once lines are over, a session may be relayed on it.
"""

from __future__ import annotations

import select
import socket
import time

from OpenSSL import SSL

from tests.support.scope import Closes
from tests.support.sockets import PATIENCE
from tests.support.v1_stream import CHUNK, PlainStream
from tests.support.wire2.lines import LONGEST_SIGNAL, Line, parse
from tests.support.wire2.tls import SecureStream

LOOK = 0.5
"""Seconds that a wait lasts at most before the socket is looked at again."""


class Rejected(ConnectionError):
    """The peer has rejected us; its text is the token of the reason."""


class EndedError(ConnectionError):
    """The peer has ended the connection in good order."""


class ClearStream(PlainStream):
    """A stream that is a TCP connection."""

    has_data = False
    channel = ""

    def read_available(self) -> bytes | None:
        """What one read brings; None at the end of the stream."""
        return self.sock.recv(CHUNK) or None


class Talk(Closes):
    """One connection; a context manager that closes it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stream: ClearStream | SecureStream = ClearStream(sock)
        self._buffered = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        self.abort()

    # TLS

    def become_client(self, context: SSL.Context, name: str = "", session: SSL.Session | None = None) -> None:
        """Do the handshake as the client. Raises InTheClearError, of which nothing has been read."""
        assert not self._buffered, f"behind a line in the clear: {self._buffered!r}"
        self.stream = SecureStream(self.sock, context, name=name, session=session)

    def become_server(self, context: SSL.Context) -> None:
        """Do the handshake as the server."""
        assert not self._buffered, f"behind a line in the clear: {self._buffered!r}"
        self.stream = SecureStream(self.sock, context, is_server=True)

    @property
    def secure(self) -> SecureStream:
        """The stream inside TLS."""
        assert isinstance(self.stream, SecureStream), "this connection is in the clear"
        return self.stream

    @property
    def channel(self) -> str:
        """The exporter in hex, empty in the clear."""
        return self.stream.channel

    def first_byte(self) -> bytes:
        """The first byte that the peer sends, without taking it; nothing at the end of the stream."""
        return self.sock.recv(1, socket.MSG_PEEK)

    # Lines

    def write(self, data: bytes) -> None:
        """Write bytes as they are."""
        self.stream.send(data)

    def say(self, line: bytes | str) -> None:
        """Write one line; its end is added."""
        self.write((line.encode() if isinstance(line, str) else line) + b"\n")

    def read_line(self, timeout: float | None = PATIENCE) -> bytes:
        """The next line without its end. Raises TimeoutError, and EndedError at the end of the stream."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffered:
            self._read_more(deadline)
        line, _, self._buffered = self._buffered.partition(b"\n")
        return line

    def _read_more(self, deadline: float | None) -> None:
        if not self.stream.has_data:
            self._wait(deadline)
        data = self.stream.read_available()
        if data is None:
            raise EndedError("the peer has ended the connection")
        self._buffered += data

    def _wait(self, deadline: float | None) -> None:
        """Return once there is something to read; a look now and then finds out that another thread has closed it."""
        while True:
            left = LOOK if deadline is None else min(LOOK, max(0.0, deadline - time.monotonic()))
            if self.sock.fileno() < 0:
                raise ConnectionError("the connection is closed")
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            if poll.poll(left * 1000):
                return
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError("nothing was said in time")

    def hear(self, timeout: float | None = PATIENCE, longest: int = LONGEST_SIGNAL) -> Line:
        """The next line as a signal. Raises Rejected where it is an error."""
        line = parse(self.read_line(timeout), longest)
        if line.host == "error":
            assert line.names == ["reason"], line.raw
            raise Rejected(line.parameters["reason"])
        return line

    def receive_exactly(self, size: int, timeout: float = PATIENCE) -> bytes:
        """So many bytes. Raises TimeoutError, and EndedError where the stream ends before."""
        deadline = time.monotonic() + timeout
        while len(self._buffered) < size:
            self._read_more(deadline)
        data, self._buffered = self._buffered[:size], self._buffered[size:]
        return data

    # Ends

    def is_silent(self, seconds: float) -> bool:
        """Whether the peer neither says anything nor ends the connection for so long."""
        deadline = time.monotonic() + seconds
        try:
            while not self._buffered:
                self._read_more(deadline)
        except TimeoutError:
            return True
        except ConnectionError:
            return False
        return False

    def rest(self, timeout: float = PATIENCE) -> bytes:
        """Everything up to the end of the connection, a reset included. Raises TimeoutError where it stays open."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self._read_more(deadline)
        except TimeoutError:
            raise
        except ConnectionError:
            data, self._buffered = self._buffered, b""
            return data

    def is_ended_by_peer(self, timeout: float = PATIENCE) -> bool:
        """Wait for the end of the connection, whatever is said before it; False at the timeout."""
        try:
            self.rest(timeout)
        except TimeoutError:
            return False
        return True

    def rejection(self, timeout: float = PATIENCE) -> str:
        """The token of the error that has to come now, with the end of the stream behind it and no reset.

        Inside TLS the end has a close_notify.
        """
        try:
            line = self.hear(timeout)
        except Rejected as rejected:
            with_end = time.monotonic() + timeout
            try:
                while True:
                    self._read_more(with_end)
            except EndedError:
                assert not self._buffered, f"behind the error: {self._buffered!r}"
                return str(rejected)
        raise AssertionError(f"not rejected but told {line.raw!r}")

    # A stream

    def recv(self, size: int) -> bytes:
        if self._buffered:
            data, self._buffered = self._buffered[:size], self._buffered[size:]
            return data
        return self.stream.recv(size)

    def send(self, data: bytes) -> None:
        self.stream.send(data)

    def end(self) -> None:
        self.stream.end()

    def is_readable(self) -> bool:
        return bool(self._buffered) or self.stream.is_readable()

    def is_ended(self) -> bool:
        return not self._buffered and self.stream.is_ended()

    def abort(self) -> None:
        self.stream.abort()


def dial(address: tuple[str, int], source: str | None = None) -> Talk:
    """A connection on which nothing has been said yet; `source`: the address that it comes from."""
    return Talk(socket.create_connection(address, PATIENCE, None if source is None else (source, 0)))
