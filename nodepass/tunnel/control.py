"""The control connection: signals as lines, in order, on a plain TCP connection.

How it begins is the business of `handshake`. After that the server writes and the client reads: `ServerControl` sends
heartbeats and launches, `ClientControl` yields the launches and, in v2, answers each heartbeat; a v1 client never
writes. In v2 each end gives the other up after three heartbeats without a line; in v1 the kernel finds a vanished peer
(keepalive and TCP_USER_TIMEOUT) in about the same time. What a launch means is the caller's business.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import gevent
from gevent.lock import Semaphore

from nodepass.errors import ClosedError, ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Endpoint, acknowledged, bound_failure_detection, wait_readable
from nodepass.net.stream import TCPStream
from nodepass.stats import Stats
from nodepass.wire.signals import HEARTBEAT, Heartbeat, Launch, LineBuffer, Unknown, parse_signal, printable

MISSED_HEARTBEATS = 3  # then the peer is given up
_READ_SIZE = 1024  # bytes, for one turn of the loop: a peer may send as fast as it can
_FIRST_READS = 256  # bytes, before an agreement: a stranger's lines are not worth more work at a time
_PROBE_STEP = 0.01  # seconds between looks at what a probe has brought


class Ending(NamedTuple):
    """Why a control connection ended: a token for programs, and the same in words."""

    reason: str
    words: str


NOT_ENDED = Ending("", "")
CLOSED = Ending("closed", "closed by the peer")
STOPPING = Ending("stopping", "this end is stopping")
SILENT = Ending("silent", f"no sign of life for {MISSED_HEARTBEATS} heartbeats")


class Signal(Protocol):
    """Anything that can be written on a control connection."""

    def encode(self) -> bytes: ...


class Control:
    """What both ends of a control connection have in common; `ending` says why it ended."""

    def __init__(self, sock: socket.socket, interval: float, log: Log, stats: Stats) -> None:
        self.sock = sock
        # Asked for once: a peer that has gone has no address any more.
        self.endpoint = Endpoint(sock.family, sock.getpeername())
        self.peer = str(self.endpoint)
        self.ending = NOT_ENDED
        self.vanished = False  # it ended without the peer's saying so: its other connections are as dead
        self.round_trip: float | None = None  # seconds, of the last heartbeat that was answered
        self._stream = TCPStream(sock)
        self._interval = interval
        self._log = log
        self._stats = stats
        self._sending = Semaphore()
        self._lines = LineBuffer()
        self._ready: list[bytes] = []
        self._agreed = False
        self._version = 1
        self._heard = time.monotonic()  # when the peer last said something
        bound_failure_detection(sock, MISSED_HEARTBEATS * interval)

    @property
    def version(self) -> int:
        """The wire's version that the handshake has agreed on."""
        return self._version

    def describe(self) -> str:
        """The peer, its version and how far away it is, for a line of statistics."""
        far = "" if self.round_trip is None else f", round trip {1000 * self.round_trip:.2f} ms"
        return f"{self.peer} (wire v{self._version}{far})"

    def unhealthy_reason(self) -> str:
        """What is wrong where a v2 peer's heartbeats have stayed away for so long that this end must have noticed."""
        silent = time.monotonic() - self._heard
        if self._version < 2 or silent < (MISSED_HEARTBEATS + 1) * self._interval:
            return ""
        return f"nothing from {self.peer} for {silent:.3g}s, and it was not given up"

    def agree(self, version: int, interval: float) -> None:
        """The handshake is over: heartbeats come every `interval` seconds, and in v2 three missing ones are the end."""
        self._version, self._interval, self._agreed = version, interval, True
        bound_failure_detection(self.sock, MISSED_HEARTBEATS * interval)
        if version > 1:
            self.sock.settimeout(MISSED_HEARTBEATS * interval)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer} {'closed' if self.sock.fileno() < 0 else 'open'}>"

    def send(self, signal: Signal) -> None:
        """Write one signal; signals of several greenlets do not mix. Raises OSError."""
        with self._sending:
            self._stream.write(signal.encode())

    def finish(self) -> None:
        """Tell the peer that we are leaving, but go on reading what it has already sent."""
        try:
            self._note(STOPPING)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.close(Ending("failed", reason(error)))

    def close(self, ending: Ending) -> None:
        """Close; the first ending given is the one that is reported."""
        self._note(ending)
        self.sock.close()

    def _note(self, ending: Ending) -> None:
        if self.ending is NOT_ENDED:
            self.ending = ending

    def read_line(self) -> bytes:
        """The next line; its deadline is the caller's, or what `agree` set. Raises OSError."""
        while not self._ready:
            wait_readable(self.sock)
            data = self.sock.recv(_READ_SIZE if self._agreed else _FIRST_READS)
            if not data:
                raise ClosedError("closed by the peer")
            self._heard = time.monotonic()
            skipped = self._lines.skipped
            self._ready = self._lines.feed(data)
            if self._lines.skipped > skipped:
                if not self._agreed:
                    raise ProtocolError("a line longer than 4096 bytes")
                words = "skipping a signal longer than 4096 bytes from %(peer)s"
                self._count("signals_over_long", "signal.over_long", words, peer=self.peer)
        return self._ready.pop(0)

    def _signals(self) -> Iterator[Launch | Heartbeat]:
        """What the peer says, until the connection ends, which is not an error here: see `ending`."""
        while (line := self._next_line()) is not None:
            try:
                signal = parse_signal(line)
            except ProtocolError as error:
                self._count("signals_malformed", "signal.malformed", "%(error)s", error=error)
                continue
            if isinstance(signal, Unknown):
                shown = printable(signal.line)
                self._count("signals_unknown", "signal.unknown", "ignoring an unknown signal: %(line)s", line=shown)
            else:
                yield signal

    def _next_line(self) -> bytes | None:
        """None at the end of the connection, however it came."""
        try:
            return self.read_line()
        except ClosedError:
            self._note(CLOSED)
        except TimeoutError:
            self.vanished = True
            self._note(SILENT)
        except OSError as error:
            self.vanished = self.ending is NOT_ENDED
            self._note(Ending("failed", reason(error)))
        return None

    def _count(self, kind: str, event: str, words: str, **fields: object) -> None:
        self._stats.trouble[kind] += 1
        self._log.warning(event, words, Limit(), **fields)


class ServerControl(Control):
    """The server's end: sends heartbeats, takes their answers, and finds out whether its client lives."""

    def __init__(self, sock: socket.socket, interval: float, log: Log, stats: Stats) -> None:
        super().__init__(sock, interval, log, stats)
        self._unanswered: deque[float] = deque(maxlen=MISSED_HEARTBEATS)  # when heartbeats went out (time.monotonic())
        self._answers = 0

    def beat(self) -> None:
        """Send heartbeats until the connection fails or is closed."""
        try:
            while True:
                gevent.sleep(self._interval)
                self._beat_once()
        except OSError as error:
            self.close(Ending("failed", f"heartbeat failed: {reason(error)}"))

    def shows_life(self, timeout: float) -> bool:
        """Whether the client reacts to a heartbeat within `timeout` seconds: v2 by its answer, v1 by its kernel's."""
        deadline = time.monotonic() + timeout
        answers = self._answers
        try:
            self._beat_once()
            while time.monotonic() < deadline:
                alive = self._answers > answers if self._version > 1 else acknowledged(self.sock)
                if alive is not False:
                    return bool(alive)
                gevent.sleep(_PROBE_STEP)
        except OSError:
            pass
        return False

    def wait_until_ended(self) -> None:
        """Take the client's answers until the connection ends."""
        for signal in self._signals():
            if isinstance(signal, Launch):
                words = "ignoring a launch from the client: %(id)s"
                self._count("signals_unknown", "signal.unknown", words, id=signal.id)
            else:
                self._take_answer()

    def _beat_once(self) -> None:
        self._unanswered.append(time.monotonic())
        self.send(HEARTBEAT)

    def _take_answer(self) -> None:
        self._answers += 1
        if self._unanswered:
            self.round_trip = time.monotonic() - self._unanswered.popleft()


class ClientControl(Control):
    """The client's end: yields launches, and answers a v2 server's heartbeats."""

    def launches(self) -> Iterator[Launch]:
        """The launches that arrive, until the connection ends."""
        for signal in self._signals():
            if isinstance(signal, Launch):
                yield signal
            elif self._version > 1:
                with contextlib.suppress(OSError):  # the next read says what is wrong
                    self.send(HEARTBEAT)
