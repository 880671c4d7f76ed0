"""The metrics, as one table.

A row of `FAMILIES` is a metric: name, help, labels, and how its samples are read off a tunnel. Everything is read when
somebody asks (`exposition`); nothing here is called while a tunnel works. docs/metrics.md explains every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from nodepass.stats import BUCKETS, Histogram, Sessions, Stats
from nodepass.tunnel.interface import Watched

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]
Distributions = Iterable[tuple[Labels, Histogram]]
_LE = (*map(repr, BUCKETS), "+Inf")


@dataclass(frozen=True)
class Family:
    """What gauges and counters have in common; the label `tunnel` comes first by itself."""

    name: str
    help: str
    labels: Labels

    def build(self, watched: Iterable[Watched]) -> Metric:
        """The metric of all tunnels."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gauge(Family):
    """A number that goes up and down."""

    read: Callable[[Watched], Samples]

    def build(self, watched: Iterable[Watched]) -> Metric:
        metric = GaugeMetricFamily(self.name, self.help, labels=("tunnel", *self.labels))
        for each in watched:
            for labels, value in self.read(each):
                metric.add_metric((each.name, *labels), value)
        return metric


@dataclass(frozen=True)
class Count(Family):
    """A number that only goes up, until its tunnel starts anew."""

    read: Callable[[Watched], Samples]

    def build(self, watched: Iterable[Watched]) -> Metric:
        metric = CounterMetricFamily(self.name, self.help, labels=("tunnel", *self.labels))
        for each in watched:
            for labels, value in self.read(each):
                metric.add_metric((each.name, *labels), value)
        return metric


@dataclass(frozen=True)
class Distribution(Family):
    """A histogram, in seconds."""

    read: Callable[[Watched], Distributions]

    def build(self, watched: Iterable[Watched]) -> Metric:
        metric = HistogramMetricFamily(self.name, self.help, labels=("tunnel", *self.labels))
        for each in watched:
            for labels, histogram in self.read(each):
                total, buckets = 0, []
                for bound, count in zip(_LE, histogram.counts, strict=True):
                    total += count
                    buckets.append((bound, total))
                metric.add_metric((each.name, *labels), buckets, histogram.total)
        return metric


def _one(value: float) -> Samples:
    return [((), value)]


def _some(value: float | None) -> Samples:
    return [] if value is None else _one(value)


def _by_key(counter: Mapping[str, int], *before: str) -> Samples:
    return [((*before, key), count) for key, count in sorted(counter.items())]


def _protocols(stats: Stats) -> list[tuple[str, Sessions]]:
    return [("tcp", stats.tcp), ("udp", stats.udp)]


def _bytes(watched: Watched) -> Samples:
    for protocol, sessions in _protocols(watched.stats):
        yield ("up", protocol), sessions.up.bytes
        yield ("down", protocol), sessions.down.bytes


def _sessions(watched: Watched) -> Samples:
    return [row for protocol, sessions in _protocols(watched.stats) for row in _by_key(sessions.ended, protocol)]


def _failures(watched: Watched) -> Samples:
    stats = watched.stats
    return [*_by_key(stats.control_failures, "control"), *_by_key(stats.data_failures, "data")]


def _peer(watched: Watched) -> Samples:
    view = watched.view
    return [((view.peer, str(view.wire)), 1)] if view.peer else []


def _pool_waits(watched: Watched) -> Distributions:
    return [((), watched.stats.pool_waits)] if watched.view.role == "server" else []


def _dials(watched: Watched) -> Distributions:
    if watched.view.role == "client":
        yield ("target",), watched.stats.target_dials
        yield ("data",), watched.stats.data_dials


FAMILIES: tuple[Family, ...] = (
    Gauge("nodepass_tunnel_info", "Which end of a tunnel this is.", ("role",), lambda w: [((w.view.role,), 1)]),
    Gauge("nodepass_ready", "Whether a session could be served now.", (), lambda w: _one(not w.view.unready)),
    Gauge("nodepass_peer_info", "The other end, while it is connected.", ("peer", "wire"), _peer),
    Gauge(
        "nodepass_round_trip_seconds",
        "Time of the last heartbeat there and back; servers with a wire v2 client.",
        (),
        lambda w: _some(w.view.round_trip),
    ),
    Count(
        "nodepass_reconnects_total",
        "Control connections after the first one.",
        (),
        lambda w: _one(max(0, w.stats.connects - 1)),
    ),
    Count(
        "nodepass_crashes_total",
        "Times that the tunnel crashed and was made anew.",
        (),
        lambda w: _one(w.stats.trouble["crashes"]),
    ),
    Count(
        "nodepass_handshake_failures_total",
        "Control and data connections that came to nothing.",
        ("connection", "reason"),
        _failures,
    ),
    Gauge(
        "nodepass_sessions_open",
        "Sessions that are being relayed.",
        ("protocol",),
        lambda w: [((protocol,), sessions.open) for protocol, sessions in _protocols(w.stats)],
    ),
    Count("nodepass_sessions_total", "Sessions that have ended.", ("protocol", "outcome"), _sessions),
    Gauge("nodepass_session_slots_used", "Places taken, of SEMAPHORE_LIMIT.", (), lambda w: _one(w.view.slots_used)),
    Gauge("nodepass_session_slots", "Places there are: SEMAPHORE_LIMIT.", (), lambda w: _one(w.view.slots)),
    Count("nodepass_bytes_total", "Payload moved, in bytes.", ("direction", "protocol"), _bytes),
    Gauge("nodepass_pool_idle_connections", "Data connections ready.", (), lambda w: _one(w.view.pool_idle)),
    Gauge(
        "nodepass_pool_capacity_connections",
        "Data connections that the pool is to hold ready.",
        (),
        lambda w: _one(w.view.pool_capacity),
    ),
    Count(
        "nodepass_data_connections_total",
        "Data connections that became ready.",
        (),
        lambda w: _one(w.stats.data_connections),
    ),
    Count(
        "nodepass_pool_found_empty_total",
        "Times that a session found no data connection ready.",
        (),
        lambda w: _one(w.stats.found_empty),
    ),
    Distribution(
        "nodepass_pool_wait_seconds",
        "How long sessions waited for a data connection, also in vain; servers.",
        (),
        _pool_waits,
    ),
    Distribution("nodepass_dial_seconds", "How long connections took to make; clients.", ("to",), _dials),
    Distribution(
        "nodepass_first_byte_seconds",
        "From a visitor's arrival (server) or its launch (client) to the first byte of the answer; TCP.",
        (),
        lambda w: [((), w.stats.first_bytes)],
    ),
    Count(
        "nodepass_udp_drops_total",
        "Datagrams dropped.",
        ("reason",),
        lambda w: _by_key(w.stats.udp_drops),
    ),
    Count(
        "nodepass_trouble_total",
        "What else was dropped, refused or failed.",
        ("kind",),
        lambda w: _by_key(w.stats.trouble),
    ),
    Gauge(
        "nodepass_certificate_expiry_timestamp_seconds",
        "When the server's certificate ceases to be valid, in Unix time; servers with TLS.",
        (),
        lambda w: _some(w.view.certificate_expiry),
    ),
)
