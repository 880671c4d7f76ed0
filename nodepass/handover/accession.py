"""The new process, step by step: its clients take the places of those before, then its servers wait for their turn.

The mirror of `succession`. `daemon` has opened before what must be open, and what can fail fails here: until
`wait_for_turn` returns the old process can go on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import gevent
from gevent import Greenlet

from nodepass.errors import StartError
from nodepass.handover import succession
from nodepass.handover.receiver import Takeover
from nodepass.log import Log
from nodepass.tasks import TaskGroup
from nodepass.tunnel.traffic import Meter

LOOK_EVERY = 0.02  # seconds between two looks whether clients are connected


class Holder(succession.Holder, Protocol):
    """What has a tunnel, and runs it."""

    def begin(self) -> None:
        """Have the tunnel run from now on."""


class Accession:
    """Takes over from another process."""

    def __init__(self, takeover: Takeover, holders: Sequence[Holder], log: Log, tasks: TaskGroup) -> None:
        self._takeover = takeover
        self._holders = holders
        self._log = log
        self._tasks = tasks
        self._counting: Greenlet[..., None] | None = None

    @property
    def is_counting(self) -> bool:
        """Whether traffic of the process before may still have to be passed on to the next one."""
        return self._counting is not None and not self._counting.ready()

    def run(self, timeout: float) -> None:
        """Return when the servers may accept. Clients connect within `timeout` seconds. Raises StartError."""
        takeover, legacy = self._takeover, self._takeover.legacy
        peers = takeover.wait_to_connect()
        for holder, id in zip(self._holders, legacy.clients, strict=True):
            if id:
                holder.begin()
        self._wait_for_peers(peers, timeout)
        takeover.report_ready()
        counts = takeover.wait_for_turn()
        meters = {meter.path: meter for holder in self._holders if (meter := holder.tunnel.meter)}
        for path, count in counts.items():
            meters[path].take_over(count)
        counting = self._tasks.spawn("count the old sessions' traffic", self._count, meters)
        self._counting = counting if meters else None
        self._log.info("process.took_over", "took over from process %(process)d", process=legacy.process)

    def _wait_for_peers(self, wanted: Sequence[int], timeout: float) -> None:
        """Return when each client has as many servers as the one before, or after `timeout` where it has any."""
        deadline = time.monotonic() + timeout
        for tunnel, number in zip((each.tunnel for each in self._holders), wanted, strict=True):
            while number and len(tunnel.view().peers) < number and time.monotonic() < deadline:
                gevent.sleep(LOOK_EVERY)
            if number and not tunnel.view().peers:
                status = f"{tunnel.log.tunnel}: no handshake within {timeout:.3g}s: {tunnel.status()}"
                raise StartError(status)

    def _count(self, meters: Mapping[str, Meter]) -> None:
        """Count what the sessions of the process before still move."""
        for moved in self._takeover.additions():
            for path, count in moved.items():
                meters[path].add(count)
