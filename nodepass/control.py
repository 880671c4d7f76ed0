"""The control connection: signals as lines, in order, on a plain TCP connection.

The server writes and the client reads; a v1 client never writes. A vanished peer is found by the kernel (keepalive and
TCP_USER_TIMEOUT) within about three heartbeats. What to do about a signal is the caller's business.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from typing import Protocol

import gevent
from gevent.lock import Semaphore

from nodepass.errors import ProtocolError
from nodepass.log import Log
from nodepass.net import TCPStream, bound_failure_detection, format_sockaddr, reason, unacknowledged
from nodepass.protocol import HEARTBEAT, Launch, LineBuffer, Tunnel, Unknown, parse_signal, parse_tunnel, printable
from nodepass.stats import Stats

MISSED_HEARTBEATS = 3  # then the peer is given up
_READ_SIZE = 4096  # bytes
_PROBE_STEP = 0.01  # seconds between looks at what a probe has brought


class Signal(Protocol):
    """Anything that can be written on a control connection."""

    def encode(self) -> bytes: ...


class Control:
    """One control connection, on either end."""

    def __init__(self, sock: socket.socket, interval: float, log: Log, stats: Stats) -> None:
        self.sock = sock
        self.peer = format_sockaddr(sock.getpeername())
        self.closed_because = ""  # why this end closed it, where it did
        self._stream = TCPStream(sock)
        self._interval = interval
        self._log = log
        self._stats = stats
        self._sending = Semaphore()
        self._lines = LineBuffer()
        self._ready: list[bytes] = []
        bound_failure_detection(sock, MISSED_HEARTBEATS * interval)

    def __repr__(self) -> str:
        return f"<Control {self.peer} {'closed' if self.sock.fileno() < 0 else 'open'}>"

    def send(self, signal: Signal) -> None:
        """Write one signal; signals of several greenlets do not mix. Raises OSError."""
        with self._sending:
            self._stream.write(signal.encode())

    def beat(self) -> None:
        """Send heartbeats until the connection fails or is closed."""
        try:
            while True:
                gevent.sleep(self._interval)
                self.send(HEARTBEAT)
        except OSError as error:
            self.close(f"heartbeat failed: {reason(error)}")

    def acknowledges(self, timeout: float) -> bool:
        """Whether the peer's kernel acknowledges a heartbeat within `timeout` seconds: the life sign of a v1 client."""
        deadline = time.monotonic() + timeout
        try:
            self.send(HEARTBEAT)
            while unacknowledged(self.sock):
                if time.monotonic() > deadline:
                    return False
                gevent.sleep(_PROBE_STEP)
        except OSError:
            return False
        return True

    def read_tunnel(self) -> Tunnel:
        """The server's first line; its deadline is the caller's. Raises OSError, ProtocolError among them."""
        return parse_tunnel(self._read_line())

    def signals(self) -> Iterator[Launch]:
        """The launches that arrive, until the connection ends, which is not an error here: see `closed_because`."""
        while True:
            try:
                line = self._read_line()
            except OSError as error:
                self.closed_because = self.closed_because or reason(error)
                return
            try:
                signal = parse_signal(line)
            except ProtocolError as error:
                self._count("signals_malformed", "%s", error)
                continue
            if isinstance(signal, Launch):
                yield signal
            elif isinstance(signal, Unknown):
                self._count("signals_unknown", "ignoring an unknown signal: %s", printable(signal.line))

    def wait_until_ended(self) -> None:
        """Read, and ignore, what a v1 client should not send, until the connection ends."""
        for launch in self.signals():
            self._count("signals_unknown", "ignoring a launch from the client: %s", launch.id)

    def finish(self) -> None:
        """Tell the peer that we are leaving, but go on reading what it has already sent."""
        try:
            self.closed_because = self.closed_because or "this end is stopping"
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.close(reason(error))

    def close(self, because: str) -> None:
        """Close; the first reason given is the one that is reported."""
        self.closed_because = self.closed_because or because
        self.sock.close()

    def _read_line(self) -> bytes:
        while not self._ready:
            data = self.sock.recv(_READ_SIZE)
            if not data:
                raise ConnectionError("closed by the peer")
            skipped = self._lines.skipped
            self._ready = self._lines.feed(data)
            if self._lines.skipped > skipped:
                self._count("signals_over_long", "skipping a signal longer than 4096 bytes from %s", self.peer)
        return self._ready.pop(0)

    def _count(self, key: str, message: str, *args: object) -> None:
        self._stats.trouble[key] += 1
        self._log.limited(logging.WARNING, key, message, *args)
