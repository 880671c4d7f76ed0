"""The relay: bytes between two streams, both ways, until both directions have ended.

A session has one greenlet, the caller of `relay`, and it only waits for the end: its two directions are generators that
the event loop resumes (see `pump`). How a direction ends:

* End of stream at the source: a half-close of the sink; the other direction goes on.
* A read fails, or the source is found gone while the sink is full (see `stopped`): the sink is reset, once its peer has
  acknowledged what was written to it.
* A write fails: the sink takes no more, but what its peer sent before is still read and passed on by the other
  direction.
* A bug: the session ends, and the exception is raised in its greenlet.

A cut stream is never made to look like a whole one. `visitor_listener` and `connection` call this, one for each end of
a tunnel; the relay knows nothing of either.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

from gevent import get_hub
from gevent.hub import Waiter

from nodepass.errors import reason
from nodepass.net.pump import Pump, SinkError, Steps
from nodepass.net.sockets import end_reading, wait_delivered
from nodepass.net.stream import Stream
from nodepass.stats import Stats

DELIVERY_GRACE = 1.0  # seconds for a peer to acknowledge what was written before it gets the reset


@dataclass(slots=True)
class Traffic:
    """What one session moved, in payload bytes, and how it ended."""

    up: int = 0
    down: int = 0
    ended: int = 0  # directions that reached the end of their stream
    failure: str = ""  # the first

    @property
    def outcome(self) -> str:
        """One of `stats.TCP_OUTCOMES`."""
        return "reset" if self.failure else "completed" if self.ended == 2 else "cut"

    SENTENCE: ClassVar = "%(up)d bytes up, %(down)d bytes down, %(error)s"  # made of `fields`, for the log

    def fields(self) -> dict[str, object]:
        """The same for the log."""
        error = self.failure or "both ends closed"
        return {"up": self.up, "down": self.down, "outcome": self.outcome, "error": error}


def relay(near: Stream, far: Stream, stats: Stats, began: float | None = None) -> Traffic:
    """Move bytes until both directions have ended; up is from `near` to `far`. Both streams are closed on return.

    With `began`, in time.monotonic(), the time from then to the first byte of the way back is counted.
    """
    session = _Session(near, far, stats, began)
    traffic = session.traffic
    for stream in (near, far):
        stream.reset_on_close(True)  # should this process be killed, the cut streams must not look whole
    stats.tcp.begin()
    try:
        session.run()
        if session.broken:
            session.broken.abort()
        if traffic.failure:
            for stream in (near, far):
                wait_delivered(stream.sock, DELIVERY_GRACE)
                stream.abort()
    finally:
        stats.tcp.end(traffic.outcome)
        for stream in (near, far):
            stream.reset_on_close(traffic.ended < 2)
            stream.close()
    return traffic


class _Session:
    """The two directions, what they have in common, and the greenlet that waits for their end."""

    __slots__ = ("_began", "_down", "_running", "_stats", "_up", "_waiter", "broken", "traffic")

    def __init__(self, near: Stream, far: Stream, stats: Stats, began: float | None) -> None:
        self.traffic = Traffic()
        self.broken: Stream | None = None  # a read from it failed
        self._up = Pump(near, far, stats.tcp.up)
        self._down = Pump(far, near, stats.tcp.down)
        self._stats = stats
        self._began = began
        self._running = 2  # directions
        self._waiter: Waiter[None] = Waiter()

    def run(self) -> None:
        """Run until both directions are over, or a source is broken; raises the bug of a direction."""
        up, down = self._direction(self._up), self._direction(self._down)
        try:
            self._up.watch(up)
            self._down.watch(down)
            next(up)  # first bytes have often come before the session, answers never
            self._waiter.get()
        finally:
            for steps, pump in ((up, self._up), (down, self._down)):
                steps.close()
                pump.unwatch()
            self.traffic.up, self.traffic.down = self._up.moved, self._down.moved

    def _direction(self, pump: Pump) -> Steps:
        """One direction, to its end."""
        try:
            yield from pump.run(self._time_first_byte if pump is self._down else None)
            if self._count_end(pump):
                yield from pump.end()
        except SinkError as error:
            self._note(error.error)
            (self._up if pump is self._down else self._down).source_error = error.error
            end_reading(pump.sink.sock)
        except OSError as error:
            self._note(error)
            self.broken = pump.source
        except Exception as error:  # noqa: BLE001  # a bug: it belongs to the session's greenlet, not to the loop
            self._wake(error)
        pump.unwatch()
        self._running -= 1
        if self.broken or not self._running:
            self._wake()
        yield  # for the rest of the session: nothing is watched

    def _time_first_byte(self) -> None:
        if self._began is not None:
            self._stats.first_bytes.observe(time.monotonic() - self._began)

    def _count_end(self, pump: Pump) -> bool:
        """Count an end of stream; whether the sink needs a half-close."""
        if self.traffic.failure:
            return False  # only the echo of the other direction's failure
        self.traffic.ended += 1
        # At the end of both, closing the streams says the same with one system call less.
        return not (self.traffic.ended == 2 and self._running == 1 and pump.sink.plain)

    def _note(self, error: OSError) -> None:
        """The first failure is the one that is reported."""
        self.traffic.failure = self.traffic.failure or reason(error)

    def _wake(self, bug: Exception | None = None) -> None:
        """Have the session's greenlet go on, once the generator that calls this has come to rest."""
        loop = get_hub().loop
        if bug:
            loop.run_callback(self._waiter.throw, bug)
        else:
            loop.run_callback(self._waiter.switch, None)
