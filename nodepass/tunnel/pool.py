"""What the pools of both ends share: idle data connections, each for one session, and the capacity they are kept at.

`server.pool` and `client.pool` decide which connection a session gets, and what it means that an idle one becomes
readable. A pool makes no connections: `server.data_listener` and `client.data_dialer` do, and add them.
"""

from __future__ import annotations

import gevent
from gevent import GreenletExit
from gevent.event import AsyncResult

from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.pump import Steps
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


class Capacity:
    """How many connections are kept ready: `size`, which follows what sessions needed in the last interval."""

    def __init__(self, lowest: int, highest: int, stats: Stats) -> None:
        self.size = lowest
        self.lowest = lowest
        self.highest = highest
        self.created = 0  # in this interval
        self._found_empty = False  # in this interval
        self._stats = stats
        self.skip_first_fill()

    def count_created(self) -> None:
        self.created += 1
        self._stats.data_connections += 1

    def count_found_empty(self) -> bool:
        """As `note_empty`, counted."""
        self._stats.found_empty += 1
        return self.note_empty()

    def note_empty(self) -> bool:
        """A session found no connection; whether to end the interval now, since the pool was refilled once in it."""
        self._found_empty = True
        return self.created >= self.size

    def end_interval(self) -> None:
        """Re-evaluate the size, and start to count again."""
        self.size = next_capacity(self.size, self.created, self._found_empty, self.lowest, self.highest)
        self.created, self._found_empty = 0, False

    def skip_first_fill(self) -> None:
        """Begin to count where a pool is filled for the first time, which does not show a need."""
        self.created = -self.lowest


class Pool:
    """The idle connections of one end: their watching, their closing, and how the log and the status show them."""

    def __init__(self, capacity: Capacity, idle: dict[str, Stream], log: Log, stats: Stats) -> None:
        self._capacity = capacity
        self._idle = idle  # by id, the oldest first
        self._log = log
        self._stats = stats
        self._logged = capacity.size
        self._is_supplied = False  # a connection has come since a session, or a dial, failed for the want of one

    @property
    def capacity(self) -> int:
        """How many connections are kept ready."""
        return self._capacity.size

    @property
    def full(self) -> bool:
        """Whether as many connections are idle as MAX_POOL_CAPACITY allows."""
        return len(self._idle) >= self._capacity.highest

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, id: str) -> bool:
        return id in self._idle

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} idle, capacity {self.capacity}>"

    def __str__(self) -> str:
        return f"pool {len(self)} idle of {self.capacity}"

    def _start_watching(self, id: str, stream: Stream, watch: Steps) -> None:
        """Have the event loop resume `watch` whenever an idle connection is readable, until `stream.unwatch`."""
        stream.watch(watch.__next__)
        self._log.debug(
            "pool.added",
            "pool: %(id)s added, %(idle)d of %(capacity)d idle",
            id=id,
            idle=len(self),
            capacity=self.capacity,
        )

    def _close(self, id: str, stream: Stream, reason: str, words: str) -> None:
        """Close a connection that no session will use."""
        stream.unwatch()
        stream.close()
        self._log.debug(
            "pool.closed",
            "pool: %(id)s closed, %(error)s; %(idle)d of %(capacity)d idle",
            id=id,
            reason=reason,
            error=words,
            idle=len(self),
            capacity=self.capacity,
        )

    def _log_resize(self) -> None:
        """Log a capacity that has changed."""
        before, self._logged = self._logged, self.capacity
        if before != self._logged:
            words = "pool: capacity %(before)d -> %(capacity)d"
            self._log.debug("pool.resized", words, before=before, capacity=self._logged)

    def _abort_after_bug(self, id: str, stream: Stream, error: Exception) -> None:
        """A bug in the code that watches a connection ends that connection; the others go on."""
        report_bug("pool", error, self._log, self._stats)
        self._forget(id, stream)
        stream.unwatch()
        stream.abort()

    def _forget(self, id: str, stream: Stream) -> None:
        if self._idle.get(id) is stream:
            del self._idle[id]


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
