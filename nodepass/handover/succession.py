"""The old process, step by step: it starts a new one, which takes over, and lets what has begun here go on to its end.

Clients first: the new process takes their places, and needs nothing of this one but what they call themselves. Then
the servers: they stop to accept, see that accepted visitors have their data connections, and tell their clients to
connect to the new process, which begins to accept at that moment; until then visitors wait in the kernel's queue. A
failure before that is logged, and everything is as it was. `daemon` begins this at SIGUSR2.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import gevent

from nodepass.errors import StartError
from nodepass.handover.sender import Handover
from nodepass.log import Log
from nodepass.net.activation import PassedSocket
from nodepass.tasks import TaskGroup
from nodepass.tunnel.interface import Tunnel
from nodepass.tunnel.traffic import Meter
from nodepass.tunnel.traffic_file import Counts

START_WITHIN = 60.0  # seconds for the new process to be ready; on a small machine it may start slowly
ADD_EVERY = 1.0  # seconds between two messages about the traffic of sessions that still run


class Holder(Protocol):
    """What has a tunnel."""

    @property
    def tunnel(self) -> Tunnel:
        """The present one."""


class Endpoint(Protocol):
    """The metrics endpoint."""

    @property
    def listeners(self) -> list[PassedSocket]:
        """What another process needs to answer at the same address."""

    def hand_over(self) -> None:
        """Answer no more."""


class Succession:
    """The handover of this process. `is_over`: another one has taken over."""

    def __init__(
        self, holders: Sequence[Holder], endpoint: Endpoint | None, log: Log, tasks: TaskGroup, announce: Announce
    ) -> None:
        """`announce` tells the service manager which process is the service from now on."""
        self.is_over = False
        self.process = 0  # the id of the new one
        self._holders = holders
        self._endpoint = endpoint
        self._log = log
        self._tasks = tasks
        self._announce = announce
        self._is_cancelled = False
        self._handover: Handover | None = None  # while one is under way, and from then on

    def run(self) -> bool:
        """Whether a new process has taken over. Raises StartError where this one cannot go on either."""
        if why := self._find_obstacle():
            self._log.warning("process.handover_refused", "SIGUSR2: %(error)s; this process goes on", error=why)
            return False
        self._log.info("process.handover", "SIGUSR2: starting the program again, which then takes over")
        try:
            self._handover = handover = Handover()
            self._start(handover)
        except StartError as error:
            if not self._is_cancelled:
                self._go_on(error)
            return False
        self._each(lambda tunnel: tunnel.end_accepting())
        self._each(lambda tunnel: tunnel.hand_over())
        counts: dict[str, Counts] = {}
        self._each(lambda tunnel: counts.update(_end_counting(tunnel)))
        if self._is_cancelled:
            return False
        self.process = handover.process
        self._announce(self.process)
        try:
            handover.begin(counts)
        except StartError:
            for meter in self._meters():
                meter.keep()
            raise
        self.is_over = True
        if self._endpoint:
            self._endpoint.hand_over()
        self._tasks.spawn("count traffic for the new process", self._count_forever)
        return True

    def _go_on(self, error: StartError) -> None:
        """Be as before: the new process cannot take over."""
        handover, self._handover = self._handover, None
        if handover:
            handover.abandon()
        self._each(lambda tunnel: tunnel.keep_places())
        self._log.error("process.handover_failed", "%(error)s; this process goes on", error=error)

    def cancel(self) -> None:
        """This process stops: no other one is to take over, unless it has already."""
        if self._handover and not self.is_over:
            self._is_cancelled = True
            self._handover.abandon()

    def count(self) -> None:
        """Tell the new process what sessions have moved since the last time."""
        moved = {meter.path: count for meter in self._meters() if (count := meter.take_moved())}
        if moved and self._handover:
            self._handover.add(moved)

    def _meters(self) -> list[Meter]:
        return [each.tunnel.meter for each in self._holders if each.tunnel.meter]

    def _find_obstacle(self) -> str:
        if self.is_over:
            return f"process {self.process} has taken over already"
        if self._handover:
            return "a new process is starting already"
        if os.getpid() == 1:
            return "this is process 1, and what it runs in ends with it"
        return ""

    def _start(self, handover: Handover) -> None:
        tunnels = [each.tunnel for each in self._holders]
        sockets = [each for tunnel in tunnels for each in tunnel.listeners]
        if self._endpoint:
            sockets += self._endpoint.listeners
        unique = {each.sock.fileno(): each for each in sockets}  # tunnels share ports
        locks = {meter.path: meter.lock for meter in self._meters() if meter.lock is not None}
        clients = [tunnel.client_id for tunnel in tunnels]
        handover.start(list(unique.values()), locks, clients, START_WITHIN)
        peers = [len(each.tunnel.view().peers) if each.tunnel.client_id else 0 for each in self._holders]
        self._each(lambda tunnel: tunnel.offer_places())
        handover.connect(peers, START_WITHIN)

    def _each(self, step: Callable[[Tunnel], None]) -> None:
        """Take a step with all tunnels at once, and wait for the slowest."""
        gevent.joinall([self._tasks.spawn("hand over", step, each.tunnel) for each in self._holders])

    def _count_forever(self) -> None:
        while True:
            gevent.sleep(ADD_EVERY)
            self.count()


Announce = Callable[[int], object]


def _end_counting(tunnel: Tunnel) -> dict[str, Counts]:
    """The new process writes the file of TRAFFIC_LIMIT from now on: what it goes on with."""
    return {tunnel.meter.path: tunnel.meter.hand_over()} if tunnel.meter else {}
