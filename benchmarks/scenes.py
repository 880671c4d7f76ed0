"""What is measured: each scene is a target, a load and the numbers that come out of it.

The unit of every number is in its label; README and report show nothing else.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks import programs, visitors
from benchmarks.processes import MeasurementError, Processes
from benchmarks.targets import ECHO, IPERF, NGINX, ROOT, Target

Values = dict[str, float]

STREAMS = 8
KEEPALIVE_CONNECTIONS = 50
CHURN_CONNECTIONS = 32
DATAGRAM_SOCKETS = 16
IDLE_SECONDS = 5.0  # at least: one report interval of NodePass
SETTLE_SECONDS = 1.0  # between the first bytes through a system and a look at its memory


@dataclass(frozen=True)
class Metric:
    """One number of a scene: its key in the JSON, its label with unit, whether more of it is better."""

    key: str
    label: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Course:
    """What a scene's load gets: the visitor ports, the system's processes, seconds of load."""

    ports: list[int]
    processes: Processes
    seconds: int
    direct: bool

    def per(self, quantity: float, cpu_before: float) -> float:
        """Return the CPU seconds since `cpu_before` per unit of `quantity`; nan without processes."""
        if self.direct or not quantity:
            return float("nan")
        return (self.processes.cpu_seconds() - cpu_before) / quantity


@dataclass(frozen=True)
class Scene:
    """One scene; the first metric is its headline, by which systems are compared."""

    name: str
    title: str
    target: Target
    run: Callable[[Course], Values]
    metrics: tuple[Metric, ...]
    programs: tuple[str, ...] = ()
    tunnels: int = 1
    datagrams: bool = False
    weighs: bool = False  # it measures the system's processes themselves: not for `direct`
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> Metric:
        """The metric by which systems are compared."""
        return self.metrics[0]


def run_bulk(course: Course, *, streams: int, down: bool) -> Values:
    """Move as many bytes as possible."""
    before = course.processes.cpu_seconds()
    moved = programs.transfer(course.ports[0], course.seconds, streams, down)
    return {
        "gbit_s": 8 * moved.bytes / moved.seconds / 1e9,
        "cpu_s_gb": course.per(moved.bytes / 1e9, before),
    }


def run_keepalive(course: Course) -> Values:
    """Request after request on connections that stay open."""
    before = course.processes.cpu_seconds()
    folder = course.processes.folder
    done = programs.request_pages(course.ports[0], course.seconds, KEEPALIVE_CONNECTIONS, True, folder)
    return {
        "requests_s": done.count / done.seconds,
        "p50_ms": 1e3 * done.p50,
        "p99_ms": 1e3 * done.p99,
        "cpu_us": 1e6 * course.per(done.count, before),
        "errors": done.errors,
    }


def run_churn(course: Course) -> Values:
    """A new connection for every request."""
    before = course.processes.cpu_seconds()
    folder = course.processes.folder
    done = programs.request_pages(course.ports[0], course.seconds, CHURN_CONNECTIONS, False, folder)
    return {
        "connections_s": done.count / done.seconds,
        "p99_ms": 1e3 * done.p99,
        "cpu_us": 1e6 * course.per(done.count, before),
        "errors": done.errors,
    }


def run_connect(course: Course) -> Values:
    """One visitor after the other."""
    samples = visitors.connect_in_sequence(course.ports[0], course.seconds)
    return {
        "p50_ms": 1e3 * samples.percentile(50),
        "p99_ms": 1e3 * samples.percentile(99),
        "errors": samples.failed,
    }


def run_beside(course: Course) -> Values:
    """One visitor after the other, beside a bulk stream."""
    with Processes(course.processes.folder / "flood") as load:
        command = [sys.executable, "-m", "benchmarks.flood", str(course.ports[0])]
        load.start("flood", command, {"PYTHONPATH": str(ROOT)})
        time.sleep(SETTLE_SECONDS)
        values = run_connect(course)
        load.check()
    return values


def run_hold(course: Course, *, count: int) -> Values:
    """Many visitors at once, who stay."""
    time.sleep(SETTLE_SECONDS)
    before = course.processes.pss_bytes()
    with visitors.hold_visitors(course.ports[0], count) as samples:
        served = len(samples.seconds)
        grown = course.processes.pss_bytes() - before
    return {
        "all_s": samples.elapsed if served == count else float("inf"),
        "served": served,
        "p50_ms": 1e3 * samples.percentile(50),
        "kib_each": float("nan") if course.direct or not served else grown / served / 1024,
    }


def run_datagrams(course: Course) -> Values:
    """Datagrams to and fro, the next when the last is back."""
    before = course.processes.cpu_seconds()
    samples = visitors.exchange_datagrams(course.ports[0], DATAGRAM_SOCKETS, course.seconds)
    return {
        "answers_s": len(samples.seconds) / samples.elapsed,
        "lost": samples.failed,
        "p99_ms": 1e3 * samples.percentile(99),
        "cpu_us": 1e6 * course.per(len(samples.seconds), before),
    }


def run_idle(course: Course) -> Values:
    """Nothing at all; every tunnel has been used once before."""
    time.sleep(SETTLE_SECONDS)
    duration = max(IDLE_SECONDS, course.seconds)
    before = course.processes.cpu_seconds()
    time.sleep(duration)
    pids = len(course.processes.family())
    if pids == 0:
        raise MeasurementError("no process is there to be weighed")
    total = course.processes.pss_bytes() / 1024**2
    spent = course.processes.cpu_seconds() - before
    return {"pss_mib": total / pids, "pss_sum_mib": total, "cpu_ms_s": 1e3 * spent / duration}


BULK = (Metric("gbit_s", "Gbit/s", True), Metric("cpu_s_gb", "CPU s per GB"))
HOLD = (
    Metric("all_s", "seconds until all are served"),
    Metric("served", "visitors served", True),
    Metric("p50_ms", "p50, ms"),
    Metric("kib_each", "KiB per connection, all processes"),
)
IDLE = (
    Metric("pss_mib", "MiB (PSS) per process"),
    Metric("pss_sum_mib", "MiB (PSS), all processes"),
    Metric("cpu_ms_s", "CPU ms per s"),
)


def bulk_scene(name: str, title: str, streams: int, down: bool) -> Scene:
    """Return a scene of iperf3."""
    run = functools.partial(run_bulk, streams=streams, down=down)
    return Scene(name, title, IPERF, run, BULK, programs=("iperf3",))


def hold_scene(count: int, environment: Mapping[str, str]) -> Scene:
    """Return a scene of `count` visitors at once."""
    title = f"hold, {count:,} visitors at once"
    run = functools.partial(run_hold, count=count)
    return Scene(f"hold-{count}", title, ECHO, run, HOLD, environment=environment)


def idle_scene(name: str, title: str, tunnels: int) -> Scene:
    """Return a scene of idle tunnels in one process at each end."""
    return Scene(name, title, ECHO, run_idle, IDLE, tunnels=tunnels, weighs=True)


SCENES = (
    bulk_scene("bulk-up", "bulk up, one stream", 1, down=False),
    bulk_scene("bulk-down", "bulk down, one stream", 1, down=True),
    bulk_scene("streams", f"bulk up, {STREAMS} streams", STREAMS, down=False),
    Scene(
        "keepalive",
        f"HTTP keepalive, {KEEPALIVE_CONNECTIONS} connections",
        NGINX,
        run_keepalive,
        (
            Metric("requests_s", "requests/s", True),
            Metric("p50_ms", "p50, ms"),
            Metric("p99_ms", "p99, ms"),
            Metric("cpu_us", "CPU µs per request"),
            Metric("errors", "errors"),
        ),
        programs=("nginx", "wrk"),
    ),
    Scene(
        "churn",
        f"HTTP churn, {CHURN_CONNECTIONS} at a time",
        NGINX,
        run_churn,
        (
            Metric("connections_s", "connections/s", True),
            Metric("p99_ms", "p99, ms"),
            Metric("cpu_us", "CPU µs per connection"),
            Metric("errors", "errors"),
        ),
        programs=("nginx", "wrk"),
    ),
    Scene(
        "connect",
        "connect and one byte echoed, in sequence",
        ECHO,
        run_connect,
        (Metric("p50_ms", "p50, ms"), Metric("p99_ms", "p99, ms"), Metric("errors", "errors")),
    ),
    Scene(
        "beside-bulk",
        "connect and one byte echoed, beside one bulk stream up",
        ECHO,
        run_beside,
        (Metric("p99_ms", "p99, ms"), Metric("p50_ms", "p50, ms"), Metric("errors", "errors")),
    ),
    hold_scene(1000, {}),
    hold_scene(5000, {"SEMAPHORE_LIMIT": "8192"}),  # the default limit of NodePass is 1,024 sessions
    Scene(
        "udp",
        f"UDP closed loop, {DATAGRAM_SOCKETS} sockets",
        ECHO,
        run_datagrams,
        (
            Metric("answers_s", "answers/s", True),
            Metric("lost", "lost"),
            Metric("p99_ms", "p99, ms"),
            Metric("cpu_us", "CPU µs per answer"),
        ),
        datagrams=True,
    ),
    idle_scene("idle", "idle, 1 tunnel", 1),
    idle_scene("idle-10", "idle, 10 tunnels in one process", 10),
    idle_scene("idle-50", "idle, 50 tunnels in one process", 50),
)
