"""The pool: data connections made in advance, by id, each used once.

`Pool` keeps idle connections and watches them. On the server one that becomes readable is dead. On the client it is no
longer idle: its launch is on its way, or the server has closed it, which a visitor that left at once looks like. The
server `take`s any live one, the client `claim`s the one that a launch names. Who makes connections, and when, is the
business of `fillers`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import gevent
from gevent import GreenletExit
from gevent.event import AsyncResult, Event

from nodepass.capacity import next_capacity
from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.stream import Stream

LAUNCH_WITHIN = 2.0  # seconds from a session's first bytes, or its end, to its launch, which was written before
INSISTS_AFTER = 8  # intervals of trimming in vain, and the client is left its larger pool
YOUNG = 1.0  # seconds: the age under which an idle connection's end counts as a failure to make it


class _Waiter:
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
class _Idle:
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
        self._idle: dict[str, _Idle] = {}

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, id: str) -> bool:
        return id in self._idle

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {len(self)} idle, capacity {self.capacity}>"

    def add(self, id: str, stream: Stream) -> None:
        """Take over a connection that is ready for its session."""
        self._count_new()
        if old := self._idle.get(id):
            self._discard(old, "its id was given again")
        idle = self._idle[id] = _Idle(id, stream, time.monotonic())
        stream.watch(self._readable, idle)
        self._log.debug("pool: %s added, %d of %d idle", id, len(self), self.capacity)

    def flush(self, because: str) -> None:
        """Close all that is idle."""
        for idle in list(self._idle.values()):
            self._discard(idle, because)

    def end_interval(self) -> None:
        """Think the capacity over, and start to count anew."""
        capacity = next_capacity(self.capacity, self.created, self.found_empty, *self.bounds)
        if capacity != self.capacity:
            self._log.debug("pool: capacity %d -> %d", self.capacity, capacity)
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

    def _release(self, idle: _Idle) -> Stream:
        del self._idle[idle.id]
        idle.stream.unwatch()
        return idle.stream

    def _discard(self, idle: _Idle, because: str) -> None:
        self._release(idle).close()
        self._log.debug("pool: %s closed, %s; %d of %d idle", idle.id, because, len(self), self.capacity)

    def _readable(self, idle: _Idle) -> None:
        raise NotImplementedError


class ServerPool(Pool):
    """The server's end: hands out any live connection, the newest first, to whoever has waited longest."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        super().__init__(log, stats, lowest, highest)
        self._waiting: dict[_Waiter, None] = {}  # in the order they came
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
        waiter.give(id, stream)

    def take(self, timeout: float) -> tuple[str, Stream]:
        """A live connection and its id; it is the caller's now. Raises NoDataConnection after `timeout` seconds."""
        while self._idle:
            idle = self._idle[next(reversed(self._idle))]
            if idle.stream.peek() is None:
                self._taken += 1
                return idle.id, self._release(idle)
            self._lose(idle)
        self._find_empty()
        waiter = _Waiter()
        self._waiting[waiter] = None
        try:
            return waiter.wait(timeout, f"no data connection within {timeout:g}s")
        finally:
            self._waiting.pop(waiter, None)

    def flush(self, because: str) -> None:
        super().flush(because)
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

    def _lose(self, idle: _Idle) -> None:
        self._stats.trouble["idle_connections_lost"] += 1
        self._discard(idle, "dead")

    def _readable(self, idle: _Idle) -> None:
        # A client has nothing to say before a launch; under TLS what came may have been no data at all.
        if idle.stream.peek() is not None:
            self._lose(idle)


class ClientPool(Pool):
    """The client's end: gives out the connection that a launch names.

    `wanted` is set whenever the filler may have work; `dialling` counts the connections being made.
    """

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        super().__init__(log, stats, lowest, highest)
        self.wanted = Event()
        self.wanted.set()
        self.dialling = 0
        self.died_young = 0  # idle connections that the server closed as soon as they were made
        self._expected: dict[str, _Waiter] = {}
        self._reserved: dict[str, Stream] = {}  # launched, waiting for a slot
        self._spoken: dict[str, _Idle] = {}  # readable, waiting for their launch since then

    @property
    def missing(self) -> int:
        """How many connections to begin now."""
        return self.capacity - len(self) - self.dialling

    def add(self, id: str, stream: Stream) -> None:
        if expected := self._expected.pop(id, None):
            self._count_new()
            expected.give(id, stream)
            self.wanted.set()
        else:
            super().add(id, stream)

    def end_dial(self) -> None:
        """A connection has been added, or could not be made."""
        self.dialling -= 1
        self.wanted.set()
        if not self.dialling:
            for id, expected in self._expected.items():
                expected.fail(NoDataConnection(f"no data connection has the id {id}"))
            self._expected.clear()

    def end_interval(self) -> None:
        super().end_interval()
        limit = time.monotonic() - LAUNCH_WITHIN
        for id in [id for id, spoken in self._spoken.items() if spoken.since < limit]:
            self._spoken.pop(id).stream.close()
        self.wanted.set()

    def flush(self, because: str) -> None:
        super().flush(because)
        while self._spoken:
            self._spoken.popitem()[1].stream.close()
        while self._reserved:
            self._reserved.popitem()[1].close()

    def reserve(self, id: str) -> None:
        """Keep the connection of a launch that has been read until it is claimed, however long that takes."""
        if stream := self._find(id):
            self._reserved[id] = stream

    def drop(self, id: str) -> None:
        """Close the connection of a launch that cannot be served, so that the server's visitor is not left waiting."""
        if stream := self._reserved.pop(id, None):
            stream.close()

    def claim(self, id: str, timeout: float) -> Stream:
        """The connection of this id; it is the caller's now. Raises NoDataConnection where it is not known.

        A launch may overtake the id that the server wrote just before it on another connection: while one is being
        made, wait for it, `timeout` seconds at most.
        """
        if stream := self._reserved.pop(id, None) or self._find(id):
            return stream
        if not self.dialling or id in self._expected:
            raise NoDataConnection(f"no data connection has the id {id}")
        if not self._idle:
            self._find_empty()
        expected = self._expected[id] = _Waiter()
        try:
            return expected.wait(timeout, f"no data connection had the id {id} within {timeout:g}s")[1]
        finally:
            if self._expected.get(id) is expected:
                del self._expected[id]

    def _find(self, id: str) -> Stream | None:
        if spoken := self._spoken.pop(id, None):
            return spoken.stream
        if idle := self._idle.get(id):
            return self._leave(idle)
        return None

    def _leave(self, idle: _Idle) -> Stream:
        """Take a connection out of what is idle, and have it replaced."""
        stream = self._release(idle)
        if not self._idle:
            self._find_empty()
        self.wanted.set()
        return stream

    def _readable(self, idle: _Idle) -> None:
        state = idle.stream.peek()
        if state is None:
            return
        now = time.monotonic()
        if state:
            self._leave(idle)
        else:
            # The server has more than it needs: one less is made, until sessions come again.
            self.capacity = max(self.bounds[0], self.capacity - 1)
            self.died_young += now - idle.since < YOUNG
            self._release(idle)
            self.wanted.set()
        idle.since = now
        self._spoken[idle.id] = idle
        self._log.debug("pool: %s %s", idle.id, "has its first bytes" if state else "ended by the server")
