"""The client's story: it keeps a control connection to its server, keeps the pool full, serves launches."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import gevent
from gevent.event import AsyncResult, Event

from nodepass.client.connection import Connection, Lasting
from nodepass.client.data_dialer import Backoff, Route
from nodepass.client.target import Target
from nodepass.client.udp_flows import TargetFlows
from nodepass.config import Settings
from nodepass.errors import RefusedError, reason
from nodepass.log import Limit, Log, literal
from nodepass.net.sockets import as_blocking, dial, resolve
from nodepass.stats import Stats, failure
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.control import STOPPING, Agreement, ClientControl
from nodepass.tunnel.handshake import connect_to_server
from nodepass.tunnel.interface import View, report_fields
from nodepass.urls import ClientURL
from nodepass.wire.auth import Key

if TYPE_CHECKING:
    from OpenSSL import SSL

SETTLED = 1.0  # seconds that a control connection must last for the next reconnect to begin with the shortest pause
REPEAT_WARNING = 60.0  # seconds between two warnings about the same failure to connect
FAREWELL = 1.0  # seconds for the server to end its side of the control connection when we leave


class Client:
    """One tunnel's client: `start`, `run`, then `stop` and `close`; `interface.Tunnel` says who calls what."""

    def __init__(self, url: ClientURL, settings: Settings, key: Key | None, log: Log, stats: Stats) -> None:
        self.log = log
        self.stats = stats
        self.sessions = WorkerPool(log, stats, settings.semaphore_limit)
        self._url = url
        self._key = key
        self._settings = settings
        target = Target(url.target)
        flows = TargetFlows(target.dial_udp, settings, log, stats)
        self._failed: AsyncResult[None] = AsyncResult()
        self._loops = TaskGroup(log, stats, on_crash=self._failed.set_exception)
        self._lasting = Lasting(
            settings, log, stats, target, self.sessions, TaskGroup(log, stats), flows, self._failed.set_exception
        )
        self._stopping = Event()
        self._ended = Event()
        self.control: ClientControl | None = None  # to the server, while it is connected
        self.ready = Event()  # a handshake has succeeded
        self._connection: Connection | None = None
        self._failure = "no answer yet"  # why there is no connection

    def start(self) -> None:
        """Nothing to open: whatever a client needs is retried."""

    def run(self) -> None:
        """Connect, serve, and connect again, until `stop`; raises what crashed one of the loops."""
        self._loops.spawn("end silent flows", self._lasting.flows.sweep_forever)
        self._loops.spawn("stay connected", self._stay_connected)
        self._failed.get()

    def _stay_connected(self) -> None:
        backoff = Backoff(self._settings.service_cooldown)
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    control, agreement = self._connect()
                except OSError as error:
                    self._tell(error)
                else:
                    if self._stopping.is_set():
                        control.close(STOPPING)
                        break
                    self._serve(control, agreement)
                    if time.monotonic() - began > SETTLED:
                        backoff.reset()
                self._stopping.wait(backoff.pause())
        finally:
            self._ended.set()

    def _tell(self, error: OSError) -> None:
        """Say why there is no connection; the same reason again only once in a while."""
        self.stats.control_failures[token := failure(error)] += 1
        refused = isinstance(error, RefusedError)
        level, what = (logging.ERROR, "no agreement with") if refused else (logging.WARNING, "cannot reach")
        why = reason(error)
        self._failure = f"{what} the server {self._url.tunnel}: {why}"
        self.log.log(
            level,
            "server.rejected" if refused else "server.unreachable",
            what + " the server %(server)s: %(error)s; trying again",
            Limit(why, REPEAT_WARNING, 1),
            server=self._url.tunnel,
            reason=token,
            error=why,
        )

    def stop(self, timeout: float) -> int:
        """As `Tunnel.stop`."""
        deadline = time.monotonic() + timeout
        self._stop_accepting()
        self.sessions.join(max(0.0, deadline - time.monotonic()))
        return self.sessions.kill()

    def _stop_accepting(self) -> None:
        """Take no new launches beyond those that the server has already sent; running sessions go on."""
        self._stopping.set()
        if self.control:
            self.control.finish()
        self._ended.wait(FAREWELL)

    def close(self) -> None:
        """End everything at once."""
        self._stopping.set()
        if self.control:
            self.control.close(STOPPING)
        self._loops.kill()
        self._lasting.lanes.kill()
        self.sessions.kill()
        self._failed.set(None)

    def reload(self) -> None:
        """A client has no files of its own to look at."""

    def describe(self) -> str:
        """One line for an operator: where it is connected, and what has been done."""
        return f"{self.status()}, {self.stats}"

    def status(self) -> str:
        """How it is now, for an operator: where it is connected or why not, what is ready, what runs."""
        if self.control and self._connection:
            server = f"server {self.control.describe()}, {self._connection.pool}"
        else:
            server = f"no server: {self._failure}"
        return f"{server}, {len(self.sessions)} sessions, {len(self._lasting.flows)} flows"

    def unhealthy_reason(self) -> str:
        """What is wrong with this end; empty while it is well, and trying in vain to reach the server is well."""
        if self._ended.is_set():
            return "it does not run"
        return self._connection.unhealthy_reason() if self._connection else ""

    def view(self) -> View:
        """What the metrics show of it at this moment."""
        control = self.control
        pool = self._connection.pool if self._connection else None
        return View(
            role="client",
            unready="" if control else "not connected to the server",
            peer=control.peer if control else "",
            wire=control.version if control else 0,
            round_trip=control.round_trip if control else None,
            pool_idle=len(pool) if pool is not None else 0,
            pool_capacity=pool.capacity if pool is not None else 0,
            slots_used=len(self.sessions),
            slots=self._settings.semaphore_limit,
            flows=len(self._lasting.flows),
            certificate_expiry=None,
        )

    # One control connection

    def _connect(self) -> tuple[ClientControl, Agreement]:
        """A control connection after its handshake. Raises OSError, RefusedError among them."""
        timeout = self._settings.handshake_timeout
        try:
            self._lasting.target.resolve()
        except OSError as error:
            self.log.warning(
                "target.unresolved", "target: %(error)s; it is looked up again for each session", error=error
            )
        sock = as_blocking(dial(resolve(self._url.tunnel), timeout))
        try:
            control = ClientControl(sock, self._settings.report_interval, self.log, self.stats)
            with gevent.Timeout(
                timeout, TimeoutError(f"{control.peer} did not complete a handshake within {timeout:g}s")
            ):
                agreement = connect_to_server(control, self._key)
        except BaseException:
            sock.close()
            raise
        return control, agreement

    def _serve(self, control: ClientControl, agreement: Agreement) -> None:
        """Serve one control connection until it ends."""
        self.stats.connects += 1
        tunnel = agreement.offer
        self.log.info(
            "server.connected",
            "connected to %(server)s: data port %(data_port)d, tls %(tls)d, wire v%(wire)d",
            server=control.peer,
            data_port=tunnel.data_port,
            tls=tunnel.tls,
            wire=tunnel.version,
        )
        attachment = Connection(self._lasting, control, self._route(control, agreement), self._report)
        self.control, self._connection = control, attachment
        self.ready.set()
        try:
            attachment.run()
        finally:
            self.control = self._connection = None
            self._failure = control.ending.words
            if control.vanished:
                self._lasting.lanes.kill()  # they are as dead as their server; without it their flows would hang
            self.log.info(
                "server.disconnected",
                "disconnected: %(error)s",
                server=control.peer,
                reason=control.ending.reason,
                error=control.ending.words,
            )

    def _report(self) -> None:
        """A line of statistics."""
        self.log.debug("tunnel.report", literal(self.describe()), **report_fields(self.view(), self.stats))

    def _route(self, control: ClientControl, agreement: Agreement) -> Route:
        """How data connections are made: to where the server was reached, on the port that it named."""
        tunnel = agreement.offer
        reached = control.endpoint
        return Route(
            endpoint=reached if tunnel.mux else reached.with_port(tunnel.data_port),
            host=self._url.tunnel.host or "localhost",
            timeout=self._settings.handshake_timeout,
            context=_context(tunnel.tls),
            verify=tunnel.tls == 2,
            session=agreement.session,
            shared_port=tunnel.mux,
            fingerprint=tunnel.fingerprint if agreement.session else "",
        )


def _context(tls: int) -> SSL.Context | None:
    if not tls:
        return None
    from nodepass.tls.stream import client_context

    return client_context(verify=tls == 2)
