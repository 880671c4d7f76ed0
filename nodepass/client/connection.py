"""A client's attachment to its server: what it has while one control connection lasts.

Signals are read into a bounded queue and dispatched to launch handlers under the semaphore. What outlives the control
connection, running sessions above all, belongs to the client and is only used here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gevent
from gevent import Greenlet
from gevent.queue import Full, Queue

from nodepass.client.data_dialer import Backoff, DataDialer, Route
from nodepass.client.pool import ClientPool
from nodepass.client.target import Target
from nodepass.client.udp_flows import TargetFlows
from nodepass.config import Settings
from nodepass.errors import NoDataConnection, ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.relay import relay
from nodepass.net.stream import Stream, TCPStream
from nodepass.stats import Stats, failure
from nodepass.tasks import TaskGroup, WorkerPool, find_ended
from nodepass.tunnel.control import STOPPING, ClientControl
from nodepass.tunnel.udp import ask_target, read_datagram
from nodepass.wire.signals import KIND_NAMES, LANE, TCP, Launch

SIGNALS_WAITING = 1024  # launches that may wait for a slot, at least
LANES_AT_MOST = 256  # a server has 64 at most (UDP_LANES), and those of its last connections may still run
LAST_LAUNCHES = 1.0  # seconds for launches that were read before the end to begin


@dataclass(frozen=True)
class Lasting:
    """What a client keeps over reconnects."""

    settings: Settings
    log: Log
    stats: Stats
    target: Target
    sessions: WorkerPool
    lanes: TaskGroup  # apart from the sessions: a lane has no end of its own, so a shutdown does not wait for it
    flows: TargetFlows
    on_crash: Callable[[Exception], object]  # told of a bug in a loop, which ends the tunnel


class Connection:
    """What a client has while it is connected: control connection, pool with its filler, queue of launches."""

    def __init__(
        self, lasting: Lasting, control: ClientControl, route: Route, log_statistics: Callable[[], None]
    ) -> None:
        settings = self._settings = lasting.settings
        self._lasting = lasting
        self._log, self._stats = lasting.log, lasting.stats
        self._control = control
        self._log_statistics = log_statistics
        self._launches: Queue[tuple[Launch, float] | None] = Queue(max(SIGNALS_WAITING, settings.semaphore_limit))
        self._tasks = TaskGroup(self._log, self._stats, on_crash=lasting.on_crash)
        self.pool = ClientPool(self._log, self._stats, settings.min_pool_capacity, settings.max_pool_capacity)
        backoff = Backoff(settings.service_cooldown)
        self._filler = DataDialer(self.pool, route.make, backoff, self._log, self._stats)
        self._watched: list[Greenlet[..., None]] = []  # loops that end only with the control connection

    def run(self) -> None:
        """Serve launches until the control connection ends."""
        reader = self._tasks.spawn("read signals", self._read_signals)
        dispatcher = self._tasks.spawn("dispatch signals", self._dispatch_signals)
        filler = self._tasks.spawn("fill pool", self._filler.run)
        self._watched = [dispatcher, filler, self._tasks.spawn("report", self._report)]
        try:
            reader.join()
            self._watched = []  # from here on they end in good order
            # Not for ever: a launch may wait for a slot, and the server for us.
            with contextlib.suppress(TimeoutError), gevent.Timeout(LAST_LAUNCHES, TimeoutError()):
                self._launches.put(None)
                dispatcher.join()
            gevent.sleep(0)  # the launches dispatched last claim their connections before the pool is flushed
        finally:
            self._control.close(STOPPING)
            self._tasks.kill()
            self._filler.dials.kill()
            self.pool.close("the control connection ended")

    def unhealthy_reason(self) -> str:
        """What is wrong with this end, while the control connection lasts; empty while it is well."""
        return find_ended(self._watched) or self._control.unhealthy_reason()

    def _read_signals(self) -> None:
        for launch in self._control.launches():
            self._log.debug(
                "launch.received", "signal: launch %(id)s as %(kind)s", id=launch.id, kind=KIND_NAMES[launch.kind]
            )
            self.pool.reserve(launch.id)
            if launch.kind == LANE:
                self._open_lane(launch.id)
                continue
            try:
                self._launches.put_nowait((launch, time.monotonic()))
            except Full:
                self._drop(launch.id, "limit", "too many wait for a slot already")

    def _open_lane(self, id: str) -> None:
        """At once: a lane takes no slot. A server that means well has few."""
        if len(self._lasting.lanes) < LANES_AT_MOST:
            self._lasting.lanes.spawn("lane", self._launch, self._lasting.flows.run_lane, id)
        else:
            self._drop(id, "lanes", f"there are {LANES_AT_MOST} lanes already")

    def _drop(self, id: str, why: str, because: str) -> None:
        self._stats.trouble["launches_dropped"] += 1
        words = "launch dropped: %(error)s"
        self._log.warning("launch.dropped", words, Limit(why), id=id, reason=why, error=because)
        self.pool.drop(id)

    def _dispatch_signals(self) -> None:
        while waiting := self._launches.get():
            launch, began = waiting
            handler = partial(self._launch_tcp, began) if launch.kind == TCP else self._launch_udp
            self._lasting.sessions.spawn("launch", self._launch, handler, launch.id)

    def _launch(self, handler: Callable[[Stream, Log], None], id: str) -> None:
        try:
            data = self.pool.claim(id, self._settings.handshake_timeout)
        except NoDataConnection as error:
            self._stats.trouble["launches_unknown"] += 1
            self._log.warning("launch.unknown", "launch ignored: %(error)s", Limit(), id=id, error=error)
            return
        try:
            handler(data, self._log.session(id))
        finally:
            data.close()

    def _launch_tcp(self, began: float, data: Stream, log: Log) -> None:
        dialled = time.monotonic()
        try:
            sock = self._lasting.target.dial(self._settings.handshake_timeout)
        except OSError as error:
            self._stats.tcp.ended["unreachable"] += 1
            why = reason(error)
            self._log.warning(
                "target.unreachable",
                "cannot reach the target: %(error)s",
                Limit(why, burst=1),
                target=self._lasting.target,
                reason=failure(error),
                error=why,
            )
            return  # closing the data connection resets it, so the visitor is refused, too
        log.debug("target.connected", "target %(target)s connected", target=self._lasting.target)
        self._stats.target_dials.observe(time.monotonic() - dialled)
        traffic = relay(data, TCPStream(sock), self._stats, began)
        log.debug(
            "session.closed", "target %(target)s: " + traffic.SENTENCE, target=self._lasting.target, **traffic.fields()
        )

    def _launch_udp(self, data: Stream, log: Log) -> None:
        largest, timeout = self._settings.udp_data_buf_size, self._settings.udp_read_timeout
        data.reset_on_close(False)  # a reset could overtake the answer
        udp, outcome = self._stats.udp, "unanswered"
        udp.begin()
        try:
            question = read_datagram(data, largest, timeout)
            udp.up.bytes += len(question)
            with contextlib.closing(self._lasting.target.dial_udp()) as sock:
                answer = ask_target(sock, question, largest, timeout)
            data.write(answer)
            data.half_close()
        except ProtocolError as error:
            self._stats.udp_drops["too_large"] += 1
            self._log.warning(
                "datagram.dropped", "dropped: %(error)s", Limit("too_large"), reason="too_large", error=error
            )
        except OSError as error:
            words = "datagram unanswered: %(error)s"
            self._log.warning("datagram.unanswered", words, Limit(), reason=failure(error), error=reason(error))
        else:
            outcome = "completed"
            udp.down.bytes += len(answer)
            log.debug(
                "datagram.answered",
                "target %(target)s: %(asked)d bytes asked, %(answered)d bytes answered",
                target=self._lasting.target,
                asked=len(question),
                answered=len(answer),
            )
        finally:
            udp.end(outcome)

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self.pool.end_interval()
            self._log.report_suppressed()
            self._log_statistics()
