"""The metrics of a tunnel, as one table.

A row of `FAMILIES` is a metric: its name, help and labels, and how its samples are read from a tunnel. Samples are read
during a scrape (`exposition`); nothing here runs while a tunnel works. docs/metrics.md explains every row.
"""

from __future__ import annotations

from collections import Counter as Counters
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from nodepass.stats import BUCKETS, Histogram, Sessions, Stats
from nodepass.tunnel.interface import Watched

Labels = tuple[str, ...]
Samples = Iterable[tuple[Labels, float]]
Distributions = Iterable[tuple[Labels, Histogram]]
_LE = (*map(repr, BUCKETS), "+Inf")


@dataclass(frozen=True)
class Number:
    """A gauge or a counter. The label `tunnel` is added to `labels` as the first."""

    kind: type[GaugeMetricFamily | CounterMetricFamily]
    name: str
    help: str
    labels: Labels
    read: Callable[[Watched], Samples]

    def build(self, watched: Iterable[Watched]) -> Metric:
        """The metric of all tunnels."""
        metric = self.kind(self.name, self.help, labels=("tunnel", *self.labels))
        for each in watched:
            for labels, value in self.read(each):
                metric.add_metric((each.name, *labels), value)
        return metric


@dataclass(frozen=True)
class Distribution:
    """A histogram, in seconds. The label `tunnel` is added to `labels` as the first."""

    name: str
    help: str
    labels: Labels
    read: Callable[[Watched], Distributions]

    def build(self, watched: Iterable[Watched]) -> Metric:
        """The metric of all tunnels."""
        metric = HistogramMetricFamily(self.name, self.help, labels=("tunnel", *self.labels))
        for each in watched:
            for labels, histogram in self.read(each):
                total, buckets = 0, []
                for bound, count in zip(_LE, histogram.counts, strict=True):
                    total += count
                    buckets.append((bound, total))
                metric.add_metric((each.name, *labels), buckets, histogram.total)
        return metric


Gauge = partial(Number, GaugeMetricFamily)
Counter = partial(
    Number, CounterMetricFamily
)  # never goes down while the process runs, also when its tunnel is restarted


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
    peers = Counters((peer, str(wire)) for peer, wire in watched.view.peers)  # several clients can have one address
    return [(peer, count) for peer, count in sorted(peers.items())]


def _info(watched: Watched) -> Samples:
    view, security = watched.view, watched.view.security
    mode = "" if security.tls is None else str(security.tls)
    key = "yes" if security.has_key else "no"
    wire = str(view.wire) if view.wire else ""
    protocols = ",".join(view.protocols)
    return [((view.role, security.name, key, mode, security.tls_version, security.group, wire, protocols), 1)]


def _target_states(watched: Watched) -> Samples:
    return [((each.name,), each.is_up) for each in watched.view.targets]


def _target_sessions(watched: Watched) -> Samples:
    return [((each.name,), each.sessions) for each in watched.view.targets]


def _target_failures(watched: Watched) -> Samples:
    return [(key, count) for key, count in sorted(watched.stats.target_failures.items())]


def _pool_waits(watched: Watched) -> Distributions:
    return [((), watched.stats.pool_waits)] if watched.view.role == "server" else []


def _dials(watched: Watched) -> Distributions:
    if watched.view.role == "client":
        yield ("target",), watched.stats.target_dials
        yield ("data",), watched.stats.data_dials


FAMILIES: tuple[Number | Distribution, ...] = (
    Gauge(
        "nodepass_tunnel_info",
        "Role and name of this end of the tunnel, what protects it, and what it carries.",
        ("role", "name", "key", "tls", "tls_version", "group", "wire", "protocols"),
        _info,
    ),
    Gauge("nodepass_ready", "1 if a session could be served now.", (), lambda w: _one(not w.view.unready)),
    Gauge("nodepass_peer_info", "The other ends, while they are connected.", ("peer", "wire"), _peer),
    Gauge("nodepass_peers_connected", "Connected other ends.", (), lambda w: _one(len(w.view.peers))),
    Gauge(
        "nodepass_peers",
        "Places for other ends: CLIENTS on a server, the servers of a client.",
        (),
        lambda w: _one(w.view.places),
    ),
    Gauge(
        "nodepass_round_trip_seconds",
        "Round trip of the last heartbeat; servers with a wire v2 client.",
        (),
        lambda w: _some(w.view.round_trip),
    ),
    Counter(
        "nodepass_reconnects_total",
        "Control connections after the first; on a client with several servers after each one's first.",
        (),
        lambda w: _one(w.stats.reconnects),
    ),
    Counter(
        "nodepass_crashes_total",
        "Times the tunnel crashed (bug) and was restarted.",
        (),
        lambda w: _one(w.stats.trouble["crashes"]),
    ),
    Counter(
        "nodepass_handshake_failures_total",
        "Failed handshakes of control and data connections.",
        ("connection", "reason"),
        _failures,
    ),
    Gauge(
        "nodepass_sessions_open",
        "Sessions being relayed.",
        ("protocol",),
        lambda w: [((protocol,), sessions.open) for protocol, sessions in _protocols(w.stats)],
    ),
    Counter("nodepass_sessions_total", "Ended sessions.", ("protocol", "outcome"), _sessions),
    Gauge("nodepass_session_slots_used", "Slots in use, of SEMAPHORE_LIMIT.", (), lambda w: _one(w.view.slots_used)),
    Gauge("nodepass_session_slots", "Available slots: SEMAPHORE_LIMIT.", (), lambda w: _one(w.view.slots)),
    Counter("nodepass_bytes_total", "Payload moved, in bytes.", ("direction", "protocol"), _bytes),
    Gauge(
        "nodepass_rate_limit_bytes_per_second",
        "RATE_UP and RATE_DOWN, of tunnels that have them.",
        ("direction",),
        lambda w: [((direction,), rate.bits / 8) for direction, rate in w.view.rates.items()],
    ),
    Gauge(
        "nodepass_traffic_used_bytes",
        "Payload of this day or month, both directions; tunnels with TRAFFIC_LIMIT.",
        (),
        lambda w: _some(w.view.traffic_used),
    ),
    Gauge("nodepass_traffic_limit_bytes", "TRAFFIC_LIMIT, where set.", (), lambda w: _some(w.view.traffic_limit)),
    Gauge("nodepass_pool_idle_connections", "Idle data connections.", (), lambda w: _one(w.view.pool_idle)),
    Gauge(
        "nodepass_pool_capacity_connections",
        "Target number of idle data connections.",
        (),
        lambda w: _one(w.view.pool_capacity),
    ),
    Counter(
        "nodepass_data_connections_total",
        "Data connections added to the pool.",
        (),
        lambda w: _one(w.stats.data_connections),
    ),
    Counter(
        "nodepass_pool_found_empty_total",
        "Sessions that found no idle data connection.",
        (),
        lambda w: _one(w.stats.found_empty),
    ),
    Distribution(
        "nodepass_pool_wait_seconds",
        "Time sessions waited for a data connection, including those that received none; servers.",
        (),
        _pool_waits,
    ),
    Distribution("nodepass_dial_seconds", "Time to set up a connection; clients.", ("to",), _dials),
    Distribution(
        "nodepass_first_byte_seconds",
        "From a visitor's arrival (server) or its launch (client) to the first byte of the answer; TCP.",
        (),
        lambda w: [((), w.stats.first_bytes)],
    ),
    Gauge("nodepass_target_up", "1 if the target answers, as far as is known; clients.", ("target",), _target_states),
    Gauge("nodepass_target_sessions", "Sessions and flows of the target; clients.", ("target",), _target_sessions),
    Counter(
        "nodepass_target_failures_total",
        "Failed dials and health checks of the target; clients.",
        ("target", "attempt"),
        _target_failures,
    ),
    Counter("nodepass_udp_drops_total", "Dropped datagrams.", ("reason",), lambda w: _by_key(w.stats.udp_drops)),
    Counter(
        "nodepass_visitors_refused_total",
        "Visitors' connections and datagrams that were refused; servers.",
        ("reason",),
        lambda w: _by_key(w.stats.visitors_refused) if w.view.role == "server" else [],
    ),
    Counter(
        "nodepass_trouble_total",
        "Other drops, rejections and failures.",
        ("kind",),
        lambda w: _by_key(w.stats.trouble),
    ),
    Gauge(
        "nodepass_certificate_expiry_timestamp_seconds",
        "When the server's certificate expires, in Unix time; servers with TLS.",
        (),
        lambda w: _some(w.view.certificate_expiry),
    ),
)
