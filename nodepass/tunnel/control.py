"""The control connection: signals as lines, in order, in the clear or under TLS.

It begins with `handshake`, which reads and sends lines here and ends with `agree`. After that the server sends
heartbeats and launches (`ServerControl`), and the client reads the launches and, in v2, answers each heartbeat
(`ClientControl`); a v1 client never writes. In v2 each end gives its peer up after three heartbeats without a line; in
v1 the kernel finds a vanished peer (keepalive and TCP_USER_TIMEOUT) in about the same time. What a launch means, and
what follows the end of the connection, is decided by the callers: `control_listener` and `client_slot` on the server,
`connector` and `connection` on the client.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import gevent
from gevent.lock import Semaphore

from nodepass.errors import ClosedError, ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import KEEPALIVE, Endpoint, acknowledge, acknowledged, bound_failure_detection
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel.security import Security
from nodepass.wire.auth import Key, SessionKey
from nodepass.wire.lines import MAX_LINE, MAX_OPENING, LineBuffer, printable
from nodepass.wire.negotiation import Offer
from nodepass.wire.signals import (
    BYES,
    HEARTBEAT,
    TCP,
    Beat,
    BeatAnswer,
    Bye,
    Launch,
    Signal,
    Unknown,
    parse_signal,
    parse_v1_signal,
)

MISSED_HEARTBEATS = 3  # in a row; then the peer is given up
GOODBYE = 1.0  # seconds for a dismissed peer to end its side
LIFE_SIGN_WITHIN = 1.0  # seconds for a client to react to a heartbeat, at least,
ROUND_TRIPS = 4  # and measured ones for the same, where that is longer
_PROBE_STEP = 0.01  # seconds between two checks for a reaction to a probe

# One read takes at most so many bytes per turn of the event loop, so that a peer that floods does not hold up others;
# less while the peer is unauthenticated.
_buffer = memoryview(bytearray(1024))
_FIRST_READ_SIZE = 256


class Ending(NamedTuple):
    """Why a control connection ended: a token for programs, and the same in words."""

    reason: str
    words: str


NOT_ENDED = Ending("", "")
CLOSED = Ending("closed", "closed by the peer")
STOPPING = Ending("stopping", "this end is stopping")
SILENT = Ending("silent", f"no response for {MISSED_HEARTBEATS} heartbeats")


class Sendable(Protocol):
    """Anything that can be written on a control connection."""

    def encode(self) -> bytes: ...


@dataclass(frozen=True)
class Agreement:
    """What a handshake has established."""

    offer: Offer
    session: SessionKey | None = None  # None without a key
    key: Key | None = None  # that the client has proven
    client: str = ""  # what the client calls itself; v2
    wants_addresses: bool = False  # launches carry the visitor's address
    is_check: bool = False  # the client is `nodepass --check`, as it says, and leaves at once
    off: str = ""  # `tcp` or `udp`, which the client does not serve, as it says

    @property
    def version(self) -> int:
        """The wire's version."""
        return self.offer.version


class Control:
    """What both ends of a control connection have in common."""

    def __init__(self, stream: Stream, interval: float, log: Log, stats: Stats, keepalive: float = KEEPALIVE) -> None:
        """`interval`: seconds between heartbeats; `keepalive`: at most so many between the kernel's probes."""
        self.stream = stream
        self.sock = stream.sock
        self.endpoint = Endpoint(self.sock.family, self.sock.getpeername())  # a closed connection has none
        self.peer = str(self.endpoint)
        self.agreement: Agreement | None = None  # until the handshake is over
        self.ending = NOT_ENDED
        self.vanished = False  # it ended without a close by either end: the peer's other connections are dead, too
        self.round_trip: float | None = None  # seconds, of the last heartbeat that was answered
        self._interval = interval
        self._keepalive = keepalive
        self._log = log
        self._stats = stats
        self._acknowledges_at_once = False
        self._sending = Semaphore()
        self._lines = LineBuffer(MAX_OPENING)
        self._ready: list[bytes] = []
        self._goodbye: Any = None  # the timer that closes the connection after `finish`, which has no type
        self._silence: float | None = None  # seconds without a line after which the peer is given up
        self._last_read = time.monotonic()
        bound_failure_detection(self.sock, MISSED_HEARTBEATS * interval, keepalive)

    @property
    def version(self) -> int:
        """The wire's version; 1 before the handshake is over."""
        return self.agreement.version if self.agreement else 1

    @property
    def channel(self) -> bytes:
        """What the proofs of the key bind to: the TLS exporter; none in the clear."""
        return self.stream.exporter()

    @property
    def has_unread(self) -> bool:
        """Whether more has been read than the lines that were asked for."""
        return bool(self._ready) or not self._lines.is_empty

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer} {'closed' if self.sock.fileno() < 0 else 'open'}>"

    def set_peer(self, endpoint: Endpoint) -> None:
        """The peer has another address than the connection: a proxy is between."""
        self.endpoint, self.peer = endpoint, str(endpoint)

    def describe(self) -> str:
        """The peer, its version and the round trip, for a line of statistics."""
        far = "" if self.round_trip is None else f", round trip {1000 * self.round_trip:.2f} ms"
        return f"{self.peer} (wire v{self.version}{far})"

    def qualify(self, security: Security) -> Security:
        """What protects the tunnel, with what this connection makes known of it."""
        return replace(
            security,
            tls=self.agreement.offer.tls if self.agreement else security.tls,
            tls_version=getattr(self.stream, "version", ""),  # the plain stream has neither
            group=getattr(self.stream, "group", ""),
            wire=self.version,
        )

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or "": a v2 peer is so long silent that it must have been given up by now."""
        silent = time.monotonic() - self._last_read
        if self.version < 2 or silent < (MISSED_HEARTBEATS + 1) * self._interval:
            return ""
        return f"nothing received from {self.peer} for {silent:.3g}s, and the connection is still open"

    def secure(self, stream: Stream) -> None:
        """Go on under TLS, on the same connection."""
        self.stream = stream

    def agree(self, agreement: Agreement) -> Agreement:
        """End the handshake: in v2, MISSED_HEARTBEATS intervals without a line are the end from now on."""
        self.agreement = agreement
        self._lines.limit = MAX_LINE
        if agreement.offer.heartbeat:
            self._interval = agreement.offer.heartbeat / 1000
            self._silence = MISSED_HEARTBEATS * self._interval
            bound_failure_detection(self.sock, self._silence, self._keepalive)
        self._last_read = time.monotonic()
        return agreement

    def send(self, signal: Sendable) -> None:
        """Write one signal; signals of several greenlets do not mix. Raises OSError."""
        with self._sending:
            self.stream.write(signal.encode())

    def finish(self, ending: Ending, bye: str) -> None:
        """Say goodbye and send the end of the stream, without waiting; what the peer has sent is still read.

        A peer that reads nothing any more gets neither.
        """
        if self._goodbye is not None:
            return
        self._note(ending)
        self._goodbye = gevent.get_hub().loop.timer(GOODBYE)
        self._goodbye.start(self.stream.close)
        try:
            if self._sending.locked():  # a line is half written, and would never be whole
                raise ClosedError("the peer reads nothing")
            rest = self.stream.send(Bye(bye).encode()) if self.version > 1 else b""
            if rest or self.stream.end():
                raise ClosedError("the peer reads nothing")
        except OSError:
            self.stream.close()

    def hang_up(self) -> None:
        """Close in good order a connection whose handshake has failed: under TLS the peer would report a cut one."""
        with contextlib.suppress(OSError):
            self.stream.end()
        self.stream.close()

    def close(self, ending: Ending) -> None:
        """Close; the first ending given is the one that is reported."""
        self._note(ending)
        self.stream.close()
        if self._goodbye is not None:
            self._goodbye.close()
            self._goodbye = None

    def _note(self, ending: Ending) -> None:
        if self.ending is NOT_ENDED:
            self.ending = ending

    def read_line(self) -> bytes:
        """The next line; its deadline is the caller's. Raises OSError."""
        while not self._ready:
            if self.stream.pending:
                gevent.sleep(0)  # others get their turn
            else:
                self.stream.wait_readable()
            received = self.stream.recv_into(_buffer if self.agreement else _buffer[:_FIRST_READ_SIZE])
            if not received:
                raise ClosedError("closed by the peer")
            if self._acknowledges_at_once:
                acknowledge(self.sock)
            skipped = self._lines.skipped
            self._ready = self._lines.feed(bytes(_buffer[:received]))
            if self._lines.skipped > skipped:
                self._skip_over_long()
        self._last_read = time.monotonic()
        return self._ready.pop(0)

    def _skip_over_long(self) -> None:
        """Count an over-long line; in a handshake it is an error."""
        if not self.agreement:
            raise ProtocolError(f"a line longer than {self._lines.limit} bytes")
        words = f"skipping a signal longer than {MAX_LINE} bytes from %(peer)s"
        self._count("signals_over_long", "signal.over_long", words, peer=self.peer)

    def _signals(self) -> Iterator[Signal]:
        """The peer's signals, until the connection ends; `ending` then says why."""
        parse = parse_signal if self.version > 1 else parse_v1_signal
        while (line := self._next_line()) is not None:
            try:
                signal = parse(line)
            except ProtocolError as error:
                self._count("signals_malformed", "signal.malformed", "%(error)s", error=error)
                continue
            if isinstance(signal, Unknown):
                self._ignore(signal.line)
            elif isinstance(signal, Bye):
                token = signal.reason if signal.reason in BYES else CLOSED.reason
                self._note(Ending(token, BYES.get(signal.reason, CLOSED.words)))
            else:
                yield signal

    def _next_line(self) -> bytes | None:
        """The next line, or None at the end of the connection."""
        try:
            with gevent.Timeout(self._silence, TimeoutError()):
                return self.read_line()
        except OSError as error:
            self._end_by(error)
        return None

    def _end_by(self, error: OSError) -> None:
        """An error is the end of the connection, and says why."""
        if isinstance(error, ClosedError):
            self._note(CLOSED)
            return
        self.vanished = self.vanished or self.ending is NOT_ENDED
        self._note(SILENT if isinstance(error, TimeoutError) else Ending("failed", reason(error)))

    def _ignore(self, line: bytes) -> None:
        words = "ignoring an unknown signal: %(line)s"
        self._count("signals_unknown", "signal.unknown", words, line=printable(line))

    def _count(self, kind: str, event: str, words: str, **fields: object) -> None:
        self._stats.trouble[kind] += 1
        self._log.warning(event, words, Limit(), **fields)


class ServerControl(Control):
    """The server's end: sends heartbeats, takes their answers, and probes whether the client is alive."""

    def __init__(self, stream: Stream, interval: float, log: Log, stats: Stats, keepalive: float = KEEPALIVE) -> None:
        super().__init__(stream, interval, log, stats, keepalive)
        self.target_answers = True  # as the client's last heartbeat says
        self.is_doubted = False  # it gets no session while another client can serve, until its next answer
        self.since = time.monotonic()
        self.on_change: Callable[[], object] = int  # called when one of the first two has changed
        self._unanswered: deque[float] = deque(maxlen=MISSED_HEARTBEATS)  # when heartbeats went out (time.monotonic())
        self._answers = 0
        self._count_idle: Callable[[], int] = int

    def describe(self) -> str:
        return super().describe() + ("" if self.target_answers else ", its target does not answer")

    def serves(self, kind: int) -> bool:
        """Whether the client takes sessions of this kind, as its hello says."""
        return self.agreement is None or self.agreement.off != ("tcp" if kind == TCP else "udp")

    def beat(self, count_idle: Callable[[], int]) -> None:
        """Send heartbeats until the connection fails or is closed; `count_idle`: of idle data connections."""
        self._count_idle = count_idle
        try:
            while True:
                gevent.sleep(self._interval)
                self._beat_once()
        except OSError as error:
            self.close(Ending("failed", f"heartbeat failed: {reason(error)}"))

    @property
    def patience(self) -> float:
        """Seconds within which a client reacts to a heartbeat."""
        return max(LIFE_SIGN_WITHIN, ROUND_TRIPS * (self.round_trip or 0.0))

    @property
    def is_late(self) -> bool:
        """Whether a v2 client has left a heartbeat unanswered for longer."""
        return bool(self._unanswered) and time.monotonic() - self._unanswered[0] > self.patience

    def ask(self) -> None:
        """Send a heartbeat out of turn."""
        with contextlib.suppress(OSError):  # the reader reports it
            self._beat_once()

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

    def shows_life_since(self, moment: float) -> bool:
        """Whether the client has reacted since then (time.monotonic()): in v2 by a line, in v1 its TCP has no debts."""
        return self._last_read > moment if self.version > 1 else bool(acknowledged(self.sock))

    def wait_until_ended(self) -> None:
        """Take a v2 client's answers until the connection ends."""
        for signal in self._signals():
            if isinstance(signal, BeatAnswer):
                self._take_answer(signal)
            else:
                self._ignore(signal.encode()[:-1])

    def wait_for_byte(self) -> int:
        """Wait for the end of a v1 client's connection, which is also the first byte that it writes: it never should.

        That byte, or -1.
        """
        try:  # all of a late hello: to close on unread bytes is a reset, which does not pass every proxy
            if not self.stream.recv_into(_buffer):
                raise ClosedError("closed by the peer")
        except OSError as error:
            self._end_by(error)
            return -1
        self._note(Ending("protocol", "it spoke, as no client of wire v1 does"))
        return _buffer[0]

    def _beat_once(self) -> None:
        self._unanswered.append(time.monotonic())
        self.send(Beat(self._count_idle()) if self.version > 1 else HEARTBEAT)

    def _take_answer(self, answer: BeatAnswer) -> None:
        self._answers += 1
        if answer.ok != self.target_answers:
            self._unanswered.clear()  # the client may have said so unasked: then this is no round trip, nor is the next
            self._report_target(answer.ok)
            self.on_change()
        elif self._unanswered:
            self.round_trip = time.monotonic() - self._unanswered.popleft()
        if self.is_doubted:
            self.is_doubted = False
            self.on_change()

    def _report_target(self, answers: bool) -> None:
        self.target_answers = answers
        limit = Limit(seconds=60.0, burst=3)
        if answers:
            words = "the target of client %(client)s answers again"
            self._log.info("client.target_reachable", words, limit, client=self.peer)
        else:
            words = "the target of client %(client)s does not answer, so visitors are closed; its log has the reason"
            self._log.warning("client.target_unreachable", words, limit, client=self.peer)


class ClientControl(Control):
    """The client's end: yields launches, answers a v2 server's heartbeats, and tells it of its targets."""

    _told = True  # as the server knows, whether a target answers

    def note_proxy(self, peer: str) -> None:
        """The connection ends at a proxy: the server is called `peer`, and no launch waits for an acknowledgement."""
        self.peer = peer
        self._acknowledges_at_once = True

    def tell(self, target_answers: bool) -> None:
        """Tell a v2 server whether a target answers, unless it knows; waits while the server reads nothing."""
        if target_answers != self._told:
            self._told = target_answers
            try:
                self.send(BeatAnswer(target_answers))
            except OSError as error:
                self._end_by(error)

    def signals(self, target_answers: Callable[[], bool]) -> Iterator[Launch | Beat]:
        """The launches and v2 heartbeats that arrive, until the connection ends; the heartbeats are answered."""
        for signal in self._signals():
            if isinstance(signal, Launch):
                yield signal
            elif isinstance(signal, Beat):
                try:
                    with gevent.Timeout(self._silence, TimeoutError()):
                        self._told = target_answers()
                        self.send(BeatAnswer(self._told))
                except TimeoutError as error:
                    self._end_by(error)
                    return
                except OSError as error:  # the kernel reports it once: the next read may take it for the peer's close
                    self._end_by(error)
                yield signal
            elif self.version > 1:
                self._ignore(signal.encode()[:-1])
