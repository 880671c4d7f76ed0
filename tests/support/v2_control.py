"""A control connection of wire v2, one line at a time, for either end to be scripted."""

from __future__ import annotations

import re
import select
import socket
import time
from dataclasses import dataclass
from types import TracebackType

from tests.support.sockets import PATIENCE, Address, abort, connect

HELLO_WAIT = 0.25
"""Seconds that a server without a key waits for a hello."""

_SIGNAL = re.compile(rb"//([0-9a-z]+)(?:\?([^#\s]*))?(?:#([0-9]+))?")


class Refused(ConnectionError):
    """The peer turned us away; its text is the reason's token."""


@dataclass(frozen=True)
class Signal:
    """One line that is not empty, taken apart."""

    line: bytes
    host: str
    parameters: dict[str, str]
    fragment: str

    @property
    def names(self) -> list[str]:
        """The names of the parameters in the order in which they came."""
        return list(self.parameters)


def parse_signal(line: bytes) -> Signal:
    """A line without its end as a signal; AssertionError where it is none."""
    match = _SIGNAL.fullmatch(line)
    assert match, f"not a signal: {line!r}"
    pairs = [part.partition("=") for part in (match[2] or b"").decode().split("&") if part]
    return Signal(line, match[1].decode(), {name: value for name, _, value in pairs}, (match[3] or b"").decode())


class Conversation:
    """Either end of a control connection; a context manager that closes it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffered = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        abort(self.sock)

    def say(self, line: bytes | str) -> None:
        """Write one line; its end is added."""
        data = line.encode() if isinstance(line, str) else line
        self.sock.sendall(data + b"\n")

    def hear_line(self, timeout: float | None = PATIENCE) -> bytes:
        """The next line without its end; TimeoutError, or ConnectionError at the end of the stream."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffered:
            self._wait(deadline)
            data = self.sock.recv(4096)
            if not data:
                raise ConnectionError("the control connection ended")
            self._buffered += data
        line, _, self._buffered = self._buffered.partition(b"\n")
        return line

    def _wait(self, deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if self.sock.fileno() < 0:
            raise ConnectionError("the control connection is closed")
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError("nothing was said in time")

    def hear(self, timeout: float = PATIENCE) -> Signal:
        """The next signal; heartbeats are passed over. Raises Refused where the peer turns us away."""
        deadline = time.monotonic() + timeout
        while True:
            line = self.hear_line(max(0.0, deadline - time.monotonic()))
            if line:
                signal = parse_signal(line)
                if signal.host == "error":
                    raise Refused(signal.parameters["reason"])
                return signal

    def is_ended_by_peer(self, timeout: float = PATIENCE) -> bool:
        """Wait for the end of the stream, whatever is said before it; False at the timeout."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                self.hear_line(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            return False
        except ConnectionError:
            return True

    def refusal(self, timeout: float = PATIENCE) -> str:
        """The token of the refusal that has to come now, with the end of the stream behind it."""
        try:
            signal = self.hear(timeout)
        except Refused as refused:
            assert self.is_ended_by_peer(timeout), "turned away, but the connection was left open"
            return str(refused)
        raise AssertionError(f"not turned away but told {signal.line!r}")


def dial(address: Address, source: str | None = None) -> Conversation:
    """A control connection on which nothing has been said yet."""
    if source is None:
        return Conversation(connect(address))
    return Conversation(socket.create_connection(address, PATIENCE, (source, 0)))


class ScriptedServer:
    """A listener that a test speaks for; a context manager."""

    def __enter__(self) -> ScriptedServer:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.address: Address = self._listener.getsockname()
        self._accepted: list[socket.socket] = []
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in (self._listener, *self._accepted):
            abort(sock)

    def stop_waiting(self) -> None:
        """Have `accept` raise TimeoutError at once where nobody is there."""
        self._listener.settimeout(0.01)

    def accept(self) -> Conversation:
        """The next connection."""
        sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE)
        self._accepted.append(sock)
        return Conversation(sock)
