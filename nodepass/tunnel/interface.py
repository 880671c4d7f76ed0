"""What the process asks of a tunnel, and what a tunnel shows of itself.

`server.Server` and `client.Client` are tunnels. `daemon` starts, runs, stops and closes them; `notifier` and `metrics`
read how they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gevent.event import Event

from nodepass.config.kinds import Rate
from nodepass.log import Log
from nodepass.net.activation import PassedSocket
from nodepass.stats import Stats
from nodepass.tasks import WorkerPool
from nodepass.tunnel.security import Security, summarize
from nodepass.tunnel.traffic import Meter

# What a server, and the process, listens for. A socket unit of systemd may name its sockets so (FileDescriptorName=).
TUNNEL, DATA, TARGET, METRICS = LISTENER_ROLES = ("tunnel", "data", "target", "metrics")

NO_DATA_CONNECTIONS = "no data connections"  # why an end is unready


@dataclass(frozen=True)
class TargetState:
    """One of a client's targets at this moment."""

    name: str  # its address, as in the URL
    is_up: bool
    sessions: int  # and flows
    failure: str  # of the last dial, check or lookup, or ""


@dataclass(frozen=True)
class View:
    """A tunnel at this moment, for metrics and the log."""

    role: str  # server or client
    unready: str  # why it could not serve a session now, or ""
    peers: tuple[tuple[str, int], ...]  # the address of each other end that is connected, and its version of the wire
    places: int  # for other ends
    round_trip: float | None  # seconds; of several the longest
    pool_idle: int  # data connections
    pool_capacity: int
    slots_used: int  # of SEMAPHORE_LIMIT
    slots: int
    flows: int  # of UDP
    certificate_expiry: float | None  # Unix time
    security: Security
    protocols: tuple[str, ...]  # that are carried: tcp, udp, or both
    rates: Mapping[str, Rate]  # limits, by direction: up, down
    traffic_used: int | None  # bytes of this day or month, where TRAFFIC_LIMIT is set
    traffic_limit: int | None  # bytes
    targets: tuple[TargetState, ...] = ()  # of a client

    @property
    def peer(self) -> str:
        """The addresses of the other ends, "" while none is connected."""
        return ", ".join(host for host, _ in self.peers)

    @property
    def wire(self) -> int:
        """The version of the wire that both ends speak, 0 while none is connected."""
        return max((version for _, version in self.peers), default=0)


def name_protocols(protocols: Sequence[str]) -> str:
    """For the end of a status: `, udp only`, or nothing where both are carried."""
    return f", {protocols[0]} only" if len(protocols) == 1 else ""


def report_fields(view: View, stats: Stats) -> dict[str, object]:
    """A line of statistics as fields of the log."""
    return {
        "peer": view.peer,
        "wire": view.wire,
        "round_trip": view.round_trip,
        "pool_idle": view.pool_idle,
        "pool_capacity": view.pool_capacity,
        "sessions": view.slots_used,
        "flows": view.flows,
        "security": summarize(view.security),
        "counters": stats.snapshot(),
    }


@dataclass(frozen=True)
class Watched:
    """A tunnel as its process sees it."""

    name: str
    stats: Stats
    view: View
    alive: bool  # whether its supervisor is running


class Observed(Protocol):
    """How a tunnel is."""

    @property
    def log(self) -> Log:
        """Its own, which names it."""

    @property
    def ready(self) -> Event:
        """Set once it can serve."""

    def status(self) -> str:
        """How it is, for an operator: one line."""

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""."""


class Tunnel(Observed, Protocol):
    """What the process asks of a tunnel, in this order: start, run, stop, close."""

    stats: Stats
    sessions: WorkerPool
    meter: Meter | None

    def start(self) -> None:
        """Open what must be open from the beginning. Raises ListenError."""

    def run(self) -> None:
        """Serve until `close`; raises what crashed it."""

    def stop(self, timeout: float) -> int:
        """Begin no sessions, let running ones end within `timeout` seconds, cut the rest; how many those were."""

    def close(self) -> None:
        """End everything at once."""

    def reload(self) -> None:
        """Read files again, and take the keys that the tunnel has now; a peer whose key is gone is ended at once."""

    def describe(self) -> str:
        """One line for an operator."""

    # Where another process takes over, in this order; `keep_places` where it does not after all.

    @property
    def client_id(self) -> str:
        """What a client calls itself, which the other process must, too; "" for a server."""

    @property
    def listeners(self) -> list[PassedSocket]:
        """What a server listens with, which the other process must have."""

    def offer_places(self) -> None:
        """A client does not come back to servers where the other process takes its place."""

    def keep_places(self) -> None:
        """It does again."""

    def end_accepting(self) -> None:
        """A server accepts no visitors any more; those that it has accepted have their data connections at the end."""

    def hand_over(self) -> None:
        """A server tells its clients to connect to the other process; sessions go on, until `stop`."""

    def view(self) -> View:
        """How it is at this moment."""
