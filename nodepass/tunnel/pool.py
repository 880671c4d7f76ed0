"""The pool: data connections made in advance, by id, each used once.

What both ends share. `Pool` keeps idle connections and watches them; `server_pool` and `client_pool` say what it means
that one becomes readable, and how a session comes by one. Who makes connections, and when, is `fillers`' business.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gevent
from gevent import GreenletExit
from gevent.event import AsyncResult

from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tasks import report_bug

SHRINK_BELOW = 0.2  # share of the capacity created in an interval under which the pool shrinks,
GROW_ABOVE = 0.8  # and over which it grows
SHRINK_BY = 0.8
GROW_BY = 2


class Waiter:
    """A greenlet that waits for a data connection. One that is handed over in the last moment is not lost."""

    def __init__(self) -> None:
        self._result: AsyncResult[tuple[str, Stream]] = AsyncResult()

    def give(self, id: str, stream: Stream) -> None:
        self._result.set((id, stream))

    def fail(self, error: NoDataConnection) -> None:
        self._result.set_exception(error)

    def wait(self, timeout: float, otherwise: str) -> tuple[str, Stream]:
        """What is given within `timeout` seconds. Raises NoDataConnection, saying `otherwise`."""
        try:
            given = self._result.get(timeout=timeout)
        except gevent.Timeout:
            if not self._result.ready():
                raise NoDataConnection(otherwise) from None
            given = self._result.get()
        except GreenletExit:
            if self._result.successful() and (late := self._result.value):
                late[1].close()
            raise
        assert given is not None
        return given


@dataclass(eq=False, slots=True)
class Idle:
    """A connection that waits for its session."""

    id: str
    stream: Stream
    since: float  # time.monotonic() when it was added


class Pool:
    """Idle data connections, and the capacity that the filler keeps them at."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        self.capacity = lowest
        self.bounds = (lowest, highest)
        self.created = -lowest  # in this interval; the first fill says nothing about what is needed
        self.found_empty = False  # in this interval
        self._log = log
        self._stats = stats
        self._idle: dict[str, Idle] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, id: str) -> bool:
        return id in self._idle

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} idle, capacity {self.capacity}>"

    def __str__(self) -> str:
        return f"pool {len(self)} idle of {self.capacity}"

    def add(self, id: str, stream: Stream) -> None:
        """Take over a connection that is ready for its session."""
        self._count_new()
        if old := self._idle.get(id):
            self._discard(old, "its id was given again")
        idle = self._idle[id] = Idle(id, stream, time.monotonic())
        stream.watch(self._look, idle)
        self._log.debug(
            "pool.added",
            "pool: %(id)s added, %(idle)d of %(capacity)d idle",
            id=id,
            idle=len(self),
            capacity=self.capacity,
        )

    def flush(self, because: str) -> None:
        """Close all that is idle."""
        for idle in list(self._idle.values()):
            self._discard(idle, because)

    def end_interval(self) -> None:
        """Think the capacity over, and start to count anew."""
        capacity = next_capacity(self.capacity, self.created, self.found_empty, *self.bounds)
        if capacity != self.capacity:
            self._log.debug(
                "pool.resized", "pool: capacity %(before)d -> %(capacity)d", before=self.capacity, capacity=capacity
            )
        self.capacity, self.created, self.found_empty = capacity, 0, False

    def _count_new(self) -> None:
        self.created += 1
        self._stats.data_connections += 1

    def _find_empty(self) -> None:
        """A session had to wait. A pool that has been filled once over in this interval grows at once."""
        self._stats.found_empty += 1
        self.found_empty = True
        if self.created >= self.capacity:
            self.end_interval()

    def _release(self, idle: Idle) -> Stream:
        del self._idle[idle.id]
        idle.stream.unwatch()
        return idle.stream

    def _discard(self, idle: Idle, because: str) -> None:
        self._release(idle).close()
        self._log.debug(
            "pool.closed",
            "pool: %(id)s closed, %(reason)s; %(idle)d of %(capacity)d idle",
            id=idle.id,
            reason=because,
            idle=len(self),
            capacity=self.capacity,
        )

    def _look(self, idle: Idle) -> None:
        """An idle connection has become readable. The loop calls this, and would have nobody to tell of a bug."""
        try:
            self._readable(idle)
        except Exception as error:  # noqa: BLE001  # its connection is lost, the others go on
            report_bug("pool", error, self._log, self._stats)
            self._idle.pop(idle.id, None)
            idle.stream.unwatch()
            idle.stream.abort()

    def _readable(self, idle: Idle) -> None:
        raise NotImplementedError


def next_capacity(capacity: int, created: int, found_empty: bool, lowest: int, highest: int) -> int:
    """The capacity after an interval in which `created` connections were made.

    Over 80 % of the capacity, or a session that found the pool empty: double. Under 20 %: a fifth less. Always between
    `lowest` and `highest`.
    """
    if found_empty or created > GROW_ABOVE * capacity:
        capacity *= GROW_BY
    elif created < SHRINK_BELOW * capacity:
        capacity = int(capacity * SHRINK_BY)
    return max(lowest, min(highest, capacity))
