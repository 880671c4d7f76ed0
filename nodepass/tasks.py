"""Greenlets and timers by what they are for: task groups, worker pools and idle timers.

Every greenlet of the program is made here (but a lane's writer, whose crash its lane raises), so that none can fail
silently: a crash is a bug, it is logged with its traceback and counted, and the exit status shows it (see `daemon`).

A `TaskGroup` is for the few long-lived loops of one owner. Its children have names; a crash propagates to the owner by
`on_crash`, which decides how much ends with it. A `WorkerPool` is for the many short pieces of work that a tunnel has:
each takes one of a limited number of slots, and finished greenlets are used again. An `IdleTimer` is for upkeep that is
only needed while there is something to look at: it stops itself, so that an idle process never wakes up.

Nothing here knows what the work is. Owners end their groups and pools by `join` and `kill`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from gevent import Greenlet, GreenletExit, get_hub, killall
from gevent.event import Event
from gevent.lock import Semaphore
from gevent.pool import Pool

from nodepass.log import Limit, Log
from nodepass.stats import Stats

IDLE_AT_MOST = 64  # workers without work; each holds about 10 KiB
IDLE_TIME = 0.25  # seconds; workers that were idle throughout are released


def report_bug(where: str, error: BaseException, log: Log, stats: Stats) -> None:
    """Log an unexpected exception with its traceback, and count it."""
    stats.trouble["bugs"] += 1
    log.error("bug.caught", "%(where)s crashed (bug)", Limit(type(error).__name__), error, where=where)


def find_ended(loops: Iterable[Greenlet[..., None]]) -> str:
    """For an operator: which of these loops has ended although they never should; empty while all run."""
    return next((f'the loop "{each.name}" has ended' for each in loops if each.dead), "")


class TaskGroup:
    """The greenlets of one purpose. A crash is logged, counted, and passed to `on_crash`; the others go on."""

    def __init__(self, log: Log, stats: Stats, on_crash: Callable[[Exception], object] | None = None) -> None:
        self._log = log
        self._stats = stats
        self._pool = Pool()
        self._on_crash = on_crash

    def __len__(self) -> int:
        return len(self._pool)

    def spawn(self, name: str, work: Callable[..., object], *args: object) -> Greenlet[..., None]:
        """Run `work(*args)` in a greenlet of this name."""
        greenlet: Greenlet[..., None] = Greenlet(self._run, name, work, *args)
        greenlet.name = name
        self._pool.start(greenlet)  # type: ignore[arg-type]  # the stubs want no parameters
        return greenlet

    def _run(self, name: str, work: Callable[..., object], *args: object) -> None:
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001  # a bug, which must reach the owner
            report_bug(name, error, self._log, self._stats)
            if self._on_crash:
                self._on_crash(error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds until all have ended; whether they have."""
        return bool(self._pool.join(timeout))

    def kill(self) -> int:
        """End those that still run, and wait until they have; how many they were."""
        running = len(self._pool)
        self._pool.kill()
        return running


class IdleTimer:
    """Calls `look` every `period` seconds from `start` on, until it returns False.

    The event loop calls it, so it must not wait. If it raises, the hub reports the bug (see `daemon`) and the timer
    goes on: one failed look must not end the upkeep of everything else.
    """

    __slots__ = ("_look", "_timer", "period")

    def __init__(self, period: float, look: Callable[[], bool]) -> None:
        self.period = period
        self._look = look
        self._timer: Any = None  # gevent's, which has no type

    @property
    def active(self) -> bool:
        """Whether it runs."""
        return self._timer is not None

    def start(self) -> None:
        """Run, unless it runs already; the first look is one period from now."""
        if self._timer is None:
            self._timer = get_hub().loop.timer(self.period, self.period)
            self._timer.start(self._run)

    def stop(self) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _run(self) -> None:
        if not self._look():
            self.stop()


class WorkerPool:
    """Greenlets for many short pieces of work, used again: a new one costs 12 microseconds, an idle one 1.

    (Python maps and unmaps a stack of frames for each.) `spawn` takes a slot. It is released when the work has ended in
    whatever way, even if it was killed before it first ran. A crash is logged and counted.
    """

    def __init__(self, log: Log, stats: Stats, limit: int) -> None:
        self._log = log
        self._stats = stats
        self._slots = Semaphore(limit)
        self._busy: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._surplus = 0  # the fewest that were idle at any time since the last look
        self._timer = IdleTimer(IDLE_TIME, self._release_surplus)
        self._all_done = Event()
        self._all_done.set()

    def __len__(self) -> int:
        return len(self._busy)

    def wait_for_slot(self) -> None:
        """Return when `spawn` would not wait."""
        if self._slots.locked():
            self._slots.wait()

    def full(self) -> bool:
        """Whether `spawn` would wait."""
        return self._slots.locked()

    def spawn(self, name: str, work: Callable[..., object], *args: object) -> None:
        """Run `work(*args)` in a greenlet of this name; waits while every slot is taken."""
        self._slots.acquire()
        if not self._busy:
            self._all_done.clear()
        if self._idle:
            worker = self._idle.pop()
            self._surplus = min(self._surplus, len(self._idle))
        else:
            worker = _Worker(self)
        self._busy.add(worker)
        worker.begin(name, work, args)

    def join(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds until all work has ended; whether it has."""
        return self._all_done.wait(timeout)

    def kill(self) -> int:
        """End all work that still runs, and wait until it has; how many pieces it was."""
        running = len(self._busy)
        killall([*self._busy, *self._idle])
        return running

    def _crashed(self, worker: _Worker, error: Exception) -> None:
        report_bug(str(worker.name), error, self._log, self._stats)

    def _finished(self, worker: _Worker) -> bool:
        """A worker's work has ended; whether to wait for more."""
        self._free_slot(worker)
        if len(self._idle) >= IDLE_AT_MOST:
            return False
        self._idle.append(worker)
        self._timer.start()
        return True

    def _ended(self, worker: _Worker) -> None:
        """A worker has ended, perhaps before it first ran."""
        self._free_slot(worker)
        if worker in self._idle:
            self._idle.remove(worker)

    def _free_slot(self, worker: _Worker) -> None:
        if worker in self._busy:
            self._busy.remove(worker)
            self._slots.release()
            if not self._busy:
                self._all_done.set()

    def _release_surplus(self) -> bool:
        """End as many workers as were idle since the last look; whether others are idle."""
        released, self._idle = self._idle[: self._surplus], self._idle[self._surplus :]
        for worker in released:
            worker.release()
        self._surplus = len(self._idle)
        return bool(self._idle)


class _Worker(Greenlet):  # type: ignore[type-arg]  # it takes none at run time
    """One greenlet of a pool: works, idles until `begin` is called again, works."""

    def __init__(self, pool: WorkerPool) -> None:
        super().__init__()
        self._pool = pool
        self._work: tuple[Callable[..., object], tuple[object, ...]] | None = None
        self._staying = True
        self.rawlink(pool._ended)

    def begin(self, name: str, work: Callable[..., object], args: tuple[object, ...]) -> None:
        """Start this work in the next turn of the event loop."""
        self.name = name
        self._work = work, args
        if self.started:
            self.loop.run_callback(self.switch)
        else:
            self.start()

    def release(self) -> None:
        """End it; it is idle."""
        self._staying = False
        self.loop.run_callback(self.switch)

    def _run(self) -> None:
        # A GreenletExit kept as this greenlet's result would keep its traceback, and so all of this, until a
        # garbage collection.
        with contextlib.suppress(GreenletExit):
            self._work_until_released()

    def _work_until_released(self) -> None:
        hub = get_hub()
        while self._staying:
            if not self._work:
                hub.switch()
                continue
            (work, args), self._work = self._work, None
            try:
                work(*args)
            except Exception as error:  # noqa: BLE001  # a bug, which ends this piece of work only
                self._pool._crashed(self, error)
            del work, args  # an idle worker keeps nothing alive
            self._staying = self._pool._finished(self)
