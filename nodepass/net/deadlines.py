"""The deadlines of sessions: for an acknowledgement, for a byte, for the visitor's first one.

A peer that vanishes says nothing. Keepalive probes find that on a connection without traffic, but the kernel sends none
while bytes wait for an acknowledgement: it repeats those, for about 15 minutes. TCP_USER_TIMEOUT would shorten that,
and also end a living reader that reads nothing. What tells the two apart is the last acknowledgement: such a reader's
kernel acknowledges each probe of its shut window, and the probes are at most 120 s apart. So a connection is given up
when bytes wait, and nothing has been acknowledged for long enough.

All sessions are looked at, by a timer and a share at a time. One that has read from both ends since the last look costs
two comparisons; a quiet connection costs a system call (2 microseconds). Nothing is added to the path of the bytes.
One that waits for its turn under a rate has bytes to move, and counts as active.
`relay` adds the sessions and ends them; `client_slot` and `launches` each have the deadlines of those with one other
end, and tell them when that has vanished. A client's `bridge` to a proxy has some of its own.
"""

from __future__ import annotations

import errno
import time
from typing import NamedTuple, Protocol

from nodepass.config.kinds import format_duration
from nodepass.errors import ExpiredError
from nodepass.net.pump import Pump
from nodepass.net.sockets import pending_error, read_tcp_info
from nodepass.net.stream import Stream
from nodepass.tasks import IdleTimer

ROUND = 15.0  # seconds in which every session is looked at once
SHARES = 3  # looks in a round, so that no look holds up the loop
SHORTEST_ROUND = 0.15  # seconds
NOTABLE = 1 / 8  # of its bound: a connection that has waited for so long is looked at each time
PARTS = 4  # a round takes at most one in so many of the shortest timeout


class Bounds(NamedTuple):
    """Seconds without an acknowledgement, while bytes wait for one, after which a peer has vanished."""

    in_flight: float = 120.0
    window_shut: float = 300.0  # the kernel's probes of a shut window are up to 120 s apart, and two may be lost
    suspected: float = 10.0  # in flight to an end of the tunnel whose control connection has been given up


class Session(Protocol):
    """A session, see `relay`."""

    up: Pump
    down: Pump

    def fail(self, broken: Stream | None, error: OSError) -> None:
        """End it; `broken` is the connection that is gone."""


class Deadlines:
    """Sessions with one other end of a tunnel, and how long each may wait; 0 is without limit."""

    def __init__(self, idle: float, first_byte: float, data_is_near: bool, bounds: Bounds | None = None) -> None:
        """`idle`: seconds without a byte either way; `first_byte`: seconds without one from the visitor.

        `data_is_near`: a session's data connection is the near one, as on a client.
        """
        self._idle = idle
        self._first_byte = first_byte
        self._data_is_near = data_is_near
        self._bounds = bounds or Bounds()
        self._watched: dict[Session, _Watched] = {}
        self._urgent: dict[Session, _Watched] = {}  # of those, looked at each time
        self._round: list[_Watched] = []  # still to be looked at in this round
        self._share = 0
        shortest = min(filter(None, (idle, first_byte, PARTS * ROUND)))
        self._timer = IdleTimer(max(SHORTEST_ROUND, shortest / PARTS) / SHARES, self._look)

    def add(self, session: Session, began: float) -> None:
        """Watch a session, whose visitor came at `began` (time.monotonic()), until `discard`."""
        self._watched[session] = _Watched(session, began)
        self._timer.start()

    def discard(self, session: Session) -> None:
        """The session has ended."""
        self._watched.pop(session, None)
        self._urgent.pop(session, None)

    def suspect_data_connections(self) -> None:
        """The other end of the tunnel has vanished, as far as its control connection tells.

        A session whose data connection lives goes on: it only has to show that within less time. One on which no bytes
        wait is left to the kernel's keepalive probes.
        """
        now = time.monotonic()
        for watched in list(self._watched.values()):
            (watched.near if self._data_is_near else watched.far).suspect(now)
            self._check(watched, now)

    def end_all(self, error: OSError) -> int:
        """End all sessions; how many those were."""
        sessions = list(self._watched)
        for session in sessions:
            session.fail(None, error)
        return len(sessions)

    def _look(self) -> bool:
        now = time.monotonic()
        if not self._round:
            self._round = list(self._watched.values())
            self._share = -(-len(self._round) // SHARES)
        due, self._round = self._round[: self._share], self._round[self._share :]
        for watched in {*due, *self._urgent.values()}:
            if watched.session in self._watched:  # else it has ended since the round began
                self._check(watched, now)
        if not self._watched:
            self._round = []
        return bool(self._watched)

    def _check(self, watched: _Watched, now: float) -> None:
        """Look at one session, and end it where a deadline has passed."""
        for connection in (watched.near, watched.far):
            try:
                if connection.look(now, self._bounds):
                    watched.active = now
            except OSError as error:
                watched.session.fail(connection.pump.source, error)
                return
        if expired := self._expired(watched, now):
            watched.session.fail(None, expired)
        if watched.near.is_urgent or watched.far.is_urgent:
            self._urgent[watched.session] = watched
        else:
            self._urgent.pop(watched.session, None)

    def _expired(self, watched: _Watched, now: float) -> ExpiredError | None:
        up = watched.session.up
        if up.waits_for_turn or watched.session.down.waits_for_turn:  # under a rate: there are bytes
            watched.active = now
            return None
        if self._first_byte and not up.moved and not up.over and now - watched.began >= self._first_byte:
            words = f"nothing from the visitor for {format_duration(self._first_byte)} (FIRST_BYTE_TIMEOUT)"
            return ExpiredError("silent", words)
        if self._idle and now - watched.active >= self._idle:
            return ExpiredError("idle", f"no byte for {format_duration(self._idle)} (IDLE_TIMEOUT)")
        return None


class _Watched:
    """A session and its two connections."""

    __slots__ = ("active", "began", "far", "near", "session")

    def __init__(self, session: Session, began: float) -> None:
        self.session = session
        self.near = _Connection(session.up)
        self.far = _Connection(session.down)
        self.began = began
        self.active = time.monotonic()  # of the last look that found that bytes had passed


class _Connection:
    """One connection of a session, as it was at the last look."""

    __slots__ = ("_acknowledged", "_read", "_suspected_since", "_waits_since", "is_urgent", "pump")

    def __init__(self, pump: Pump) -> None:
        self.pump = pump  # of which it is the source
        self.is_urgent = False
        self._read = 0  # bytes
        self._acknowledged = 0  # bytes
        self._waits_since: float | None = None  # the first look that found bytes without an acknowledgement
        self._suspected_since: float | None = None

    def suspect(self, now: float) -> None:
        """What was read before now says nothing about the peer any more."""
        self._read = self.pump.moved
        self._suspected_since = now

    def look(self, now: float, bounds: Bounds) -> bool:
        """Whether bytes have passed since the last look. Raises OSError where the peer is gone."""
        if self.pump.moved != self._read:
            self._read = self.pump.moved
            self._waits_since = self._suspected_since = None
            self.is_urgent = False
            return True
        info = read_tcp_info(self.pump.source.sock)
        if info.is_gone:
            if self.pump.over:  # else the event loop reports it, or `stopped` finds it
                raise pending_error(self.pump.source.sock) or OSError(errno.ECONNRESET, "Connection reset by peer")
            return False
        passed, self._acknowledged = info.acknowledged != self._acknowledged, info.acknowledged
        if self._suspected_since is not None and now - info.silent > self._suspected_since:
            self._suspected_since = None
        self._check_silence(now, info.silent if info.waits else 0.0, self._bound(info.window_is_shut, bounds))
        return passed

    def _bound(self, window_is_shut: bool, bounds: Bounds) -> float:
        if window_is_shut:
            return bounds.window_shut
        return bounds.in_flight if self._suspected_since is None else bounds.suspected

    def _check_silence(self, now: float, silent: float, bound: float) -> None:
        """Raise TimeoutError where bytes have waited for so long; without any, `silent` is 0."""
        if not silent:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        waited = min(silent, now - self._waits_since) if self._waits_since is not None else 0.0
        if waited >= bound:
            raise TimeoutError(errno.ETIMEDOUT, f"no acknowledgement for {format_duration(round(waited))}")
        self.is_urgent = self._suspected_since is not None or waited > bound * NOTABLE
