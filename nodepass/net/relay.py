"""The relay: bytes between two streams, both ways, until both directions have ended.

A session has one greenlet, the caller of `relay`, and it only waits for the end: its two directions are generators that
the event loop resumes (see `pump`). How a direction ends:

* End of stream at the source: a half-close of the sink; the other direction goes on.
* A read fails, or the source is found gone while the sink is full (see `stopped`): the sink is reset, once its peer has
  acknowledged what was written to it.
* A write fails: the sink takes no more, but what its peer sent before is still read and passed on by the other
  direction.
* A deadline passes (see `deadlines`): both ends are reset.
* A bug: the session ends, and the exception is raised in its greenlet.

A cut stream is never made to look like a whole one. `visitor_listener` and `connection` call this, one for each end of
a tunnel; the relay knows nothing of either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gevent import get_hub
from gevent.hub import Waiter

from nodepass.errors import ExpiredError, reason
from nodepass.net.deadlines import Deadlines
from nodepass.net.pump import Pump, SinkError, Steps, Throttle
from nodepass.net.sockets import end_reading, wait_delivered
from nodepass.net.stream import Stream
from nodepass.stats import Stats

Throttles = tuple[Throttle | None, Throttle | None]

DELIVERY_GRACE = 1.0  # seconds for a peer to acknowledge what was written before it gets the reset


@dataclass(slots=True)
class Traffic:
    """What one session moved, in payload bytes, and how it ended."""

    up: int = 0
    down: int = 0
    first_byte: float | None = None  # seconds to the first byte of the way back
    ended: int = 0  # directions that reached the end of their stream
    failure: str = ""  # the first
    failed: str = ""  # the outcome that it stands for

    @property
    def outcome(self) -> str:
        """One of `stats.TCP_OUTCOMES`."""
        return self.failed or ("completed" if self.ended == 2 else "cut")

    def note(self, error: OSError) -> None:
        """Keep a failure, if it is the first."""
        if not self.failure:
            self.failure = reason(error)
            self.failed = "vanished" if isinstance(error, TimeoutError) else "reset"
            if isinstance(error, ExpiredError):
                self.failed = error.outcome

    SENTENCE: ClassVar = "%(up)d bytes up, %(down)d bytes down, %(error)s"  # made of `fields`, for the log

    def fields(self) -> dict[str, object]:
        """The same for the log."""
        error = self.failure or "both ends closed"
        return {"up": self.up, "down": self.down, "outcome": self.outcome, "error": error}


def relay(
    near: Stream,
    far: Stream,
    stats: Stats,
    began: float | None = None,
    deadlines: Deadlines | None = None,
    on_end: Callable[[Traffic], object] | None = None,
    throttles: Throttles = (None, None),
) -> Traffic:
    """Move bytes until both directions have ended; up is from `near` to `far`. Both streams are closed on return.

    With `began`, in time.monotonic(), the time from then to the first byte of the way back is counted. A session that
    misses one of the `deadlines` is ended. `on_end` gets what is counted, even where a bug or a kill is raised. The
    `throttles` limit the rate, up and down.
    """
    session = _Session(near, far, stats, began, throttles)
    traffic = session.traffic
    for stream in (near, far):
        stream.reset_on_close(True)  # should this process be killed, the cut streams must not look whole
    stats.tcp.begin()
    try:
        session.run(deadlines)
        if session.broken:
            session.broken.abort()
        if traffic.failure:
            for stream in (near, far):
                wait_delivered(stream.sock, DELIVERY_GRACE)
                stream.abort()
    finally:
        stats.tcp.end(traffic.outcome)
        if on_end:
            on_end(traffic)
        for stream in (near, far):
            stream.reset_on_close(traffic.ended < 2)
            stream.close()
    return traffic


class _Session:
    """The two directions, what they have in common, and the greenlet that waits for their end."""

    __slots__ = ("_began", "_running", "_stats", "_waiter", "broken", "down", "traffic", "up")

    def __init__(self, near: Stream, far: Stream, stats: Stats, began: float | None, throttles: Throttles) -> None:
        self.traffic = Traffic()
        self.broken: Stream | None = None  # a read from it failed
        self.up = Pump(near, far, stats.tcp.up, throttles[0])
        self.down = Pump(far, near, stats.tcp.down, throttles[1])
        self._stats = stats
        self._began = began
        self._running = 2  # directions
        self._waiter: Waiter[None] = Waiter()

    def run(self, deadlines: Deadlines | None) -> None:
        """Run until both directions are over, or a source is broken; raises the bug of a direction."""
        up, down = self._direction(self.up), self._direction(self.down)
        if deadlines:
            deadlines.add(self, time.monotonic() if self._began is None else self._began)
        try:
            self.up.watch(up)
            self.down.watch(down)
            next(up)  # first bytes have often come before the session, answers never
            self._waiter.get()
        finally:
            if deadlines:
                deadlines.discard(self)
            for steps, pump in ((up, self.up), (down, self.down)):
                steps.close()
                pump.unwatch()
            self.traffic.up, self.traffic.down = self.up.moved, self.down.moved

    def fail(self, broken: Stream | None, error: OSError) -> None:
        """End the session: a deadline has passed. `broken`: the connection that is gone."""
        self.traffic.note(error)
        self.broken = self.broken or broken
        self._wake()

    def _direction(self, pump: Pump) -> Steps:
        """One direction, to its end."""
        try:
            yield from pump.run(self._time_first_byte if pump is self.down else None)
            if self._count_end(pump):
                yield from pump.end()
        except SinkError as error:
            self.traffic.note(error.error)
            (self.up if pump is self.down else self.down).source_error = error.error
            end_reading(pump.sink.sock)
        except OSError as error:
            self.traffic.note(error)
            self.broken = pump.source
        except Exception as error:  # noqa: BLE001  # a bug: it belongs to the session's greenlet, not to the loop
            self._wake(error)
        pump.unwatch()
        pump.over = True
        self._running -= 1
        if self.broken or not self._running:
            self._wake()
        yield  # for the rest of the session: nothing is watched

    def _time_first_byte(self) -> None:
        if self._began is not None:
            self.traffic.first_byte = time.monotonic() - self._began
            self._stats.first_bytes.observe(self.traffic.first_byte)

    def _count_end(self, pump: Pump) -> bool:
        """Count an end of stream; whether the sink needs a half-close."""
        if self.traffic.failure:
            return False  # only the echo of the other direction's failure
        self.traffic.ended += 1
        # At the end of both, closing the streams says the same with one system call less.
        return not (self.traffic.ended == 2 and self._running == 1 and pump.sink.plain)

    def _wake(self, bug: Exception | None = None) -> None:
        """Have the session's greenlet go on, once the generator that calls this has come to rest."""
        loop = get_hub().loop
        if bug:
            loop.run_callback(self._waiter.throw, bug)
        else:
            loop.run_callback(self._waiter.switch, None)
