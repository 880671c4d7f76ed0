"""What processes hold: memory, descriptors, greenlets; and whether it is more and more."""

from __future__ import annotations

import re
import signal
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from tests.soak.pairs import Run
from tests.support.process import Nodepass
from tests.support.sockets import until

SETTLED = 2.5
"""Seconds without a change after which a number of descriptors is taken for that of an idle process."""

BACK_WITHIN = 30.0
"""Seconds for an idle process to return to its base line."""

WARM_UP = 1 / 3
"""The part of a process's life in which its memory may grow."""

FEWEST = 4
"""Samples after the warm-up that a slope is made of, at least."""

FLAT = 64.0
"""KiB a minute: what a process's memory may grow by after its warm-up, beside FLUCTUATION."""

FLUCTUATION = 1024.0
"""KiB that samples may differ by without any growth: the allocator keeps and gives back whole arenas."""


def anonymous_memory(pid: int) -> int:
    """KiB that the process has to itself: pages of files come and go with every other Python on the machine."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found, "no RssAnon in /proc/PID/status"
    return int(found[1])


def count_greenlets(process: Nodepass) -> int:
    """How many greenlets there are, asked by SIGUSR1; what it writes is left out of the log that is looked at."""
    mark = process.mark()
    process.send(signal.SIGUSR1)
    process.wait_for(r"\* Greenlets", after=mark)
    process.send(signal.SIGHUP)  # its line comes behind the whole dump
    process.wait_for("SIGHUP: looking at the certificate files", after=mark)
    return len(process.find(r"\+--- <(?!.*; finished)", after=mark))  # one that has finished is not collected yet


@dataclass
class Slope:
    """A straight line through a run's samples."""

    run: Run
    minutes: float
    kib_per_minute: float

    @property
    def is_flat(self) -> bool:
        return self.kib_per_minute * self.minutes <= FLUCTUATION + FLAT * self.minutes

    def __str__(self) -> str:
        return (
            f"{self.run.kind}: {self.kib_per_minute:+.1f} KiB a minute over the last {self.minutes:.1f} minutes;"
            f" MiB: {' '.join(f'{kib / 1024:.1f}' for _, kib in self.run.memory)}"
        )


def slope(run: Run) -> Slope | None:
    """The slope after the warm-up, by least squares; None where there are too few samples."""
    points = run.memory[int(len(run.memory) * WARM_UP) :]
    if len(points) < FEWEST:
        return None
    minutes = [(moment - points[0][0]) / 60 for moment, _ in points]
    mean_x, mean_y = sum(minutes) / len(points), sum(kib for _, kib in points) / len(points)
    above = sum((x - mean_x) * (kib - mean_y) for x, (_, kib) in zip(minutes, points, strict=True))
    below = sum((x - mean_x) ** 2 for x in minutes)
    return Slope(run, minutes[-1], above / below)


class BaseLines:
    """The least that an idle process of each kind has been seen to hold; every later one must return to it."""

    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}
        self.greenlets: dict[str, int] = {}
        self.seen: defaultdict[str, int] = defaultdict(int)

    def check(self, run: Run) -> list[str]:
        """What is wrong with an idle process; its memory is noted."""
        found = []
        try:
            self._settle(run)
        except AssertionError:
            now = run.process.count_descriptors()
            found.append(f"{run.kind} holds {now} descriptors when idle, not {self.descriptors.get(run.kind)}")
        run.memory.append((time.monotonic(), anonymous_memory(run.process.pid)))
        self.seen[run.kind] += 1
        return found

    def check_greenlets(self, run: Run) -> list[str]:
        """What is wrong with the greenlets of an idle process."""
        base = self.greenlets.get(run.kind)
        counts = [count_greenlets(run.process)]
        deadline = time.monotonic() + BACK_WITHIN
        while base is not None and counts[-1] > base and time.monotonic() < deadline:
            time.sleep(1)
            counts.append(count_greenlets(run.process))
        run.read = run.process.mark()
        self.greenlets[run.kind] = min(counts[-1], base or counts[-1])
        if base is not None and counts[-1] > base:
            return [f"{run.kind} has {counts[-1]} greenlets when idle, not {base}"]
        return []

    def _settle(self, run: Run) -> None:
        process = run.process
        base = self.descriptors.get(run.kind)
        if base is not None:
            until(lambda: process.count_descriptors() <= base, BACK_WITHIN)
        count = process.count_descriptors() if base is not None else process.settled_descriptors(SETTLED)
        self.descriptors[run.kind] = min(count, base or count)
