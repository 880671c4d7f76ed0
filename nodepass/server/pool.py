"""The server's pool: any live data connection serves a session, so an idle one has no name that matters.

A client says nothing on a data connection before its launch. An idle connection that becomes readable is therefore
dead, and is closed. Each client of a tunnel has a pool, and sessions wait in one queue for all of them: `clients` takes
connections, for `visitor_listener` and the flows of UDP; `data_listener` adds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.pump import Steps
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel.pool import Capacity, Pool, Waiter

Found = tuple[str, Stream]  # a connection's id, and the connection, which is the caller's now

INSISTS_AFTER = 8  # intervals in a row in which the client replaced what was trimmed; then its larger pool is accepted


class Queue:
    """The sessions of a tunnel that wait for a data connection, of each kind the longest wait first."""

    def __init__(self) -> None:
        # By kind of session: of clients that cannot serve it, or do not while another can.
        self.withheld: dict[int, set[ServerPool]] = {}
        self._waiting: dict[int, dict[PoolWaiter, None]] = {}

    def withholds(self, pool: ServerPool, kind: int) -> bool:
        """Whether this pool gives sessions of this kind no connection."""
        return pool in self.withheld.get(kind, ())

    def find(self, pool: ServerPool) -> PoolWaiter | None:
        """The session that has waited longest for a connection that this pool could give it, if there is one."""
        if not self._waiting:
            return None
        first = [next(iter(each)) for kind, each in self._waiting.items() if not self.withholds(pool, kind)]
        return min(first, key=lambda waiter: waiter.since, default=None)

    def wait(self, kind: int, timeout: float) -> tuple[ServerPool, Found]:
        """The next connection, and its pool. Raises NoDataConnection after `timeout` seconds.

        It comes closed if the pool's `flush` ran after it was given and before the return.
        """
        waiter = PoolWaiter(kind)
        self._waiting.setdefault(kind, {})[waiter] = None
        try:
            found = waiter.wait(timeout, f"no data connection within {timeout:g}s")
            assert waiter.pool is not None
            return waiter.pool, found
        finally:
            self.discard(waiter)
            if waiter.pool is not None:
                waiter.pool.forget(waiter)

    def discard(self, waiter: PoolWaiter) -> None:
        """It waits no more."""
        waiting = self._waiting.get(waiter.kind, {})
        if waiter in waiting:
            del waiting[waiter]
            if not waiting:
                del self._waiting[waiter.kind]

    def refuse(self, kind: int, make_error: Callable[[], NoDataConnection]) -> None:
        """End the wait of all sessions of this kind."""
        for waiter in self._waiting.pop(kind, {}):
            waiter.fail(make_error())


class PoolWaiter(Waiter):
    """A session in the queue, and the pool that has given it a connection."""

    pool: ServerPool | None = None

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind
        self.since = time.monotonic()


class ServerPool(Pool):
    """Hands out any live connection, the newest first; a new one goes to the session that has waited longest."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int, queue: Queue) -> None:
        super().__init__(Capacity(lowest, highest, stats), {}, log, stats)
        self.on_lost: Callable[[], object] = int  # called when an idle connection has proven dead
        self._queue = queue
        self._given: dict[PoolWaiter, Stream] = {}  # to a waiter that has not run since
        self._taken = 0  # in this interval
        self._trimmed = 0  # in the interval before
        self._replaced = 0  # intervals in a row in which the client replaced what had been trimmed
        self._last_idle = 0.0  # time.monotonic() when a connection was idle, or came, while there was one

    def is_lacking(self, patience: float) -> bool:
        """Whether a session would wait in vain: the last one did, or none was idle and none came for so many seconds.

        A pool that is empty for a moment, under load, does not lack any.
        """
        if self._idle:
            return False
        return not self._is_supplied or time.monotonic() - self._last_idle > patience

    def add(self, id: str, stream: Stream) -> None:
        """Take over a connection that is ready for its session."""
        # A client that has connected again may have closed what it dialled for the connection before.
        waiter = self._queue.find(self)
        if waiter and stream.peek() is not None:
            self._stats.trouble["idle_connections_lost"] += 1
            self._close(id, stream, "dead", "dead")
            return
        self._capacity.count_created()
        self._is_supplied, self._last_idle = True, time.monotonic()
        self._give_or_keep(id, stream, waiter)

    def take(self, kind: int) -> Found | None:
        """The newest idle connection that is alive, for a session of this kind; None where there is none.

        One that proves dead can have them all withheld: its client may be dead.
        """
        found = self._find_alive(kind)
        self._taken += found is not None
        return found

    def _find_alive(self, kind: int) -> Found | None:
        while self._idle and not self._queue.withholds(self, kind):
            id = next(reversed(self._idle))
            if self._idle[id].peek() is None:
                self._last_idle = time.monotonic()
                stream = self._idle.pop(id)
                stream.unwatch()
                return id, stream
            self._lose(id)
        return None

    def note_empty(self) -> None:
        """A session would have taken a connection, and there was none."""
        if self._capacity.note_empty():
            self.end_interval()

    def serve_waiting(self) -> None:
        """Give what is idle to sessions that wait: it was withheld from them until now."""
        while (waiter := self._queue.find(self)) and (found := self._find_alive(waiter.kind)):
            # A connection that proved dead may have had this session served by another pool.
            self._give_or_keep(*found, self._queue.find(self))

    def forget(self, waiter: PoolWaiter) -> None:
        """A session has got what it was given."""
        self._given.pop(waiter, None)

    def note_unserved(self) -> None:
        """A session has waited in vain."""
        self._is_supplied = False

    def _give_or_keep(self, id: str, stream: Stream, waiter: PoolWaiter | None) -> None:
        if waiter:
            self._queue.discard(waiter)
            self._taken += 1
            self._given[waiter] = stream
            waiter.pool = self
            waiter.give(id, stream)
            return
        if old := self._idle.pop(id, None):
            self._close(id, old, "replaced", "its id was given again")
        self._idle[id] = stream
        self._start_watching(id, stream, self._watch(id, stream))

    def flush(self, because: str) -> None:
        """Close all that is idle or given: these connections belong to a client that has gone."""
        while self._idle:
            id, stream = self._idle.popitem()
            self._close(id, stream, "flushed", because)
        for stream in self._given.values():
            stream.close()
        self._is_supplied = False
        self._capacity.skip_first_fill()
        self._trimmed = self._replaced = 0

    def end_interval(self) -> None:
        """Re-evaluate the capacity, then close the oldest of what is idle beyond it.

        Our own client takes that as a sign that it makes too many. One that keeps replacing them is left alone. Only
        the server trims: when a client closes an idle connection, a launch that names it can be on its way.
        """
        if self._trimmed:
            replaced = self._capacity.created - self._taken >= self._trimmed / 2
            self._replaced = self._replaced + 1 if replaced else 0
        self._capacity.end_interval()
        self._log_resize()
        self._taken = 0
        count = 0 if self._replaced >= INSISTS_AFTER else max(0, len(self) - self.capacity)
        surplus = list(self._idle)[:count]
        self._trimmed = len(surplus)
        for id in surplus:
            self._close(id, self._idle.pop(id), "surplus", "surplus")

    def _watch(self, id: str, stream: Stream) -> Steps:
        """Close an idle connection once it is dead. The event loop resumes this; a bare `yield` waits."""
        try:
            while stream.peek() is None:  # under TLS, what arrived may be no data
                yield
            self._lose(id)
        except Exception as error:  # noqa: BLE001  # the loop could not report it
            self._abort_after_bug(id, stream, error)
        yield  # not resumed: the stream is not watched any more

    def _lose(self, id: str) -> None:
        self._stats.trouble["idle_connections_lost"] += 1
        self._last_idle = time.monotonic()
        self._close(id, self._idle.pop(id), "dead", "dead")
        self.on_lost()
