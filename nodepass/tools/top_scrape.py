"""How `nodepass top` scrapes a running process: its metrics over HTTP, read into one `Tunnel` each.

Knows the names of the metrics (`metrics.families`) and nothing about how they are shown. The response is not trusted:
its size and time are limited, and its texts are made printable. prometheus_client is imported with the first response.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from nodepass.config.hostport import split_host_port
from nodepass.config.urls import Address
from nodepass.errors import ConfigError, NodepassError
from nodepass.tunnel.security import abbreviate

TIMEOUT = 5.0  # seconds for one response
LARGEST = 4 << 20  # bytes: some 400 tunnels; parsing takes a second for each megabyte
MOST = 2.0**63  # of a sample: no sum of those that fit into an answer, and no rate, becomes infinite
ALLOWED = "HOST:PORT, http://HOST:PORT/metrics, unix:/PATH or a path"


class NoAnswer(NodepassError):
    """The endpoint does not respond, or is not nodepass's."""


@dataclass(frozen=True)
class Source:
    """An endpoint: a Unix socket's path, or a host and a port."""

    host: str
    port: int
    path: str = "/metrics"
    socket_path: str = ""

    def __str__(self) -> str:
        return f"unix:{self.socket_path}" if self.socket_path else f"http://{Address(self.host, self.port)}{self.path}"

    def fetch(self) -> str:
        """The present text. Raises NoAnswer."""
        try:
            with contextlib.closing(self._connection()) as connection:
                connection.connect()
                with _cut_off(connection.sock):
                    connection.request("GET", self.path)
                    response = connection.getresponse()
                    body = response.read(LARGEST + 1)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise NoAnswer(f"{self}: {_words(error)}") from None
        if response.status == http.HTTPStatus.MISDIRECTED_REQUEST:
            raise NoAnswer(f"{self}: {_printable(body[:200].decode('ascii', 'replace').strip())}")
        if response.status != 200:
            raise NoAnswer(f"{self}: not an endpoint of nodepass (HTTP {response.status})")
        if len(body) > LARGEST:
            raise NoAnswer(f"{self}: an answer of more than {LARGEST >> 20} MiB")
        return body.decode("utf-8", "replace")

    def _connection(self) -> http.client.HTTPConnection:
        if self.socket_path:
            return _UnixConnection(self.socket_path)
        return http.client.HTTPConnection(self.host, self.port, timeout=TIMEOUT)


@contextlib.contextmanager
def _cut_off(sock: socket.socket) -> Iterator[None]:
    """Cut off a connection whose response is not complete after TIMEOUT; the socket's own timeout is per read.

    Raises TimeoutError then.
    """
    is_late = threading.Event()

    def cut() -> None:
        is_late.set()
        with contextlib.suppress(OSError):  # it has just ended
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not is_late.is_set():
            raise
    finally:
        timer.cancel()
    if is_late.is_set():
        raise TimeoutError(f"no complete answer within {TIMEOUT:g} s")


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def parse_source(text: str) -> Source:
    """Parse an endpoint as a user writes it. Raises ConfigError."""
    if text.startswith(("unix:", "/", "./")):
        return Source("", 0, socket_path=text.removeprefix("unix:"))
    address, _, path = text.removeprefix("http://").partition("/")
    try:
        host, port = split_host_port(address, lowest_port=1)
        if not (path.isascii() and path.isprintable()) or " " in path:
            raise ValueError("a path is printable ASCII without spaces")
    except ValueError:
        raise ConfigError(f"{text!r} is not a metrics endpoint; allowed: {ALLOWED}") from None
    return Source(host or "localhost", port, f"/{path or 'metrics'}")


@dataclass
class Tunnel:
    """The numbers of one tunnel at one moment; counts and bytes are since it started."""

    name: str
    ready: bool = False
    peer: str = ""  # one of those that are connected
    peers: int = 0  # places for them
    peers_connected: int = 0
    security: str = ""  # as `security.abbreviate` has it
    round_trip: float | None = None  # seconds
    pool_idle: int = 0
    pool_capacity: int = 0
    tcp_open: int = 0
    udp_open: int = 0
    ended: float = 0.0  # sessions, and of them
    failed: float = 0.0  # all but the completed
    up: float = 0.0  # bytes
    down: float = 0.0
    rate_up: float | None = None  # the limit of the rate, bytes per second; None: there is none
    rate_down: float | None = None
    traffic_used: float = 0.0  # bytes
    traffic_limit: float | None = None  # bytes
    drops: float = 0.0  # datagrams
    targets: int = 0  # of a client, and of them
    targets_up: float = 0
    refused: float = 0.0  # visitors
    handshakes_failed: float = 0.0


@dataclass
class Scrape:
    """One response."""

    taken: float  # time.monotonic()
    version: str = ""
    started: float | None = None  # Unix time
    memory: float | None = None  # bytes
    cpu: float | None = None  # seconds
    tunnels: dict[str, Tunnel] = field(default_factory=dict)


def take(source: Source) -> Scrape:
    """Scrape once. Raises NoAnswer; ImportError where prometheus_client is not installed."""
    from prometheus_client.parser import text_string_to_metric_families

    text = source.fetch()
    try:
        samples = [
            (sample.name, {key: _printable(label) for key, label in sample.labels.items()}, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if abs(sample.value) <= MOST  # nodepass exports no others; NaN is not among them either
        ]
    except (ValueError, KeyError, IndexError):
        samples = []
    if not any(name == "nodepass_build_info" for name, _, _ in samples):
        raise NoAnswer(f"{source}: not an endpoint of nodepass")
    return _read(samples)


def _read(samples: list[tuple[str, dict[str, str], float]]) -> Scrape:
    scrape = Scrape(time.monotonic())
    tunnels: defaultdict[str, Tunnel] = defaultdict(lambda: Tunnel(""))
    for name, labels, value in samples:
        if "tunnel" in labels:
            _add(tunnels[labels["tunnel"]], name.removeprefix("nodepass_"), labels, value)
        elif name == "nodepass_build_info":
            scrape.version = labels.get("version", "")
        elif name == "process_start_time_seconds":
            scrape.started = value
        elif name == "process_resident_memory_bytes":
            scrape.memory = value
        elif name == "process_cpu_seconds_total":
            scrape.cpu = value
    for name, tunnel in tunnels.items():
        tunnel.name = name
    scrape.tunnels = dict(tunnels)
    return scrape


_WHOLE = {
    "pool_idle_connections": "pool_idle",
    "pool_capacity_connections": "pool_capacity",
    "peers": "peers",
    "peers_connected": "peers_connected",
    "traffic_used_bytes": "traffic_used",
    "traffic_limit_bytes": "traffic_limit",
}
_SUMS = {
    "udp_drops_total": "drops",
    "visitors_refused_total": "refused",
    "handshake_failures_total": "handshakes_failed",
    "sessions_total": "ended",
    "target_up": "targets_up",
}


def _add(tunnel: Tunnel, name: str, labels: dict[str, str], value: float) -> None:
    if name in _WHOLE:
        setattr(tunnel, _WHOLE[name], int(value))
    elif name in _SUMS:
        tunnel.targets += name == "target_up"
        setattr(tunnel, _SUMS[name], getattr(tunnel, _SUMS[name]) + value)
    if name == "sessions_total" and labels.get("outcome") != "completed":
        tunnel.failed += value
    elif name == "sessions_open" and labels.get("protocol") in ("tcp", "udp"):
        setattr(tunnel, f"{labels['protocol']}_open", int(value))
    elif labels.get("direction") in ("up", "down"):
        _add_direction(tunnel, name, labels["direction"], value)
    elif name == "ready":
        tunnel.ready = value == 1
    elif name == "tunnel_info" and "key" in labels:
        mode = int(labels["tls"]) if labels.get("tls") in ("0", "1", "2") else None
        tunnel.security = abbreviate(labels["key"] == "yes", mode)
    elif name == "peer_info":
        tunnel.peer = labels.get("peer", "")
    elif name == "round_trip_seconds":
        tunnel.round_trip = value


def _add_direction(tunnel: Tunnel, name: str, direction: str, value: float) -> None:
    if name == "bytes_total":
        setattr(tunnel, direction, getattr(tunnel, direction) + value)
    elif name == "rate_limit_bytes_per_second":
        setattr(tunnel, f"rate_{direction}", value)


def _printable(text: str) -> str:
    """The text without control characters, which a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _words(error: Exception) -> str:
    if isinstance(error, http.client.HTTPException) and not isinstance(error, http.client.InvalidURL):
        return "not an HTTP server"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
