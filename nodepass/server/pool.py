"""The server's pool: any live data connection serves a session, so an idle one has no name that matters.

A client says nothing on a data connection before its launch. An idle connection that becomes readable is therefore
dead, and is closed. `visitor_listener` and the flows of UDP take connections, through `client_slot`; `data_listener`
adds them.
"""

from __future__ import annotations

import time

from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.pump import Steps
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel.pool import Capacity, Pool, Waiter

INSISTS_AFTER = 8  # intervals in a row in which the client replaced what was trimmed; then its larger pool is accepted


class ServerPool(Pool):
    """Hands out any live connection, the newest first; new ones go to the session that has waited longest."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        super().__init__(Capacity(lowest, highest, stats), {}, log, stats)
        self._waiting: dict[Waiter, None] = {}  # in the order they came
        self._given: dict[Waiter, Stream] = {}  # to a waiter that has not run since
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
        self._capacity.count_created()
        self._is_supplied, self._last_idle = True, time.monotonic()
        if self._waiting:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            self._taken += 1
            self._given[waiter] = stream
            waiter.give(id, stream)
        else:
            if old := self._idle.pop(id, None):
                self._close(id, old, "replaced", "its id was given again")
            self._idle[id] = stream
            self._start_watching(id, stream, self._watch(id, stream))

    def take(self, timeout: float) -> tuple[str, Stream]:
        """A live connection and its id; it is the caller's now. Raises NoDataConnection after `timeout` seconds.

        One that was waited for comes closed if `flush` ran after it was given and before the return.
        """
        while self._idle:
            id = next(reversed(self._idle))
            if self._idle[id].peek() is None:
                self._taken += 1
                self._last_idle = time.monotonic()
                self._stats.pool_waits.observe(0.0)
                stream = self._idle.pop(id)
                stream.unwatch()
                return id, stream
            self._lose(id)
        if self._capacity.count_found_empty():
            self.end_interval()
        began = time.monotonic()
        waiter = Waiter()
        self._waiting[waiter] = None
        try:
            return waiter.wait(timeout, f"no data connection within {timeout:g}s")
        except NoDataConnection:
            self._is_supplied = False
            raise
        finally:
            self._waiting.pop(waiter, None)
            self._given.pop(waiter, None)
            self._stats.pool_waits.observe(time.monotonic() - began)

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
