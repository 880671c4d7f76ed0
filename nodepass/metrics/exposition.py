"""The metrics in Prometheus's text format, generated during a scrape, step by step while the tunnels run.

Owns the registry and the last text. `endpoint` calls it; the table of metrics is in `families`. Imported, and
prometheus_client with it, only when METRICS_LISTEN is set.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gevent
from gevent.lock import Semaphore
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from nodepass import __version__
from nodepass.metrics.families import FAMILIES
from nodepass.stats import Stats
from nodepass.tunnel.interface import Watched

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARE = 0.1  # of the time at most is spent on generating the text, however often it is scraped
LONGEST_KEPT = 1.0  # seconds: maximum age of a text that is served again
SAMPLES_PER_TURN = 100  # written in half a millisecond; then other greenlets run
TUNNELS_PER_TURN = 10  # read in half a millisecond, likewise


def _one_by_one(watched: Sequence[Watched]) -> Iterator[Watched]:
    """The tunnels; iterating yields to other greenlets."""
    for number, each in enumerate(watched):
        if number % TUNNELS_PER_TURN == 0:
            gevent.sleep(0)
        yield each


class _YieldingSamples(list[Sample]):
    """Samples of many tunnels: iterating yields to other greenlets."""

    def __iter__(self) -> Iterator[Sample]:
        for number, sample in enumerate(super().__iter__()):
            if number % SAMPLES_PER_TURN == 0:
                gevent.sleep(0)
            yield sample


class _TunnelCollector(Collector):
    """The metrics of `families`, and those of no tunnel; reading and writing them yields to other greenlets."""

    def __init__(self, watch: Callable[[], Sequence[Watched]], stats: Stats) -> None:
        self._watch = watch
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("nodepass_build_info", "Versions in use.", labels=("version", "python", "gevent"))
        build.add_metric((__version__, platform.python_version(), gevent.__version__), 1)
        yield build
        lost = "Lines of the log that were lost, because stderr was not read or could not be written."
        yield CounterMetricFamily("nodepass_log_lines_lost", lost, self._stats.log_lines_lost)
        lost = "Lines of access logs that were lost, because they were not read or could not be written."
        yield CounterMetricFamily("nodepass_access_log_lines_lost", lost, self._stats.access_lines_lost)
        watched = self._watch()
        for family in FAMILIES:
            metric = family.build(_one_by_one(watched))
            metric.samples = _YieldingSamples(metric.samples)
            yield metric


class _ProcessCollector(Collector):
    """Prometheus's standard process metrics.

    prometheus_client's own collector has none where /proc shows processes only (ProcSubset=pid, as in the unit): it
    reads the time of boot from /proc/stat. Here it is read from the clock.
    """

    def __init__(self) -> None:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        self._started = time.time() - age

    def collect(self) -> Iterator[Metric]:
        size, resident = map(int, Path("/proc/self/statm").read_text().split()[:2])
        page = resource.getpagesize()
        yield CounterMetricFamily("process_cpu_seconds_total", "CPU time spent, in seconds.", time.process_time())
        yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory, in bytes.", resident * page)
        yield GaugeMetricFamily("process_virtual_memory_bytes", "Address space, in bytes.", size * page)
        yield GaugeMetricFamily("process_start_time_seconds", "When the process started, in Unix time.", self._started)
        yield GaugeMetricFamily("process_open_fds", "Open file descriptors.", len(os.listdir("/proc/self/fd")))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield GaugeMetricFamily("process_max_fds", "Maximum number of open file descriptors.", limit)


class Exposition:
    """The text of all metrics. One greenlet at a time generates it; frequent scrapes receive the same text again."""

    def __init__(self, watch: Callable[[], Sequence[Watched]], stats: Stats) -> None:
        """`stats`: of what belongs to no tunnel."""
        self._registry = CollectorRegistry()
        self._registry.register(_TunnelCollector(watch, stats))
        if Path("/proc/self/stat").exists():
            self._registry.register(_ProcessCollector())
        self._making = Semaphore()
        self._text = b""
        self._good_until = 0.0

    def text(self) -> bytes:
        """The response to a scrape."""
        with self._making:
            began = time.monotonic()
            if began >= self._good_until:
                self._text = generate_latest(self._registry)
                now = time.monotonic()
                self._good_until = now + min(LONGEST_KEPT, (now - began) / SHARE)
            return self._text
