"""Crews: named greenlets that belong together, with a limit on their number, and whose crash reaches their owner.

No greenlet of the program is made elsewhere (but a lane's writer, whose crash its lane raises), so none dies in
silence.
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

RESTING_AT_MOST = 64  # workers without work; each holds about 10 KiB
REST = 0.25  # seconds: as many workers as nobody needed for so long are dismissed


def report_bug(what: str, error: BaseException, log: Log, stats: Stats) -> None:
    """Log with its traceback what nobody expected, and count it: the exit status tells of it, too (see `daemon`)."""
    stats.trouble["bugs"] += 1
    log.error("bug.caught", "%(where)s crashed, this is a bug", Limit(what), error, where=what)


def find_ended(loops: Iterable[Greenlet[..., None]]) -> str:
    """Which of the greenlets that never end has ended all the same, for an operator; empty while all run."""
    return next((f"the loop «{each.name}» has ended" for each in loops if each.dead), "")


class TaskGroup:
    """The greenlets of one purpose. A crash is logged with its traceback, counted, and handed to `on_crash`."""

    def __init__(self, log: Log, stats: Stats, on_crash: Callable[[Exception], object] | None = None) -> None:
        self._log = log
        self._stats = stats
        self._pool = Pool()
        self._on_crash = on_crash

    def __len__(self) -> int:
        return len(self._pool)

    def spawn(self, name: str, work: Callable[..., object], *args: object) -> Greenlet[..., None]:
        """Run `work(*args)` in a greenlet of this name."""
        greenlet: Greenlet[..., None] = Greenlet(self._guarded, name, work, *args)
        greenlet.name = name
        self._pool.start(greenlet)  # type: ignore[arg-type]  # the stubs want no parameters
        return greenlet

    def _guarded(self, name: str, work: Callable[..., object], *args: object) -> None:
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001  # whatever it is, its owner must hear of it
            report_bug(name, error, self._log, self._stats)
            if self._on_crash:
                self._on_crash(error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for all to end by themselves, at most `timeout` seconds; whether they did."""
        return bool(self._pool.join(timeout))

    def kill(self) -> int:
        """End all that still run, wait until they have, and say how many they were."""
        running = len(self._pool)
        self._pool.kill()
        return running


class IdleTimer:
    """A timer of the event loop that runs only while there is something to look at: idle, it costs no wake-up.

    `look` is called every `period` seconds from `start` on, until it returns False. The loop calls it, so it must not
    wait.
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
    """Greenlets for many short pieces of work, used again: a new one costs 12 microseconds, an old one 1.

    (Python maps and unmaps a stack of frames for each.) A place is taken by `spawn` and given back when its work has
    ended, however it ended, even killed before it first ran. A crash is logged with its traceback, and counted.
    """

    def __init__(self, log: Log, stats: Stats, limit: int) -> None:
        self._log = log
        self._stats = stats
        self._places = Semaphore(limit)
        self._busy: set[_Worker] = set()
        self._resting: list[_Worker] = []
        self._surplus = 0  # fewest that rested at any time since the last look
        self._timer = IdleTimer(REST, self._dismiss_surplus)
        self._all_done = Event()
        self._all_done.set()

    def __len__(self) -> int:
        return len(self._busy)

    def wait_for_place(self) -> None:
        """Return when `spawn` would not have to wait."""
        if self._places.locked():
            self._places.wait()

    def full(self) -> bool:
        """Whether `spawn` would have to wait now."""
        return self._places.locked()

    def spawn(self, name: str, work: Callable[..., object], *args: object) -> None:
        """Run `work(*args)` in a greenlet of this name; waits while so many as the limit are at work."""
        self._places.acquire()
        if not self._busy:
            self._all_done.clear()
        if self._resting:
            worker = self._resting.pop()
            self._surplus = min(self._surplus, len(self._resting))
        else:
            worker = _Worker(self._report, self._finish, self._forget)
        self._busy.add(worker)
        worker.begin(name, work, args)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for all to end by themselves, at most `timeout` seconds; whether they did."""
        return self._all_done.wait(timeout)

    def kill(self) -> int:
        """End all that still run, wait until they have, and say how many they were."""
        running = len(self._busy)
        killall([*self._busy, *self._resting])
        return running

    def _report(self, name: str, error: Exception) -> None:
        report_bug(name, error, self._log, self._stats)

    def _finish(self, worker: _Worker) -> bool:
        """A worker's work has ended; whether it is to stay for more."""
        self._leave(worker)
        if len(self._resting) >= RESTING_AT_MOST:
            return False
        self._resting.append(worker)
        self._timer.start()
        return True

    def _dismiss_surplus(self) -> bool:
        """Whether workers still rest."""
        dismissed, self._resting = self._resting[: self._surplus], self._resting[self._surplus :]
        for worker in dismissed:
            worker.dismiss()
        self._surplus = len(self._resting)
        return bool(self._resting)

    def _forget(self, worker: _Worker) -> None:
        """A worker has ended, perhaps before it could begin."""
        self._leave(worker)
        if worker in self._resting:
            self._resting.remove(worker)

    def _leave(self, worker: _Worker) -> None:
        if worker in self._busy:
            self._busy.remove(worker)
            self._places.release()
            if not self._busy:
                self._all_done.set()


class _Worker(Greenlet):  # type: ignore[type-arg]  # it takes none at run time
    """One greenlet: works, rests until it is called again, works."""

    def __init__(
        self,
        report: Callable[[str, Exception], None],
        finish: Callable[[_Worker], bool],
        forget: Callable[[_Worker], None],
    ) -> None:
        super().__init__()
        self._report = report
        self._finish = finish
        self._work: tuple[Callable[..., object], tuple[object, ...]] | None = None
        self._stay = True
        self.rawlink(forget)

    def begin(self, name: str, work: Callable[..., object], args: tuple[object, ...]) -> None:
        """Have it work soon."""
        self.name = name
        self._work = work, args
        if self.started:
            self.loop.run_callback(self.switch)
        else:
            self.start()

    def dismiss(self) -> None:
        """End it; it is at rest."""
        self._stay = False
        self.loop.run_callback(self.switch)

    def _run(self) -> None:
        # Killed: kept as this greenlet's result, its traceback would keep all of this until a garbage collection.
        with contextlib.suppress(GreenletExit):
            self._work_until_dismissed()

    def _work_until_dismissed(self) -> None:
        hub = get_hub()
        while self._stay:
            if not self._work:
                hub.switch()
                continue
            (work, args), self._work = self._work, None
            try:
                work(*args)
            except Exception as error:  # noqa: BLE001  # whatever it is, the log must have it
                self._report(str(self.name), error)
            del work, args  # a resting worker keeps nothing alive
            self._stay = self._finish(self)
