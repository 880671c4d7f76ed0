"""The counters of one tunnel, and their snapshot for the log.

Plain attributes: a count costs one addition, an observation of a histogram one bisection. They outlive a crash of their
tunnel. `metrics` exports the same numbers; nothing here knows about it. `up` is from the visitor to the target, `down`
the opposite direction.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from nodepass.errors import ClosedError, ProtocolError, ProxyError, RefusedError, TLSError, VerificationError

# Seconds: from a round trip in a LAN to the default limit of a handshake, and beyond.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
TCP_OUTCOMES = ("completed", "reset", "vanished", "idle", "silent", "cut", "unserved", "unreachable")
UDP_OUTCOMES = ("completed", "evicted", "lost", "unserved", "unanswered")
HEADER_FAILURES = ("header_late", "header_malformed", "header_missing")  # of proxies, see `visitors.proxies`
CONTROL_FAILURES = (
    "busy",
    "certificate",
    "closed",
    *HEADER_FAILURES,
    "key_mismatch",
    "key_required",
    "no_tls",
    "other",
    "protocol",
    "proxy",
    "shutdown",
    "silent",
    "timeout",
    "tls",
    "unknown_name",
    "unreachable",
    "version",
)
DATA_FAILURES = (
    "certificate",
    "closed",
    *HEADER_FAILURES,
    "no_client",
    "pool_full",
    "protocol",
    "proxy",
    "wrong_address",
    "timeout",
    "tls",
    "unknown_sid",
    "unreachable",
)
UDP_DROPS = (
    "answer",
    "empty",
    "flow_over",
    "lane_full",
    "lane_missing",
    "limit",
    "rate",
    "target_refused",
    "target_unreachable",
    "too_large",
    "traffic_limit",
    "unserved",
    "visitor_unreachable",
)
REFUSALS = ("address_rate", "address_sessions", "denied", *HEADER_FAILURES, "not_allowed", "traffic_limit")
TROUBLE = (
    "bugs",
    "crashes",
    "idle_connections_lost",
    "launches_dropped",
    "launches_unknown",
    "limit_reached",
    "pending_dropped",
    "pending_late",
    "signals_malformed",
    "signals_over_long",
    "signals_unknown",
)


class Histogram:
    """The number of observations in each of BUCKETS, and their sum in seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class Way:
    """Payload bytes moved in one direction, without framing and TLS."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Sessions:
    """The sessions of one protocol: TCP connections, or UDP flows (single datagrams with a v1 peer)."""

    def __init__(self, outcomes: Iterable[str]) -> None:
        self.begun = 0
        self.open = 0
        self.ended = dict.fromkeys(outcomes, 0)  # including those that could not begin; a Counter is slower
        self.up = Way()
        self.down = Way()

    def begin(self) -> None:
        self.begun += 1
        self.open += 1

    def end(self, outcome: str) -> None:
        self.open -= 1
        self.ended[outcome] += 1


class Stats:
    """What a tunnel has done since the process started."""

    def __init__(self) -> None:
        self.tcp = Sessions(TCP_OUTCOMES)
        self.udp = Sessions(UDP_OUTCOMES)
        self.connects = 0  # completed handshakes of control connections
        self.reconnects = 0  # of these, those after the first; on a client with several servers after each one's first
        self.data_connections = 0  # added to the pool
        self.found_empty = 0  # sessions that had to wait for a data connection
        self.control_failures = _zeros(CONTROL_FAILURES)
        self.data_failures = _zeros(DATA_FAILURES)
        self.udp_drops = _zeros(UDP_DROPS)
        self.visitors_refused = _zeros(REFUSALS)  # connections and datagrams
        self.trouble = _zeros(TROUBLE)  # other drops, rejections and failures, by kind
        self.target_failures: Counter[tuple[str, str]] = Counter()  # by target, and what failed: dial or check
        self.pool_waits = Histogram()
        self.target_dials = Histogram()
        self.data_dials = Histogram()
        self.first_bytes = Histogram()
        self.log_lines_lost = 0  # of the whole process
        self.access_lines_lost = 0  # likewise

    @property
    def bytes_up(self) -> int:
        """Payload bytes of both protocols."""
        return self.tcp.up.bytes + self.udp.up.bytes

    @property
    def bytes_down(self) -> int:
        """Payload bytes of both protocols."""
        return self.tcp.down.bytes + self.udp.down.bytes

    def snapshot(self) -> dict[str, int | dict[str, int]]:
        """The counters under their names; those by reason are mappings, of the reasons that have happened."""
        counts: dict[str, int | dict[str, int]] = {
            "tcp_sessions": self.tcp.begun,
            "udp_sessions": self.udp.begun,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "connects": self.connects,
            "data_connections": self.data_connections,
            "found_empty": self.found_empty,
        }
        by_reason: dict[str, Mapping[str, int]] = {
            "tcp_ended": self.tcp.ended,
            "udp_ended": self.udp.ended,
            "control_failures": self.control_failures,
            "data_failures": self.data_failures,
            "udp_drops": self.udp_drops,
            "visitors_refused": self.visitors_refused,
            "target_failures": {f"{what} {target}": count for (target, what), count in self.target_failures.items()},
            "trouble": self.trouble,
        }
        for name, counter in by_reason.items():
            counts[name] = {reason: count for reason, count in sorted(counter.items()) if count}
        return counts

    def __str__(self) -> str:
        parts: list[str] = []
        for name, value in self.snapshot().items():
            if isinstance(value, int):
                parts.append(f"{name} {value}")
            else:
                parts += [f"{_PREFIXES[name]}{reason} {count}" for reason, count in value.items()]
        return ", ".join(parts).replace("_", " ")


# In front of a reason, as text.
_PREFIXES = {
    "tcp_ended": "tcp: ",
    "udp_ended": "udp: ",
    "control_failures": "control handshake failed: ",
    "data_failures": "data connection failed: ",
    "udp_drops": "dropped: ",
    "visitors_refused": "visitors refused: ",
    "target_failures": "target failed: ",
    "trouble": "",
}


def _zeros(reasons: Iterable[str]) -> Counter[str]:
    """A counter with every reason at 0, so that Prometheus sees the first event as an increase."""
    return Counter(dict.fromkeys(reasons, 0))


def failure(error: OSError) -> str:
    """Why a connection failed, as one of CONTROL_FAILURES or DATA_FAILURES."""
    if isinstance(error, RefusedError):
        token = error.reason.replace("-", "_")
        return token if token in CONTROL_FAILURES else "other"  # the peer chose the token
    for kind, name in _FAILURES:
        if isinstance(error, kind):
            return name
    return "unreachable"


# The first that matches; TLSError and the others are ConnectionErrors, too.
_FAILURES: tuple[tuple[type[OSError], str], ...] = (
    (VerificationError, "certificate"),
    (TLSError, "tls"),
    (ProtocolError, "protocol"),
    (ProxyError, "proxy"),
    (ClosedError, "closed"),
    (TimeoutError, "timeout"),
    (ConnectionRefusedError, "unreachable"),
    (ConnectionError, "closed"),
)
