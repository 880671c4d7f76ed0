"""The client's end of the pool: a launch names its connection.

An idle one that becomes readable is idle no longer: its launch is on its way, or the server has closed it, which a
visitor that left at once looks like.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from gevent.event import Event

from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.stats import Stats
from nodepass.tunnel.pool import Idle, Pool, Waiter

LAUNCH_WITHIN = 2.0  # seconds from a session's first bytes, or its end, to its launch, which was written before
YOUNG = 1.0  # seconds: the age under which an idle connection's end counts as a failure to make it


@dataclass(eq=False, slots=True)
class Spoken:
    """A connection with its first bytes, or its end, before its launch."""

    stream: Stream
    since: float  # time.monotonic()
    lowered: int = 0  # by how much its end has lowered the capacity


class ClientPool(Pool):
    """The client's end: gives out the connection that a launch names.

    `wanted` is set whenever the filler may have work; `dialling` counts the connections being made.
    """

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int) -> None:
        super().__init__(log, stats, lowest, highest)
        self.wanted = Event()
        self.wanted.set()
        self.dialling = 0
        self._flushed = False
        self._died_young: set[str] = set()  # ended as soon as they were made, and by no visitor who left, so far
        self._expected: dict[str, Waiter] = {}
        self._reserved: dict[str, Stream] = {}  # launched, waiting for a slot
        self._spoken: dict[str, Spoken] = {}  # readable, waiting for their launch since then

    @property
    def missing(self) -> int:
        """How many connections to begin now."""
        return self.capacity - len(self) - self.dialling

    def is_unwanted(self) -> bool:
        """Whether the server has closed so many new connections at once that to make more of them has to wait.

        Counts anew from then on.
        """
        if len(self._died_young) < max(1, self.capacity):
            return False
        self._died_young.clear()
        return True

    def add(self, id: str, stream: Stream) -> None:
        if expected := self._expected.pop(id, None):
            self._count_new()
            expected.give(id, stream)
            self.wanted.set()
        else:
            super().add(id, stream)

    def begin_dial(self) -> None:
        """A connection is being made; `end_dial` follows, however that goes."""
        self.dialling += 1

    def end_dial(self) -> None:
        """A connection has been added, or could not be made."""
        self.dialling -= 1
        self.wanted.set()
        if not self.dialling:
            self._fail_claims()

    def _fail_claims(self) -> None:
        while self._expected:
            id, expected = self._expected.popitem()
            expected.fail(NoDataConnection(f"no data connection has the id {id}"))

    def end_interval(self) -> None:
        super().end_interval()
        limit = time.monotonic() - LAUNCH_WITHIN
        for id in [id for id, spoken in self._spoken.items() if spoken.since < limit]:
            self._spoken.pop(id).stream.close()
            self._died_young.discard(id)
        self.wanted.set()

    def flush(self, because: str) -> None:
        """Close all that is here, for good: no claim waits any more, also where a dial was ended before it began."""
        super().flush(because)
        self._flushed = True
        self._fail_claims()
        while self._spoken:
            self._spoken.popitem()[1].stream.close()
        while self._reserved:
            self._reserved.popitem()[1].close()

    def reserve(self, id: str) -> None:
        """Keep the connection of a launch that has been read until it is claimed, however long that takes."""
        if stream := self._find(id):
            self.drop(id)
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
        if not self.dialling or self._flushed or id in self._expected:
            raise NoDataConnection(f"no data connection has the id {id}")
        if not self._idle:
            self._find_empty()
        expected = self._expected[id] = Waiter()
        try:
            return expected.wait(timeout, f"no data connection had the id {id} within {timeout:g}s")[1]
        finally:
            if self._expected.get(id) is expected:
                del self._expected[id]

    def _find(self, id: str) -> Stream | None:
        if spoken := self._spoken.pop(id, None):
            # Its visitor had left at once, which says nothing of how many connections there should be.
            self.capacity = min(self.bounds[1], self.capacity + spoken.lowered)
            self.wanted.set()
            self._died_young.discard(id)
            return spoken.stream
        if idle := self._idle.get(id):
            return self._leave(idle)
        return None

    def _leave(self, idle: Idle) -> Stream:
        """Take a connection out of what is idle, and have it replaced."""
        stream = self._release(idle)
        if not self._idle:
            self._find_empty()
        self.wanted.set()
        return stream

    def _look(self, idle: Idle) -> None:
        super()._look(idle)
        self.wanted.set()

    def _readable(self, idle: Idle) -> None:
        state = idle.stream.peek()
        if state is None:
            return
        if old := self._spoken.pop(idle.id, None):  # its id was given again
            old.stream.close()
            self._died_young.discard(idle.id)
        spoken = self._spoken[idle.id] = Spoken(idle.stream, time.monotonic())
        if state:
            self._leave(idle)
        else:
            # The server has more than it needs: one less is made, until sessions come again.
            spoken.lowered = min(1, self.capacity - self.bounds[0])
            self.capacity -= spoken.lowered
            if spoken.since - idle.since < YOUNG:
                self._died_young.add(idle.id)
            self._release(idle)
        self._log.debug(
            "pool.early",
            "pool: %(id)s %(what)s",
            id=idle.id,
            what="has its first bytes" if state else "ended by the server",
        )
