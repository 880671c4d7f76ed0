"""What the two directions of a relay have in common: the count of bytes, how it ended, and who waits for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gevent.hub import Waiter

from nodepass.errors import reason
from nodepass.net.stream import Stream
from nodepass.stats import Stats


@dataclass
class Traffic:
    """What one session moved, in payload bytes, and how it ended."""

    up: int = 0
    down: int = 0
    ended: int = 0  # directions that came to their end of stream
    failure: str = ""

    @property
    def outcome(self) -> str:
        """One of `stats.TCP_OUTCOMES`."""
        return "reset" if self.failure else "completed" if self.ended == 2 else "cut"

    SENTENCE: ClassVar = "%(up)d bytes up, %(down)d bytes down, %(error)s"  # made of `fields`, for the log

    def fields(self) -> dict[str, object]:
        """What the log says of it."""
        error = self.failure or "both ends closed"
        return {"up": self.up, "down": self.down, "outcome": self.outcome, "error": error}


class Session:
    """What the two directions have in common."""

    __slots__ = ("_open", "_waiter", "began", "broken", "stats", "traffic")

    def __init__(self, stats: Stats, began: float | None) -> None:
        self.stats = stats
        self.began = began  # time.monotonic() from which the first byte of the way back is timed, if it is
        self.traffic = Traffic()
        self.broken: Stream | None = None  # a read from it failed
        self._open = 2  # directions
        self._waiter: Waiter[None] = Waiter()

    @property
    def is_last(self) -> bool:
        """Whether one direction only still runs, and all has gone well."""
        return self._open == 1 and self.traffic.ended == 2

    def wait(self) -> None:
        """Until both directions are over, or one is broken; raises what crashed one."""
        self._waiter.get()

    def note(self, error: OSError) -> None:
        """The first failure is the one that is reported."""
        self.traffic.failure = self.traffic.failure or reason(error)

    def end_one(self) -> None:
        """A direction is over; the other may go on."""
        self._open -= 1
        if self._open == 0:
            self._waiter.switch(None)

    def end_broken(self, source: Stream) -> None:
        """Everything is over, at once."""
        self.broken = source
        if self._open > 0:
            self._open = 0
            self._waiter.switch(None)

    def crash(self, error: Exception) -> None:
        """A bug: it belongs to the session's greenlet, not to the loop."""
        self._waiter.throw(error)
