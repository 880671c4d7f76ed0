"""The client's pool: data connections made in advance, each for the launch that names it.

The server gives a data connection its id, and when a visitor comes it names that id in a launch, on the control
connection. The two connections are independent: a launch can be read before its data connection is ready, and the
visitor's first bytes, or the end of its stream, can arrive before the launch. Each connection is in one state:

    dialling   being made; it has no id yet, so dials are only counted
    idle       ready for its launch, and watched
    early      its first bytes or its end came before its launch; not watched any more
    reserved   its launch has been read and waits for a slot (SEMAPHORE_LIMIT)
    claimed    owned by its launch handler; the pool has forgotten it
    closed     likewise, by the pool

    event                       caller            transition
    begin_dial                  data dialer       to dialling
    add                         data dialer       dialling to idle, or to claimed where a claim waits for its id
    end_dial                    data dialer       a dial is over, successful or not; after the last one no claim waits
    first bytes, end            event loop        idle to early
    reserve                     signal reader     early or idle to reserved
    drop                        signal reader     reserved to closed
    claim                       launch handler    reserved, early or idle to claimed; waits if there are only dials
    expire                      timer             early, for longer than LAUNCH_WITHIN, to closed
    close                       connection        idle, early and reserved to closed; no claim waits any more

Behind a proxy an idle connection becomes due when it has been idle for nearly as long as the proxy allows (`IdleCuts`).
It stays idle, and another one is dialled beside it.

A connection whose id the pool already has is closed by `add`. What leaves `idle` is replaced, so that the pool stays at
its capacity: `missing` says how many dials to begin. But all connections up to the claim are at most MAX_POOL_CAPACITY:
a server could otherwise take every descriptor, with one byte behind each id and no launch.

An end before the launch has two causes. A visitor left at once: its launch follows. Or the server closed a connection,
most often because the client makes more than it needs: no launch follows. So an end lowers the capacity by one, and a
launch that follows raises it again. Where connections end as soon as they are made, and without launches, more of them
are of no use: after as many as the capacity the dialer pauses (`should_pause`).

`ConnectionStates` makes the transitions, without I/O, and returns what must be closed. `ClientPool` calls it and then
does what follows: watch, unwatch, close, log, hand over to a claim that waits, wake the dialer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gevent.event import Event

from nodepass.errors import NoDataConnection
from nodepass.log import Limit, Log
from nodepass.net.pump import Steps
from nodepass.net.stream import Stream
from nodepass.outbound.idle_cuts import IdleCuts
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer
from nodepass.tunnel.pool import Capacity, Pool, Waiter

LAUNCH_WITHIN = 2.0  # seconds from a session's first bytes, or its end, to its launch, which was written before
LOOK_EVERY = LAUNCH_WITHIN / 8  # seconds between two looks for connections that have waited for longer
LOOK_FOR_DUE_EVERY = 1.0  # seconds
YOUNG = 1.0  # seconds: the age under which an idle connection's end counts as a failure to make it

OLD = 3  # heartbeats for which a connection must have been idle for its absence at the server to mean something,
IN_A_ROW = 3  # and in which the server must have had fewer
MAKE_UP = 8  # then at most one in so many of the capacity is dialled beyond it,
MAKE_UP_EVERY = 10.0  # seconds apart

S = TypeVar("S")
Closing = list[tuple[str, S]]  # connections, with their ids, that the caller must close


@dataclass(eq=False, slots=True)
class Early(Generic[S]):
    """A connection with its first bytes, or its end, before its launch."""

    stream: S
    since: float  # time.monotonic()
    lowered: int  # by how much its end lowered the capacity


class ConnectionStates(Generic[S]):
    """Which connection is in which state. No I/O: a stream is any object, and the time is an argument."""

    def __init__(self, lowest: int, highest: int, stats: Stats) -> None:
        self.capacity = Capacity(lowest, highest, stats)
        self.dialling = 0
        self.idle: dict[str, S] = {}
        self.early: dict[str, Early[S]] = {}
        self.reserved: dict[str, S] = {}
        self.extra = 0  # beyond the capacity, for idle ones that the server does not have
        self.due: dict[str, None] = {}  # idle ones that are about to end, so that others are dialled beside them
        self._closed_young: set[str] = (
            set()
        )  # ids of connections that ended soon after they were made, no launch so far

    @property
    def missing(self) -> int:
        """How many dials to begin: what the capacity lacks, as far as there is room for it."""
        ready = len(self.idle) + self.dialling
        room = self.capacity.highest - ready - len(self.early) - len(self.reserved)
        return min(self.capacity.size + self.extra + len(self.due) - ready, room)

    def __contains__(self, id: str) -> bool:
        return id in self.idle or id in self.early or id in self.reserved

    def add(self, id: str, stream: S) -> Closing[S]:
        """Dialling to idle; to closed where the id is taken: a replay must not throw out the real connection."""
        if id in self:
            return [(id, stream)]
        self.capacity.count_created()
        self.idle[id] = stream
        return []

    def become_early(self, id: str, has_bytes: bool, young: bool, now: float) -> None:
        """Idle to early: by its first bytes, or by its end, soon after it was made if `young`."""
        lowered = 0
        if id in self.due:
            del self.due[id]
        elif not has_bytes and self.extra:
            self.extra -= 1
        elif not has_bytes:
            lowered = min(1, self.capacity.size - self.capacity.lowest)
        self.early[id] = Early(self.idle.pop(id), now, lowered)
        self.capacity.size -= lowered
        if has_bytes:
            self._count_taken()
        elif young:
            self._closed_young.add(id)

    def reserve(self, id: str) -> S | None:
        """Early or idle to reserved; the connection, if there is one of this id."""
        stream = self._find(id)
        if stream is not None:
            self.reserved[id] = stream
        return stream

    def drop(self, id: str) -> Closing[S]:
        """Reserved to closed."""
        return _pop(self.reserved, id)

    def claim(self, id: str) -> S | None:
        """Reserved, early or idle to claimed; the connection, if there is one of this id."""
        return self.reserved.pop(id) if id in self.reserved else self._find(id)

    def count_found_empty(self) -> None:
        """A session found no idle connection."""
        if self.capacity.count_found_empty():
            self.capacity.end_interval()

    def expire(self, now: float) -> Closing[S]:
        """Early, without a launch for too long, to closed."""
        overdue = [id for id, early in self.early.items() if early.since < now - LAUNCH_WITHIN]
        return [(id, early.stream) for id in overdue if (early := self._leave_early(id))]

    def make_due(self, ids: Iterable[str]) -> None:
        """These idle ones are about to end. Their replacements show no need for a larger pool."""
        new = dict.fromkeys(id for id in ids if id not in self.due)
        self.due |= new
        self.capacity.created -= len(new)

    def should_pause(self) -> bool:
        """Whether as many connections as the capacity were closed young; the count starts again then."""
        if len(self._closed_young) < max(1, self.capacity.size):
            return False
        self._closed_young.clear()
        return True

    def forget(self, id: str, stream: S) -> None:
        """Idle or early to closed, by the caller: a bug was met on it."""
        if self.idle.get(id) is stream:
            del self.idle[id]
            self.due.pop(id, None)
        elif (early := self.early.get(id)) and early.stream is stream:
            self._leave_early(id)

    def close(self) -> Closing[S]:
        """All to closed. Nothing is dialled any more: a dial that was ended before it began has no `end_dial`."""
        early = ((id, early.stream) for id, early in self.early.items())
        closing = [*self.idle.items(), *early, *self.reserved.items()]
        for states in (self.idle, self.early, self.reserved, self.due):
            states.clear()
        self.dialling = 0
        return closing

    def _find(self, id: str) -> S | None:
        """Take a connection whose launch has come out of early or idle."""
        if early := self._leave_early(id):
            self.capacity.size = min(self.capacity.highest, self.capacity.size + early.lowered)
            return early.stream
        if id not in self.idle:
            return None
        stream = self.idle.pop(id)
        self.due.pop(id, None)
        self._count_taken()
        return stream

    def _leave_early(self, id: str) -> Early[S] | None:
        self._closed_young.discard(id)
        return self.early.pop(id, None)

    def _count_taken(self) -> None:
        """A session has taken an idle connection."""
        if not self.idle:
            self.count_found_empty()


def _pop(states: dict[str, S], id: str) -> Closing[S]:
    return [(id, states.pop(id))] if id in states else []


class Comparison:
    """Finds out from heartbeats that the server has fewer idle connections than this end.

    One that only this end has is dead, since a firewall forgot it for example, and the kernel finds that in a minute at
    best. It cannot be told which one it is, and a close could cross a launch: so others are dialled beside them.
    """

    def __init__(self) -> None:
        self._before: deque[frozenset[str]] = deque(maxlen=OLD)  # what was idle at the last heartbeats
        self._in_a_row = 0
        self._next = 0.0  # time.monotonic()

    def count_missing(self, idle: Iterable[str], known: int, capacity: int, now: float) -> int:
        """How many to dial beyond the capacity, given the ids that are idle here and the server's number of them."""
        present = frozenset(idle)
        old = len(present & self._before[0]) if len(self._before) == OLD else 0
        self._before.append(present)
        self._in_a_row = self._in_a_row + 1 if old > known else 0
        if self._in_a_row < IN_A_ROW or now < self._next:
            return 0
        self._in_a_row, self._next = 0, now + MAKE_UP_EVERY
        return min(old - known, max(1, capacity // MAKE_UP))


class ClientPool(Pool):
    """The pool as the rest of the client sees it; `wanted` is set while a connection is missing."""

    def __init__(self, log: Log, stats: Stats, lowest: int, highest: int, cuts: IdleCuts | None = None) -> None:
        """`cuts`: what is known of the proxy, if there is one."""
        self._states: ConnectionStates[Stream] = ConnectionStates(lowest, highest, stats)
        super().__init__(self._states.capacity, self._states.idle, log, stats)
        self._waiting: dict[str, Waiter] = {}  # claims, by the id that they wait for
        self._comparison = Comparison()
        self._timer = IdleTimer(LOOK_EVERY, self._expire)
        self._cuts = cuts or IdleCuts(has_proxy=False)
        self._cut_timer = IdleTimer(LOOK_FOR_DUE_EVERY, self._replace_due)
        self.wanted = Event()
        self.wanted.set()

    @property
    def missing(self) -> int:
        """How many dials to begin now."""
        return self._states.missing

    def should_pause(self) -> bool:
        """Whether the server closed so many new connections that the dialer must pause; counts from 0 again then."""
        return self._states.should_pause()

    def begin_dial(self) -> None:
        """A connection is being made; `end_dial` follows, however that goes."""
        self._states.dialling += 1

    @property
    def is_lacking(self) -> bool:
        """Whether none is idle, and the last dial, if there was one, has failed."""
        return not self._idle and not self._is_supplied

    def note_failed_dial(self) -> None:
        """A connection could not be made."""
        self._is_supplied = False

    def add(self, id: str, stream: Stream) -> None:
        """Take over a connection that is ready for its launch."""
        self._is_supplied = True
        if waiter := self._waiting.pop(id, None):
            self._states.capacity.count_created()
            waiter.give(id, stream)
        else:
            refused = self._states.add(id, stream)
            if not refused:
                now = time.monotonic()
                if self._cuts.begin(id, now):
                    self._cut_timer.start()
                self._start_watching(id, stream, self._watch(id, stream, now))
            self._finish(refused, "duplicate", "its id is another connection's")

    def end_dial(self) -> None:
        """A connection has been added, or could not be made."""
        self._states.dialling -= 1
        if not self._states.dialling:
            self._fail_claims()
        self._finish()

    def reserve(self, id: str) -> None:
        """Keep the connection of a launch that has been read until it is claimed, however long that takes."""
        stream = self._states.reserve(id)
        if stream is not None:
            stream.unwatch()
            self._finish()

    def drop(self, id: str) -> None:
        """Close the connection of a launch that cannot be served, so that the server's visitor is not left waiting."""
        self._finish(self._states.drop(id), "dropped", "its launch was dropped")

    def claim(self, id: str, timeout: float) -> Stream:
        """The connection of this id; it is the caller's now. Raises NoDataConnection where it is not known.

        The launch can overtake the id, which the server wrote just before on another connection: while a connection is
        being made, wait for it, `timeout` seconds at most.
        """
        if (stream := self._states.claim(id)) is not None:
            stream.unwatch()
            self._finish()
            return stream
        if not self._states.dialling or id in self._waiting:
            raise NoDataConnection(f"unknown data connection {id}")
        if not self._idle:
            self._states.count_found_empty()
            self._finish()
        waiter = self._waiting[id] = Waiter()
        try:
            return waiter.wait(timeout, f"no data connection {id} within {timeout:g}s")[1]
        finally:
            if self._waiting.get(id) is waiter:
                del self._waiting[id]

    def compare(self, known: int) -> None:
        """A heartbeat says how many idle connections the server has."""
        states = self._states
        missing = self._comparison.count_missing(self._idle, known, self.capacity, time.monotonic())
        if missing:
            states.extra = min(states.extra + missing, states.capacity.highest - self.capacity)
            words = "pool: the server lacks %(missing)d idle connections; dialling as many"
            self._log.info("pool.dead_connections", words, Limit(burst=1), missing=missing)
            self._finish()
        elif known >= len(self._idle):
            states.extra = 0

    def end_interval(self) -> None:
        """Re-evaluate the capacity."""
        self._states.capacity.end_interval()
        self._replace_due()

    def limit(self, lowest: int, highest: int) -> None:
        """Keep the capacity within other limits; what is beyond them is used up."""
        capacity = self._states.capacity
        capacity.lowest, capacity.highest = lowest, highest
        capacity.size = max(lowest, min(capacity.size, highest))
        self._finish()

    def close(self, because: str) -> None:
        """Close everything; the dialer has been stopped."""
        self._timer.stop()
        self._cut_timer.stop()
        self._finish(self._states.close(), "flushed", because)
        self._fail_claims()

    def _watch(self, id: str, stream: Stream, added: float) -> Steps:
        """Wait for the first bytes or the end of an idle connection. The event loop resumes this; `yield` waits."""
        try:
            while (has_bytes := stream.peek()) is None:  # under TLS, what arrived may be no data
                yield
            stream.unwatch()
            self._become_early(id, has_bytes, added)
        except Exception as error:  # noqa: BLE001  # the loop could not report it
            self._abort_after_bug(id, stream, error)
            self._finish()
        yield  # not resumed: the stream is not watched any more

    def _become_early(self, id: str, has_bytes: bool, added: float) -> None:
        now = time.monotonic()
        if not has_bytes and id not in self._states.due:
            self._cuts.end(id, now, was_last=len(self._idle) == 1)
        self._states.become_early(id, has_bytes, now - added < YOUNG, now)
        words = "pool: %(id)s received bytes before its launch" if has_bytes else "pool: %(id)s closed by the server"
        self._log.debug("pool.early", words, id=id, ended=not has_bytes)
        self._timer.start()
        self._finish()

    def _expire(self) -> bool:
        """Close what has waited too long for its launch; whether others wait."""
        overdue = self._states.expire(time.monotonic())
        if self._cuts.learn(id for id, _ in overdue):
            words = "pool: the proxy ends connections that are idle for %(seconds).3gs; replacing them before"
            self._log.info("pool.idle_cut", words, Limit(burst=1), seconds=self._cuts.limit)
            self._cut_timer.start()
        self._finish(overdue, "overdue", f"no launch for it within {LAUNCH_WITHIN:g}s")
        return bool(self._states.early)

    def _replace_due(self) -> bool:
        """Have the connections replaced that the proxy is about to end; whether others are idle."""
        self._states.make_due(self._cuts.find_due(self._idle, time.monotonic()))
        self._finish()
        return bool(self._idle)

    def _forget(self, id: str, stream: Stream) -> None:
        self._states.forget(id, stream)

    def _fail_claims(self) -> None:
        while self._waiting:
            id, waiter = self._waiting.popitem()
            waiter.fail(NoDataConnection(f"unknown data connection {id}"))

    def _finish(self, closing: Closing[Stream] | tuple[()] = (), reason: str = "", words: str = "") -> None:
        """The I/O after a transition: close what it returned, log a new capacity, wake the dialer."""
        for id, stream in closing:
            self._close(id, stream, reason, words)
        self._log_resize()
        if self._states.missing > 0:
            self.wanted.set()
