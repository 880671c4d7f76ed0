"""What the process asks of a tunnel, and what it shows of itself: server and client are the two that answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gevent.event import Event

from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import WorkerPool
from nodepass.tunnel.control import Control


@dataclass(frozen=True)
class View:
    """What a tunnel is like at this moment."""

    role: str  # server or client
    unready: str  # why it could not serve a session now; nothing where it could
    peer: str  # the other end's address; nothing while it is not connected
    wire: int  # the version that the two speak, 0 likewise
    round_trip: float | None  # seconds
    pool_idle: int  # data connections
    pool_capacity: int
    slots_used: int  # of SEMAPHORE_LIMIT
    slots: int
    flows: int  # of UDP
    certificate_expiry: float | None  # Unix time


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
        "counters": stats.snapshot(),
    }


@dataclass(frozen=True)
class Watched:
    """A tunnel as its process sees it."""

    name: str
    stats: Stats
    view: View
    alive: bool  # whether somebody would start it again


class Observed(Protocol):
    """What is asked of a tunnel."""

    log: Log
    ready: Event

    def status(self) -> str:
        """How it is, for an operator."""

    def unhealthy_reason(self) -> str:
        """What is wrong with it, so that only a restart helps; empty while it is well."""


class Tunnel(Observed, Protocol):
    """What the process asks of a tunnel, in this order: start, run, stop, close."""

    stats: Stats
    sessions: WorkerPool

    @property
    def control(self) -> Control | None:
        """The control connection to its peer, while there is one."""

    def start(self) -> None:
        """Open what must be there at start. Raises ListenError."""

    def run(self) -> None:
        """Serve until closed; raises what crashed it."""

    def stop(self, timeout: float) -> int:
        """Take no new sessions, let running ones end within `timeout` seconds, cut the rest; how many those were."""

    def close(self) -> None:
        """End everything at once."""

    def reload(self) -> None:
        """Look at files again."""

    def describe(self) -> str:
        """One line for an operator."""

    def view(self) -> View:
        """What the metrics show of it at this moment."""
