"""The course of a soak: rough phases with faults, quiet ones without, idle ones in which is measured what is held."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.soak.faults import BATTERED, CABLED, STEADY, Fault
from tests.soak.pairs import REPORT_INTERVAL, SHAPES, Pair, Run, Shape
from tests.soak.places import Apart, Here
from tests.soak.traffic import Tally, Traffic, works
from tests.soak.vitals import BaseLines, slopes
from tests.support.certificates import Authority
from tests.support.v2_network import why_not

ROUGH, QUIET = 10.0, 4.0
"""Seconds of the phases, without what their last sessions take; of a short soak they are a fraction."""

CYCLES = 4
"""Rounds of phases, at least."""

RECOVERY = 45.0
"""Seconds after which a tunnel that does not work yet never will."""

AFTERMATH = 1.5 * REPORT_INTERVAL
"""Seconds in which a fault is still heard of: lines that were left out are told of at the next report."""


class Soak:
    """One run; `seed` decides what happens, though not when exactly."""

    def __init__(self, seconds: float, seed: int, directory: Path) -> None:
        self.tally = Tally()
        self.base_lines = BaseLines()
        self.recoveries: defaultdict[str, list[float]] = defaultdict(list)
        self.pairs: list[tuple[Pair, Sequence[Fault]]] = []
        self.cycles = 0
        self.without: str = why_not()
        self._seconds = seconds
        self._seed = seed
        self._authority = Authority(directory)

    def run(self) -> None:
        """All of it; what is found is in `tally`."""
        with contextlib.ExitStack() as stack:
            for pair, faults in self._make_pairs():
                stack.enter_context(pair)
                self.pairs.append((pair, faults))
            for pair, _ in self.pairs:
                self._recover(pair, "start")
            self._go_on()

    def _make_pairs(self) -> Iterator[tuple[Pair, Sequence[Fault]]]:
        rng = random.Random(self._seed)
        yield Pair("steady", Here(), Shape(2, True, False), self._authority, has_middle=True), STEADY
        yield Pair("battered", Here(), rng.choice(SHAPES), self._authority), BATTERED
        if not self.without:
            yield Pair("cabled", Apart(), rng.choice(SHAPES), self._authority), CABLED

    def _go_on(self) -> None:
        end = time.monotonic() + self._seconds
        share = min(1.0, self._seconds / CYCLES / (ROUGH + 2 * QUIET))
        self._quiet_phase(share)
        self._idle_phase()
        while time.monotonic() < end:
            self.cycles += 1
            self._rough_phase(share)
            self._quiet_phase(share)
            self._idle_phase()
        self._count_greenlets()
        for found in (slopes(run) for pair, _ in self.pairs for run in pair.runs):
            if found and not found.are_flat:
                self.tally.find(f"memory grows: {found}")

    def _rough_phase(self, share: float) -> None:
        until = time.monotonic() + ROUGH * share
        with contextlib.ExitStack() as stack:
            threads = []
            for pair, faults in self.pairs:
                stack.enter_context(Traffic(pair, self.tally, f"{self._seed}/{self.cycles}", is_quiet=False))
                threads.append(threading.Thread(target=self._torment, args=(pair, faults, until), daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _quiet_phase(self, share: float) -> None:
        with contextlib.ExitStack() as stack:
            for pair, _ in self.pairs:
                stack.enter_context(Traffic(pair, self.tally, f"{self._seed}/{self.cycles}", is_quiet=True))
            time.sleep(QUIET * share)
        self._look_at_logs()

    def _idle_phase(self) -> None:
        with ThreadPoolExecutor() as threads:
            for found in threads.map(self.base_lines.check, self._runs()):
                self.tally.find(*found)
        if not self.cycles:
            self._count_greenlets()
        self._look_at_logs()

    def _runs(self) -> list[Run]:
        return [run for pair, _ in self.pairs for run in pair.current.values()]

    def _count_greenlets(self) -> None:
        for run in self._runs():
            self.tally.find(*self.base_lines.check_greenlets(run))

    def _look_at_logs(self) -> None:
        for pair, _ in self.pairs:
            self.tally.find(*pair.unexpected())

    def _torment(self, pair: Pair, faults: Sequence[Fault], until: float) -> None:
        """One fault after the other, each until the tunnel works again."""
        rng = random.Random(f"{self._seed}/{self.cycles} {pair.name} faults")
        try:
            while time.monotonic() < until:
                time.sleep(rng.uniform(0.1, 1.0))
                fault = rng.choice(faults)
                self.tally.find(*(f"before «{fault.name}»: {line}" for line in pair.unexpected()))
                pair.trouble = fault.name
                fault.inject(pair, rng)
                self._recover(pair, fault.name)
                time.sleep(AFTERMATH)
                self.tally.find(*(f"after «{fault.name}»: {line}" for line in pair.unexpected(fault.explains)))
        except Exception as error:  # noqa: BLE001  # a thread's failure is the run's
            self.tally.find(f"{pair.name}: {error!r}")

    def _recover(self, pair: Pair, after: str) -> None:
        """Wait until the tunnel works, and note how long that took."""
        began = time.monotonic()
        while not works(pair):
            if time.monotonic() - began > RECOVERY:
                self.tally.find(f"{pair.name} ({pair.shape}) has not recovered from «{after}»")
                return
        self.recoveries[after].append(time.monotonic() - began)
