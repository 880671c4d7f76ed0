"""What a client has while one control connection lasts: the pool, its dialer, and the queue of launches.

`connector` makes a `Connection` after each handshake and runs it until the control connection ends. Launches are read
into a bounded queue at once, so that heartbeats behind them are answered in time, and handed to `launches` when there
is a slot. What outlives the control connection is not here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import gevent
from gevent import Greenlet
from gevent.queue import Full, Queue

from nodepass.client.data_dialer import DataDialer, Route
from nodepass.client.launches import LANES_AT_MOST, ServerLaunches
from nodepass.client.pool import ClientPool
from nodepass.log import Limit
from nodepass.tunnel.control import STOPPING, ClientControl
from nodepass.tunnel.part import Common, Loop, Part
from nodepass.wire.signals import KIND_NAMES, LANE, TCP, Beat, Launch

LAUNCHES_WAITING = 1024  # launches that may wait for a slot, at least
LAST_LAUNCHES = 1.0  # seconds for launches that were read before the end to begin


class Connection(Part):
    """One control connection from its handshake to its end."""

    def __init__(
        self,
        common: Common,
        control: ClientControl,
        pool: ClientPool,
        route: Route,
        launches: ServerLaunches,
        log_statistics: Callable[[], None],
    ) -> None:
        super().__init__(common)
        self.control = control
        self.pool = pool
        self._route = route
        self._launches = launches
        self._log_statistics = log_statistics
        # With the time at which each was read; None is the end.
        self._queue: Queue[tuple[Launch, float] | None] = Queue(max(LAUNCHES_WAITING, common.settings.semaphore_limit))
        self._reader: Greenlet[..., None] | None = None
        self.dialer = DataDialer(common, self.pool, route)
        self._parts: list[Part] = [self.dialer, Loop(common, "report", self._report)]

    def run(self) -> None:
        """Serve launches until the control connection ends."""
        try:
            self._reader = self._start_loop("read signals", self._read_signals)
            dispatcher = self._start_loop("dispatch launches", self._dispatch)
            if self.control.version > 1:
                self._start_loop("report the targets", self._report_targets)
            for part in self._parts:
                part.start()
            self._reader.join()
            # Not without a limit: a launch may wait for a slot, and the server for this end to close.
            with contextlib.suppress(TimeoutError), gevent.Timeout(LAST_LAUNCHES, TimeoutError()):
                self._queue.put(None)
                dispatcher.join()
            gevent.sleep(0)  # the launches dispatched last claim their connections before the pool is closed
        finally:
            self.close()

    def close(self) -> None:
        """End the control connection and all that lasts only as long."""
        self.control.close(STOPPING)
        super().close()
        for part in self._parts:
            part.close()
        self._route.close()
        self.pool.close("the control connection ended")

    def find_ended(self) -> str:
        """As `Part.find_ended`; once the control connection has ended, the loops end in good order."""
        if not self._is_read:
            return ""
        return super().find_ended() or next(filter(None, (part.find_ended() for part in self._parts)), "")

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""; not while it ends: a server chooses when, and launches can delay that."""
        return self.find_ended() or (self.control.unhealthy_reason() if self._is_read else "")

    @property
    def _is_read(self) -> bool:
        return self._reader is not None and not self._reader.dead

    def _read_signals(self) -> None:
        for launch in self.control.signals(lambda: self._launches.targets.answers):
            if isinstance(launch, Beat):
                self.pool.compare(launch.idle)
                continue
            self._log.debug(
                "launch.received", "received launch %(id)s (%(kind)s)", id=launch.id, kind=KIND_NAMES[launch.kind]
            )
            self.pool.reserve(launch.id)
            if refusal := self._find_refusal(launch):
                self._drop(launch.id, *refusal)
                continue
            if launch.kind == LANE:
                if not self._launches.begin_lane(self.pool, launch):
                    self._drop(launch.id, "lanes", f"{LANES_AT_MOST} lanes are open already")
                continue
            try:
                self._queue.put_nowait((launch, time.monotonic()))
            except Full:
                self._drop(launch.id, "limit", "too many launches are waiting for a slot")

    def _find_refusal(self, launch: Launch) -> tuple[str, str] | None:
        """Why this client serves no such launch: a token and words. A lane carries flows that run, too."""
        if not (self._settings.tcp if launch.kind == TCP else self._settings.udp):
            protocol = "tcp" if launch.kind == TCP else "udp"
            return f"{protocol}_off", f"{protocol.upper()}=off on this client"
        if launch.kind != LANE and self.common.meter and self.common.meter.is_used_up:
            return "traffic_limit", "TRAFFIC_LIMIT of this client is used up"
        return None

    def _report_targets(self) -> None:
        """Tell a v2 server at once when no target answers any more, and when one does again."""
        targets = self._launches.targets
        while True:
            changed = targets.changed  # before they are looked at: what changes meanwhile ends the wait
            self.control.tell(targets.answers)
            changed.wait()

    def _drop(self, id: str, why: str, because: str) -> None:
        """Leave a launch unserved; the close of its data connection tells the server."""
        self._stats.trouble["launches_dropped"] += 1
        words = "launch dropped: %(error)s"
        self._log.warning("launch.dropped", words, Limit(why), id=id, reason=why, error=because)
        self.pool.drop(id)

    def _dispatch(self) -> None:
        while waiting := self._queue.get():
            launch, began = waiting
            self._launches.begin_session(self.pool, launch, began)

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self.pool.end_interval()
            self._log.report_suppressed()
            self._log_statistics()
