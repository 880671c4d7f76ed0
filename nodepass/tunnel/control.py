"""The control connection: signals as lines, in order, on a plain TCP connection.

It begins with `handshake`, which reads and sends lines here and ends with `agree`. After that the server sends
heartbeats and launches (`ServerControl`), and the client reads the launches and, in v2, answers each heartbeat
(`ClientControl`); a v1 client never writes. In v2 each end gives its peer up after three heartbeats without a line; in
v1 the kernel finds a vanished peer (keepalive and TCP_USER_TIMEOUT) in about the same time. What a launch means, and
what follows the end of the connection, is decided by the callers: `control_listener` and `client_slot` on the server,
`client` and `connection` on the client.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import gevent
from gevent.lock import Semaphore

from nodepass.errors import ClosedError, ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Endpoint, acknowledged, bound_failure_detection, wait_readable
from nodepass.net.stream import TCPStream
from nodepass.stats import Stats
from nodepass.wire.auth import SessionKey
from nodepass.wire.signals import (
    HEARTBEAT,
    MAX_LINE,
    Heartbeat,
    Launch,
    LineBuffer,
    Offer,
    Unknown,
    parse_signal,
    printable,
)

MISSED_HEARTBEATS = 3  # in a row; then the peer is given up
_READ_SIZE = 1024  # bytes per turn of the event loop, so that a peer that floods does not hold up others
_FIRST_READ_SIZE = 256  # bytes, likewise, while the peer is unauthenticated
_PROBE_STEP = 0.01  # seconds between two checks for a reaction to a probe


class Ending(NamedTuple):
    """Why a control connection ended: a token for programs, and the same in words."""

    reason: str
    words: str


NOT_ENDED = Ending("", "")
CLOSED = Ending("closed", "closed by the peer")
STOPPING = Ending("stopping", "this end is stopping")
SILENT = Ending("silent", f"no response for {MISSED_HEARTBEATS} heartbeats")


class Signal(Protocol):
    """Anything that can be written on a control connection."""

    def encode(self) -> bytes: ...


@dataclass(frozen=True)
class Agreement:
    """What a handshake has established; `session` is None without a key."""

    offer: Offer
    session: SessionKey | None = None

    @property
    def version(self) -> int:
        """The wire's version."""
        return self.offer.version


class Control:
    """What both ends of a control connection have in common."""

    def __init__(self, sock: socket.socket, interval: float, log: Log, stats: Stats) -> None:
        """`interval`: seconds between heartbeats."""
        self.sock = sock
        self.endpoint = Endpoint(sock.family, sock.getpeername())  # asked for once: a closed connection has none
        self.peer = str(self.endpoint)
        self.agreement: Agreement | None = None  # until the handshake is over
        self.ending = NOT_ENDED
        self.vanished = False  # it ended without a close by either end: the peer's other connections are dead, too
        self.round_trip: float | None = None  # seconds, of the last heartbeat that was answered
        self._stream = TCPStream(sock)
        self._interval = interval
        self._log = log
        self._stats = stats
        self._sending = Semaphore()
        self._lines = LineBuffer()
        self._ready: list[bytes] = []
        self._last_read = time.monotonic()
        bound_failure_detection(sock, MISSED_HEARTBEATS * interval)

    @property
    def version(self) -> int:
        """The wire's version; 1 before the handshake is over."""
        return self.agreement.version if self.agreement else 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer} {'closed' if self.sock.fileno() < 0 else 'open'}>"

    def describe(self) -> str:
        """The peer, its version and the round trip, for a line of statistics."""
        far = "" if self.round_trip is None else f", round trip {1000 * self.round_trip:.2f} ms"
        return f"{self.peer} (wire v{self.version}{far})"

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or "": a v2 peer is so long silent that it must have been given up by now."""
        silent = time.monotonic() - self._last_read
        if self.version < 2 or silent < (MISSED_HEARTBEATS + 1) * self._interval:
            return ""
        return f"nothing received from {self.peer} for {silent:.3g}s, and the connection is still open"

    def agree(self, agreement: Agreement) -> Agreement:
        """End the handshake: in v2, MISSED_HEARTBEATS intervals without a line are the end from now on."""
        self.agreement = agreement
        if agreement.version > 1:
            self.sock.settimeout(MISSED_HEARTBEATS * self._interval)
        return agreement

    def send(self, signal: Signal) -> None:
        """Write one signal; signals of several greenlets do not mix. Raises OSError."""
        with self._sending:
            self._stream.write(signal.encode())

    def finish(self) -> None:
        """Send the end of the stream, but go on reading what the peer has already sent."""
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
            data = self.sock.recv(_READ_SIZE if self.agreement else _FIRST_READ_SIZE)
            if not data:
                raise ClosedError("closed by the peer")
            self._last_read = time.monotonic()
            skipped = self._lines.skipped
            self._ready = self._lines.feed(data)
            if self._lines.skipped > skipped:
                self._skip_over_long()
        return self._ready.pop(0)

    def _skip_over_long(self) -> None:
        """Count an over-long line; in a handshake it is an error."""
        if not self.agreement:
            raise ProtocolError(f"a line longer than {MAX_LINE} bytes")
        words = f"skipping a signal longer than {MAX_LINE} bytes from %(peer)s"
        self._count("signals_over_long", "signal.over_long", words, peer=self.peer)

    def _signals(self) -> Iterator[Launch | Heartbeat]:
        """The peer's signals, until the connection ends; `ending` then says why."""
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
        """The next line, or None at the end of the connection."""
        try:
            return self.read_line()
        except ClosedError:
            self._note(CLOSED)
        except TimeoutError:
            self.vanished = True
            self._note(SILENT)
        except OSError as error:
            self.vanished = self.vanished or self.ending is NOT_ENDED
            self._note(Ending("failed", reason(error)))
        return None

    def _count(self, kind: str, event: str, words: str, **fields: object) -> None:
        self._stats.trouble[kind] += 1
        self._log.warning(event, words, Limit(), **fields)


class ServerControl(Control):
    """The server's end: sends heartbeats, takes their answers, and probes whether the client is alive."""

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
        """Whether the client reacts to a heartbeat within `timeout` seconds: in v2 it answers, in v1 TCP does."""
        deadline = time.monotonic() + timeout
        answers = self._answers
        try:
            self._beat_once()
            while time.monotonic() < deadline:
                alive = self._answers > answers if self.version > 1 else acknowledged(self.sock)
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

    def agree(self, agreement: Agreement) -> Agreement:
        """As `Control.agree`, with heartbeats as often as the server's offer says."""
        if agreement.offer.heartbeat:
            self._interval = agreement.offer.heartbeat / 1000
            bound_failure_detection(self.sock, MISSED_HEARTBEATS * self._interval)
        return super().agree(agreement)

    def launches(self) -> Iterator[Launch]:
        """The launches that arrive, until the connection ends."""
        for signal in self._signals():
            if isinstance(signal, Launch):
                yield signal
            elif self.version > 1:
                with contextlib.suppress(OSError):  # the next read raises it, too
                    self.send(HEARTBEAT)
