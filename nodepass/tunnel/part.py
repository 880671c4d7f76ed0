"""What each end is made of: parts that start, stop and close in one order, so that a shutdown is a loop over parts.

A part owns its loops, the greenlets that end only with it: a crash in one fails the whole end, and one that has ended
is why that end is unhealthy. `server` and `client` make their parts; what each does is in its own module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gevent import Greenlet, killall

from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, WorkerPool, find_ended
from nodepass.tunnel.rates import Rates
from nodepass.tunnel.traffic import Meter


class Records(NamedTuple):
    """What is kept about one tunnel. It outlives the tunnel's end, so that a new one after a crash goes on with it."""

    log: Log
    stats: Stats
    access: Callable[[str], object] | None = None  # writes a line of the access log, where there is one
    meter: Meter | None = None  # where TRAFFIC_LIMIT is set


@dataclass(frozen=True)
class Common:
    """What the parts of one end share."""

    settings: Settings
    log: Log
    stats: Stats
    loops: TaskGroup  # a crash in it fails the end
    access: Callable[[str], object] | None = None  # writes a line of the access log, where there is one
    rates: Rates = Rates()
    meter: Meter | None = None  # where TRAFFIC_LIMIT is set


class Part:
    """One part of an end: `start` is called at most once, then perhaps `stop`, then `close` in any case."""

    def __init__(self, common: Common) -> None:
        self.common = common
        self._settings = common.settings
        self._log = common.log
        self._stats = common.stats
        self._group = common.loops
        self._loops: list[Greenlet[..., None]] = []

    def start(self) -> None:
        """Begin to work."""

    def stop(self, timeout: float) -> None:
        """Begin nothing new, within `timeout` seconds; what runs goes on until `close`."""

    def end_accepting(self) -> None:
        """Leave the listeners to another process, which has them, too; what came by them goes on."""

    def close(self) -> None:
        """End everything at once."""
        self._end_loops()

    def find_ended(self) -> str:
        """Which loop has ended although the part has not; empty while all run."""
        return find_ended(self._loops)

    def _start_loop(self, name: str, work: Callable[..., object], *args: object) -> Greenlet[..., None]:
        self._loops.append(self._group.spawn(name, work, *args))
        return self._loops[-1]

    def _end_loops(self) -> None:
        loops, self._loops = self._loops, []
        killall(loops)


class Loop(Part):
    """A part that is one loop and nothing else."""

    def __init__(self, common: Common, name: str, work: Callable[[], object]) -> None:
        super().__init__(common)
        self._name = name
        self._work = work

    def start(self) -> None:
        self._start_loop(self._name, self._work)


def stop_parts(parts: Sequence[Part], sessions: WorkerPool, timeout: float) -> int:
    """Stop parts in order, let sessions end within `timeout` seconds in all, cut the rest; how many those were."""
    deadline = time.monotonic() + timeout
    for part in parts:
        part.stop(max(0.0, deadline - time.monotonic()))
    sessions.join(max(0.0, deadline - time.monotonic()))
    return sessions.kill()
