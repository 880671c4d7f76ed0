"""What processes hold: memory, descriptors, greenlets; and whether it is more and more."""

from __future__ import annotations

import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.soak.pairs import Run, Sample
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

CREEP = 0.25
"""Share that resident memory may grow by after the warm-up: the allocator's high-water mark creeps for a long time."""

HEAP = (256.0, 16.0)
"""KiB of the heap in use that may come and go, and that may be added in a minute: a leak is more."""

BLOCKS = (3000.0, 200.0)
"""Python's blocks, likewise."""

"""A line of gevent's about a greenlet that has not finished; one that has is only not collected yet."""


def take_sample(process: Nodepass) -> Sample:
    """The memory of a process now; without the pages of files, which every Python on the machine shares."""
    mark = process.mark()
    process.send(signal.SIGUSR2)
    inside = process.wait_for(tunnel="soak", after=mark)
    resident = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    assert resident, "no RssAnon in /proc/PID/status"
    return Sample(time.monotonic(), int(resident[1]), inside["heap"] // 1024, inside["blocks"])


def count_greenlets(process: Nodepass) -> int:
    """How many greenlets there are, asked by SIGUSR1."""
    mark = process.mark()
    process.send(signal.SIGUSR1)
    greenlets: int = process.wait_for("process.bugs", after=mark)["greenlets"]
    return greenlets


@dataclass(frozen=True)
class Slopes:
    """A straight line each through a run's samples after its warm-up."""

    run: Run
    minutes: float
    heap: float  # KiB a minute
    blocks: float  # a minute
    resident: float  # share that was added

    @property
    def are_flat(self) -> bool:
        return (
            self.resident <= CREEP
            and self.heap * self.minutes <= HEAP[0] + HEAP[1] * self.minutes
            and self.blocks * self.minutes <= BLOCKS[0] + BLOCKS[1] * self.minutes
        )

    def __str__(self) -> str:
        return (
            f"{self.run.kind}, {self.minutes:.1f} minutes: heap in use {self.heap:+.1f} KiB a minute,"
            f" Python's blocks {self.blocks:+.0f} a minute, resident {100 * self.resident:+.1f} %"
            f" (MiB: {' '.join(f'{sample.resident / 1024:.1f}' for sample in self.run.memory)})"
        )


def slopes(run: Run) -> Slopes | None:
    """The slopes after the warm-up; None where there are too few samples."""
    samples = run.memory[int(len(run.memory) * WARM_UP) :]
    if len(samples) < FEWEST:
        return None
    minutes = (samples[-1].moment - samples[0].moment) / 60
    added = _slope(samples, lambda sample: sample.resident) * minutes / samples[0].resident
    heap, blocks = _slope(samples, lambda sample: sample.heap), _slope(samples, lambda sample: sample.blocks)
    return Slopes(run, minutes, heap, blocks, added)


def _slope(samples: list[Sample], value: Callable[[Sample], int]) -> float:
    """What is added in a minute, by least squares."""
    minutes = [(sample.moment - samples[0].moment) / 60 for sample in samples]
    mean_x, mean_y = sum(minutes) / len(samples), sum(map(value, samples)) / len(samples)
    above = sum((x - mean_x) * (value(sample) - mean_y) for x, sample in zip(minutes, samples, strict=True))
    return above / sum((x - mean_x) ** 2 for x in minutes)


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
        run.memory.append(take_sample(run.process))
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
