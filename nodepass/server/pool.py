"""The server's end of the pool: any live connection serves; an idle one that becomes readable is dead."""

from __future__ import annotations

import time

from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel.pool import Idle, Pool, Waiter

INSISTS_AFTER = 8  # intervals of trimming in vain, and the client is left its larger pool


class ServerPool(Pool):
    """The server's end: hands out any live connection, the newest first, to whoever has waited longest."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        super().__init__(log, stats, lowest, highest)
        self._waiting: dict[Waiter, None] = {}  # in the order they came
        self._given: dict[Waiter, Stream] = {}  # to a waiter that has not run since
        self._taken = 0  # in this interval
        self._trimmed = 0  # in the interval before
        self._made_again = 0  # intervals in a row in which the client made again what had been trimmed

    def add(self, id: str, stream: Stream) -> None:
        if not self._waiting:
            super().add(id, stream)
            return
        waiter = next(iter(self._waiting))
        del self._waiting[waiter]
        self._count_new()
        self._taken += 1
        self._given[waiter] = stream
        waiter.give(id, stream)

    def take(self, timeout: float) -> tuple[str, Stream]:
        """A live connection and its id; it is the caller's now. Raises NoDataConnection after `timeout` seconds.

        One that was waited for comes closed where `flush` has run between its being given and the return.
        """
        while self._idle:
            idle = self._idle[next(reversed(self._idle))]
            if idle.stream.peek() is None:
                self._taken += 1
                self._stats.pool_waits.observe(0.0)
                return idle.id, self._release(idle)
            self._lose(idle)
        self._find_empty()
        began = time.monotonic()
        waiter = Waiter()
        self._waiting[waiter] = None
        try:
            return waiter.wait(timeout, f"no data connection within {timeout:g}s")
        finally:
            self._waiting.pop(waiter, None)
            self._given.pop(waiter, None)
            self._stats.pool_waits.observe(time.monotonic() - began)

    def flush(self, because: str) -> None:
        super().flush(because)
        for stream in self._given.values():
            stream.close()
        self.created = -self.bounds[0]
        self._trimmed = self._made_again = 0

    def end_interval(self) -> None:
        """As for any pool; then close the oldest of what is idle beyond the capacity.

        Our own client takes that as the word that it makes too many. One that keeps making them again is left alone.
        Only the server may trim: a client that closes an idle connection may cross a launch on its way.
        """
        if self._trimmed:
            made_again = self.created - self._taken >= self._trimmed / 2
            self._made_again = self._made_again + 1 if made_again else 0
        super().end_interval()
        self._taken = 0
        count = 0 if self._made_again >= INSISTS_AFTER else max(0, len(self) - self.capacity)
        surplus = list(self._idle.values())[:count]
        self._trimmed = len(surplus)
        for idle in surplus:
            self._discard(idle, "more than needed")

    def _lose(self, idle: Idle) -> None:
        self._stats.trouble["idle_connections_lost"] += 1
        self._discard(idle, "dead")

    def _readable(self, idle: Idle) -> None:
        # A client has nothing to say before a launch; under TLS what came may have been no data at all.
        if idle.stream.peek() is not None:
            self._lose(idle)
