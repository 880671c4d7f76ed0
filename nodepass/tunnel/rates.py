"""RATE_UP and RATE_DOWN: how fast payload moves through a tunnel, all its sessions and flows together.

Each direction has a token bucket. It counts nothing itself: what has moved stands in the counters of `stats`, and is
subtracted when the bucket is asked. A session that wants to move bytes while the bucket is empty waits for its turn, in
the order of arrival; a turn is worth a hundredth of a second of the rate. So the sessions that want more than there
is get equal shares, and a small one waits for one turn of each of the others. A turn may overdraw the bucket, which
the next one waits for: the mean is exact, and no read has to be cut to a few bytes.

TCP sessions take turns in `net.pump`, which stops reading meanwhile, so that the peer is held back. Datagrams wait in
the queue of their flow, in a `DatagramRate`; what does not fit is dropped, counted and logged. Single datagrams of wire
v1 have greenlets, which `wait` with a limit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import gevent
from gevent import get_hub
from gevent.hub import Waiter

from nodepass.config.kinds import format_duration
from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.stats import Stats, Way
from nodepass.tunnel.udp import drop_datagram

TURN = 0.01  # seconds of the rate that a turn is worth
LEAST_TURN = 1024  # bytes; fewer are not worth a read
MOST_TURN = 1 << 20  # bytes: as much as a pipe holds
BURST = 0.1  # seconds of the rate that a quiet tunnel saves up; a busy machine is late by as much
WAITS = 0.1  # seconds of the rate that the datagrams of one flow may wait for
MOST_WAITING = 1 << 20  # bytes of memory for the datagrams of all flows in one direction
OVERHEAD = 300  # bytes of memory that one takes beside its payload, which may be empty
LEAST_PAUSE = 0.001  # seconds before waiting turns are looked at again, so that others run
AT_ONCE = 1 << 20  # bytes that turns in a row may move before others run

Turn = Callable[[], object]


class NoTurnError(TimeoutError):
    """A datagram has waited too long for its turn."""


class Bucket:
    """The rate of one direction."""

    def __init__(self, bits: int, ways: Sequence[Way]) -> None:
        """`bits`: per second; `ways`: which count the bytes that move in this direction."""
        self.rate = bits / 8  # bytes per second
        self.turn = min(max(LEAST_TURN, round(self.rate * TURN)), MOST_TURN)  # bytes
        self._ways = ways
        self._most = max(self.rate * BURST, self.turn)
        self._level = self._most
        self._seen = self._moved()  # bytes that have been subtracted
        self._at = time.monotonic()  # of the level
        self._turns: dict[Turn, None] = {}  # that wait, in the order of coming
        self._timer: Any = None  # gevent's, which has no type

    def is_free(self) -> bool:
        """Whether a turn may begin now."""
        return not self._turns and self._find_level() > 0

    def queue(self, turn: Turn) -> None:
        """Call back once, when it is this one's turn."""
        self._turns[turn] = None
        if self._timer is None:
            self._set_timer()

    def cancel(self, turn: Turn) -> None:
        """Do not call back, if it still waits."""
        self._turns.pop(turn, None)

    def wait(self, seconds: float) -> None:
        """Wait for a turn, in a greenlet. Raises NoTurnError after so many seconds."""
        if self.is_free():
            return
        waiter: Waiter[None] = Waiter()
        turn = partial(waiter.switch, None)
        self.queue(turn)
        try:
            with gevent.Timeout(seconds, NoTurnError(f"no turn under the rate within {format_duration(seconds)}")):
                waiter.get()
        finally:
            self.cancel(turn)

    def _moved(self) -> int:
        return sum(way.bytes for way in self._ways)

    def _find_level(self) -> float:
        """Bytes that may move now, below 0 where the bucket is overdrawn."""
        now, moved = time.monotonic(), self._moved()
        self._level = min(self._most, self._level + (now - self._at) * self.rate) - (moved - self._seen)
        self._at, self._seen = now, moved
        return self._level

    def _set_timer(self) -> None:
        pause = max(LEAST_PAUSE, -self._find_level() / self.rate)
        self._timer = get_hub().loop.timer(pause)
        self._timer.start(self._serve)

    def _serve(self) -> None:
        """Begin the turns that are due."""
        self._timer.close()
        self._timer = None
        last = self._moved() + AT_ONCE
        try:
            while self._turns and self._find_level() > 0 and self._seen < last:
                turn = next(iter(self._turns))
                del self._turns[turn]
                turn()
        finally:
            if self._turns and self._timer is None:
                self._set_timer()


class Rates(NamedTuple):
    """The buckets of one tunnel, None where its rate has no limit."""

    up: Bucket | None = None
    down: Bucket | None = None

    @classmethod
    def of(cls, settings: Settings, stats: Stats) -> Rates:
        """Those of a tunnel with these settings."""
        up, down = (stats.tcp.up, stats.udp.up), (stats.tcp.down, stats.udp.down)
        return cls(_bucket(settings.rate_up.bits, up), _bucket(settings.rate_down.bits, down))


def _bucket(bits: int, ways: Sequence[Way]) -> Bucket | None:
    return Bucket(bits, ways) if bits else None


class DatagramRate:
    """The datagrams of all flows in one direction, which wait here while the bucket is empty."""

    def __init__(self, bucket: Bucket, setting: str, log: Log, stats: Stats) -> None:
        """`setting`: its name, for the log."""
        self._bucket = bucket
        self._setting = setting
        self._log = log
        self._stats = stats
        self._most = bucket.rate * WAITS  # bytes of one flow, but one datagram may always wait
        self._queues: dict[Hashable, _Queue] = {}
        self._waiting = 0  # bytes of memory

    @classmethod
    def of(cls, bucket: Bucket | None, setting: str, log: Log, stats: Stats) -> DatagramRate | None:
        """That of a direction, None where its rate has no limit."""
        return cls(bucket, setting, log, stats) if bucket else None

    def pass_on(self, flow: Hashable, size: int, send: Turn) -> None:
        """Have `send` send a datagram of a flow, now or in its turn; one for which there is no room is dropped."""
        queue = self._queues.get(flow)
        if queue is None and self._bucket.is_free():
            send()
        elif self._waiting + size + OVERHEAD > MOST_WAITING or (queue and queue.size + size > self._most):
            self._drop(size)
        else:
            if queue is None:
                queue = self._queues[flow] = _Queue(partial(self._begin_turn, flow))
                self._bucket.queue(queue.turn)
            queue.datagrams.append((size, send))
            queue.size += size
            self._waiting += size + OVERHEAD

    def end(self, flow: Hashable) -> None:
        """A flow has ended: what waits of it is dropped."""
        if queue := self._queues.pop(flow, None):
            self._bucket.cancel(queue.turn)
            for size, _ in queue.datagrams:
                self._waiting -= size + OVERHEAD
                self._drop(size)
            queue.datagrams.clear()

    def _drop(self, size: int) -> None:
        words = "a datagram of %(size)d bytes: no room under %(setting)s"
        drop_datagram(self._log, self._stats, "rate", words, size=size, setting=self._setting)

    def _begin_turn(self, flow: Hashable) -> None:
        """Send the datagrams of a flow that its turn is worth."""
        queue, left = self._queues[flow], self._bucket.turn
        try:
            while queue.datagrams and left > 0:
                size, send = queue.datagrams.popleft()
                queue.size -= size
                self._waiting -= size + OVERHEAD
                left -= max(1, size)
                send()
        finally:
            if queue.datagrams:
                self._bucket.queue(queue.turn)
            elif self._queues.get(flow) is queue:  # it has not ended meanwhile
                del self._queues[flow]


class _Queue:
    """The datagrams of one flow that wait."""

    __slots__ = ("datagrams", "size", "turn")

    def __init__(self, turn: Turn) -> None:
        self.datagrams: deque[tuple[int, Turn]] = deque()  # their sizes, and what sends them
        self.size = 0  # bytes
        self.turn = turn
