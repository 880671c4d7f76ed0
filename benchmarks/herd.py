"""Many clients that come back to one server at once: real ones, as many as fit, and a simulation of more.

    python -m benchmarks.herd --clients 1000 --tls 1

The server is killed, comes back after the clients have reached their longest pause, and is timed until all are
connected again. The simulation has the clients' pauses, the server's bounds and, as its only measured number, the
server's CPU time for one client; it is compared with the real run before it is believed for `--simulated` clients.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import heapq
import itertools
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import LOOPBACK, Processes, free_port
from benchmarks.targets import ROOT
from nodepass.client.data_dialer import Backoff
from nodepass.config.settings import Settings
from nodepass.net.listen import ACCEPTS_PER_TURN, BACKLOG
from nodepass.server.pending import LONG_QUEUE, WAITED

POOL = 2  # data connections of each client
COMMON = {
    "LOG_FORMAT": "json",
    "MIN_POOL_CAPACITY": str(POOL),
    "MAX_POOL_CAPACITY": str(4 * POOL),
    "SEMAPHORE_LIMIT": "16",
    "UDP": "off",
}
PATIENCE = 300.0  # seconds for a step
LONGEST_OUTAGE = 15.0  # seconds; a client's pause has grown to the longest by then
LOOK_EVERY = 0.05  # seconds
TURNS = 3  # of the event loop that a handshake takes: the server works on others between
SYN_AGAIN = 1.0  # seconds after which the kernel repeats what a full queue did not take


@dataclass(frozen=True)
class Outcome:
    """Seconds from the server's return until half and all of the clients are connected, and attempts per client."""

    half: float
    all: float
    attempts: float

    def __str__(self) -> str:
        return f"half after {self.half:.1f} s, all after {self.all:.1f} s, {self.attempts:.2f} attempts each"


@dataclass(eq=False)
class Dial:
    """A simulated connection of a client: its control connection, or one for its pool after that."""

    backoff: Backoff
    is_control: bool
    cost: float  # CPU seconds of the server
    since: float = 0.0  # when it was dialled
    turns: int = 0  # that its handshake still needs


class Simulation:
    """A server with one core, and clients whose pauses are the longest when it comes back.

    The kernel queues what is dialled. In each turn of its event loop the server accepts a few of them and works on all
    handshakes that have begun; it turns away what has waited too long in a long queue. A client whose handshake has
    taken HANDSHAKE_TIMEOUT, or that is turned away, tries again after its next pause.
    """

    def __init__(self, clients: int, cost: float, chance: random.Random) -> None:
        """`cost`: CPU seconds of the server for a client and its pool."""
        self._clients = clients
        self._settings = Settings()
        self._now = 0.0
        self._coming: list[tuple[float, int, Dial]] = []
        self._order = itertools.count()
        self._queue: deque[Dial] = deque()
        self._begun: list[Dial] = []
        self._ends: list[float] = []
        self._dials = 0
        self._share = cost / 2 / POOL  # a data connection's; the control connection has half of it all
        for _ in range(clients):
            backoff = Backoff(self._settings.service_cooldown)
            while backoff.pause() < 0.75 * self._settings.service_cooldown:
                pass  # it has grown during the outage
            self._dial(Dial(backoff, True, cost / 2), chance.uniform(0.0, self._settings.service_cooldown))

    def run(self) -> Outcome:
        """Until all clients are connected."""
        while len(self._ends) < self._clients:
            if not self._queue and not self._begun:
                self._now = max(self._now, self._coming[0][0])
            self._arrive()
            self._accept()
            self._work()
        return Outcome(statistics.median(self._ends), self._ends[-1], self._dials / self._clients)

    def _dial(self, dial: Dial, at: float) -> None:
        heapq.heappush(self._coming, (at, next(self._order), dial))

    def _retry(self, dial: Dial) -> None:
        self._dial(dial, self._now + dial.backoff.pause())

    def _arrive(self) -> None:
        while self._coming and self._coming[0][0] <= self._now:
            at, _, dial = heapq.heappop(self._coming)
            if len(self._queue) >= BACKLOG:
                self._dial(dial, self._now + SYN_AGAIN)
                continue
            dial.since, dial.turns = at, TURNS
            self._dials += dial.is_control
            self._queue.append(dial)

    def _accept(self) -> None:
        for _ in range(min(ACCEPTS_PER_TURN, len(self._queue))):
            dial = self._queue.popleft()
            is_late = self._now - dial.since > WAITED * self._settings.handshake_timeout
            if is_late and len(self._queue) >= LONG_QUEUE:
                self._retry(dial)
            else:
                self._begun.append(dial)

    def _work(self) -> None:
        going, self._begun = self._begun, []
        for dial in going:
            if self._now - dial.since > self._settings.handshake_timeout:
                self._retry(dial)
                continue
            self._now += dial.cost / TURNS
            dial.turns -= 1
            if dial.turns:
                self._begun.append(dial)
            elif dial.is_control:
                self._ends.append(self._now)
                for _ in range(POOL):
                    self._dial(Dial(Backoff(self._settings.service_cooldown), False, self._share), self._now)


class Herd:
    """A server and its clients, all in two processes, each on a core of its own where there are two."""

    def __init__(self, folder: Path, clients: int, tls: int) -> None:
        self.folder = folder
        self.clients = clients
        port = free_port()
        self._server = [f"server://{LOOPBACK}:{port}/{LOOPBACK}:0?tls={tls}&name=n{each}" for each in range(clients)]
        self._client = [f"client://{LOOPBACK}:{port}/{LOOPBACK}:9?name=n{each}" for each in range(clients)]

    @contextlib.contextmanager
    def run(self, end: str, core: int, name: str) -> Iterator[Processes]:
        """One of the two processes; its log is `<name>.log`."""
        urls, own = (self._server, {"DATA_PORT": "tunnel"}) if end == "server" else (self._client, {})
        pin = ["taskset", "--cpu-list", str(core)] if shutil.which("taskset") and (os.cpu_count() or 1) > 1 else []
        with Processes(self.folder / name) as processes:
            processes.start(name, [*pin, ROOT / "bin" / "nodepass", *urls], {**COMMON, **own})
            yield processes

    def times(self, name: str, event: str) -> list[float]:
        """When the process has said this, as Unix times."""
        lines = (self.folder / name / f"{name}.log").read_text().splitlines()
        said = [json.loads(line) for line in lines if f'"{event}"' in line]
        return [_parse_time(each["time"]) for each in said]

    def wait_for(self, name: str, event: str, number: int) -> None:
        """Return once it has said this so many times."""
        deadline = time.monotonic() + PATIENCE
        while len(self.times(name, event)) < number:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name}: {event} {len(self.times(name, event))} of {number} times in {PATIENCE:g} s")
            time.sleep(LOOK_EVERY)


@dataclass(frozen=True)
class Measured:
    """A real run: when clients were connected, and what the server has used for it."""

    outcome: Outcome
    cost: float  # CPU seconds of the server for each client
    memory: float  # KiB of the server for each client


def measure(herd: Herd) -> Measured:
    """Have all clients connect, end the server, and time their return."""
    with contextlib.ExitStack() as stack:
        with herd.run("server", 0, "before"):
            herd.wait_for("before", "server.listening", herd.clients)
            stack.enter_context(herd.run("client", 1, "client"))
            herd.wait_for("before", "client.connected", herd.clients)
        time.sleep(LONGEST_OUTAGE)
        server = stack.enter_context(herd.run("server", 0, "after"))
        herd.wait_for("after", "server.listening", herd.clients)
        began = max(herd.times("after", "server.listening"))
        used, memory = server.cpu_seconds(), server.pss_bytes()
        herd.wait_for("after", "client.connected", herd.clients)
        used = server.cpu_seconds() - used
        times = sorted(each - began for each in herd.times("after", "client.connected"))
        failed = len(herd.times("client", "server.unreachable"))
        print(f"failures that the clients' log has, of both servers' ends: {failed}")
        memory = server.pss_bytes() - memory
    outcome = Outcome(statistics.median(times), times[-1], 1.0)
    return Measured(outcome, used / herd.clients, memory / 1024 / herd.clients)


def _parse_time(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, compare the simulation with that, and simulate more."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.herd", description=__doc__)
    parser.add_argument("--clients", type=int, default=1000, help="real ones (default %(default)s)")
    parser.add_argument("--tls", type=int, default=0, choices=(0, 1))
    parser.add_argument("--simulated", type=int, default=10_000, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Herd(Path(folder), options.clients, options.tls))
    chance = random.Random(1)
    print(f"tls={options.tls}, {options.clients} clients: half after {found.outcome.half:.1f} s,", end=" ")
    print(f"all after {found.outcome.all:.1f} s; the server used {1000 * found.cost:.2f} ms and", end=" ")
    print(f"{found.memory:.0f} KiB for each")
    for clients in (options.clients, options.simulated):
        print(f"simulated, {clients}: {Simulation(clients, found.cost, chance).run()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
