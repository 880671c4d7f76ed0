"""TRAFFIC_LIMIT: how much payload a tunnel has moved in this day or month, and whether there is any left.

The counters of `stats` are what is counted, both directions and protocols, once a second and whenever a new session
asks; so the bytes cost nothing here. Days and months are those of the local time (TZ). Each has its own count: a clock
that is set back to the month before goes on with that month's, and forth again with the later one's, so that no jump
loses a count or makes a second one. `daemon` makes one `Meter` for a tunnel, which outlives it; `visitors.policy` and
the client ask it; `traffic_file` keeps the counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import gevent
from gevent import get_hub

from nodepass.config.kinds import TrafficLimit
from nodepass.errors import reason
from nodepass.log import Limit, Log
from nodepass.stats import Stats
from nodepass.tunnel.traffic_file import Counts, TrafficFile

INTERVAL = 1.0  # seconds between two counts, and between two writes
WARN_AT = 80  # percent
KEPT = 12  # days or months that the file has
SAVE_WITHIN = 2.0  # seconds for the disk to take a count, at the stop
REPEAT = Limit(seconds=60.0, burst=1)

_FORMATS = {"day": "%Y-%m-%d", "month": "%Y-%m"}


def period_at(seconds: float, unit: str) -> str:
    """The day or month of a Unix time, in local time: `2026-03-01` or `2026-03`."""
    return time.strftime(_FORMATS[unit], time.localtime(seconds))


class Meter:
    """The traffic of one tunnel."""

    def __init__(self, limit: TrafficLimit, file: TrafficFile, log: Log, stats: Stats) -> None:
        self.limit = limit
        self._file = file
        self._log = log
        self._stats = stats
        self._counts = file.load()  # bytes, by period
        self._saved = dict(self._counts)
        self._added = 0  # bytes that the process before has moved since this one began
        self._told = 0  # bytes of `_moved` that the next process has been told
        self._is_kept = True  # whether this process is the one that writes the file
        self._seen = self._moved()  # bytes that are counted
        self._said = ("", 0)  # the period, and the percentage that the log has
        self._saving: Any = None  # what a thread writes, which has no type

    @property
    def used(self) -> int:
        """Bytes of the present period."""
        return self._count()[1]

    @property
    def is_used_up(self) -> bool:
        """Whether new visitors must be refused."""
        return self._count()[1] >= self.limit.bytes

    def run(self) -> None:
        """Count and write until killed, and then once more."""
        try:
            while True:
                self._report()
                gevent.sleep(INTERVAL)
                self._save()
        finally:
            self._wait_until_saved()
            with contextlib.suppress(TimeoutError), gevent.Timeout(SAVE_WITHIN, TimeoutError()):
                self._save()

    # Where a new process takes over

    @property
    def path(self) -> str:
        """Of the file."""
        return self._file.path

    @property
    def lock(self) -> int | None:
        """The descriptor of the file's lock, None where there could be none."""
        return self._file.lock

    def hand_over(self) -> Counts:
        """Write no more, and return the counts: from now on `take_moved` says what the next process must add."""
        self._is_kept = False
        self._wait_until_saved()
        self._count()
        self._told = self._moved()
        return dict(self._counts)

    def keep(self) -> None:
        """Write again: there is no next process after all."""
        self._is_kept = True

    def take_moved(self) -> int:
        """The bytes since the last time."""
        before, self._told = self._told, self._moved()
        return self._told - before

    def take_over(self, counts: Mapping[str, int]) -> None:
        """Go on with the counts of the process before; the file may lack what it has counted last."""
        self._counts = dict(counts)

    def add(self, moved: int) -> None:
        """Count bytes that a session of the process before has moved."""
        self._added += moved

    def _moved(self) -> int:
        return self._stats.bytes_up + self._stats.bytes_down + self._added

    def _count(self) -> tuple[str, int]:
        """The present period, and its bytes up to now."""
        period, moved = period_at(time.time(), self.limit.unit), self._moved()
        used = self._counts.get(period, 0)
        if moved != self._seen:
            self._counts[period] = used = used + moved - self._seen
            self._seen = moved
            self._forget(period)
        return period, used

    def _forget(self, present: str) -> None:
        """Keep the counts of a few periods, the latest and the present one."""
        while len(self._counts) > KEPT:
            del self._counts[min(each for each in self._counts if each != present)]

    def _report(self) -> None:
        """Log once that little is left, that nothing is, and that there is some again."""
        period, used = self._count()
        before, said = self._said
        percent = used * 100 // self.limit.bytes
        level = 100 if percent >= 100 else WARN_AT if percent >= WARN_AT else 0
        if period != before:
            if said >= 100 > level:
                words = "a new %(unit)s has begun: visitors are served again"
                self._log.info("traffic.renewed", words, unit=self.limit.unit)
            said = 0
        text, unit = str(self.limit), self.limit.unit
        if level == 100 > said:
            words = (
                "TRAFFIC_LIMIT=%(traffic_limit)s is used up: new visitors are refused until the next %(unit)s begins"
            )
            self._log.warning("traffic.used_up", words, traffic_limit=text, used=used, unit=unit)
        elif level > said:
            words = "%(percent)d %% of TRAFFIC_LIMIT=%(traffic_limit)s are used"
            self._log.warning("traffic.nearly_used", words, percent=percent, traffic_limit=text, used=used)
        self._said = period, max(level, said)

    def _wait_until_saved(self) -> None:
        """Return when no thread writes: two would write into one new file."""
        with contextlib.suppress(TimeoutError), gevent.Timeout(SAVE_WITHIN, TimeoutError()):
            if self._saving is not None:
                self._saving.wait()

    def _save(self) -> None:
        """Have a thread write what has changed; a disk that does not take it is logged, and asked again."""
        self._count()
        if not self._is_kept or self._counts == self._saved:
            return
        counts = dict(self._counts)
        self._saving = get_hub().threadpool.spawn(self._file.save, counts)
        if error := self._saving.get():
            words = "cannot write %(file)s: %(error)s; the traffic is counted in memory meanwhile"
            self._log.error("traffic.write_failed", words, REPEAT, file=self._file.path, error=reason(error))
        else:
            self._saved = counts
