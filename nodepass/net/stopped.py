"""Stopped directions: those whose source is not read, because the sink is full, or because the rate does not allow it.

A reset of the source is found here. The event loop does not report it, since the source is not watched: a visitor that
gave up its upload to a target that reads nothing would hold its session for good. So the connections of all stopped
directions of the process are looked at. What the source had sent before may still be passed on: a direction is ended
only once its sink has acknowledged nothing for a while. Where the rate is what stops a direction, the sink says
nothing, and the direction is ended after the same while. `pump` says which directions are stopped.
"""

from __future__ import annotations

import time
from typing import Protocol

from nodepass.net.sockets import is_gone, pending_error, read_tcp_info
from nodepass.net.stream import Stream
from nodepass.tasks import IdleTimer

LOOK_EVERY = 1.0  # seconds
PATIENCE = 3.0  # seconds without progress for a sink whose source is gone; a reset crosses two processes in 8 s


class Direction(Protocol):
    """One direction of a session, see `pump.Pump`."""

    source: Stream
    sink: Stream
    source_error: OSError | None
    waits_for_turn: bool

    def fail(self, error: OSError) -> None:
        """End it as if a read had failed."""


class StoppedDirections:
    """The stopped directions of the process."""

    def __init__(self) -> None:
        self.patience = PATIENCE
        self.timer = IdleTimer(LOOK_EVERY, self._look)
        self._stopped: set[Direction] = set()
        self._gone: dict[Direction, tuple[int, float]] = {}  # bytes that the sink had acknowledged, and since when

    def __len__(self) -> int:
        return len(self._stopped)

    def add(self, direction: Direction) -> None:
        """Look at this direction until `discard`."""
        self._stopped.add(direction)
        self.timer.start()

    def discard(self, direction: Direction) -> None:
        """The direction has ended, or its source is watched again."""
        self._stopped.discard(direction)

    def _look(self) -> bool:
        now = time.monotonic()
        for direction in list(self._stopped):
            if direction in self._stopped and is_gone(direction.source.sock) and not self._progresses(direction, now):
                self._fail(direction)
        self._gone = {each: seen for each, seen in self._gone.items() if each in self._stopped}
        return bool(self._stopped)

    def _progresses(self, direction: Direction, now: float) -> bool:
        """Whether the sink has acknowledged bytes lately, or the direction has just stopped."""
        progress = 0 if direction.waits_for_turn else read_tcp_info(direction.sink.sock).acknowledged
        before, since = self._gone.get(direction, (-1, now))
        if progress != before:
            self._gone[direction] = progress, now
            return True
        return now - since < self.patience

    def _fail(self, direction: Direction) -> None:
        """End it, unless both ends of the connection have closed in good order and unread bytes wait for the sink."""
        if error := direction.source_error or pending_error(direction.source.sock):
            direction.fail(error)


stopped_directions = StoppedDirections()
