"""The client's story: it keeps a control connection to its server, keeps the pool full, serves launches."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event
from gevent.queue import Full, Queue

from nodepass.config import Settings
from nodepass.control import Control
from nodepass.crew import Crew
from nodepass.datagrams import ask_target, read_datagram
from nodepass.errors import NoDataConnection, ProtocolError
from nodepass.fillers import Backoff, DialingFiller, Route
from nodepass.handshake import Agreement, introduce
from nodepass.log import Log
from nodepass.net import Endpoint, Stream, TCPStream, dial, dial_udp, reason, resolve
from nodepass.pool import ClientPool
from nodepass.proofs import Key
from nodepass.protocol import KIND_NAMES, LANE, TCP, UDP, Launch
from nodepass.relay import exchange
from nodepass.stats import Stats
from nodepass.target_flows import TargetFlows
from nodepass.urls import Address, ClientURL

if TYPE_CHECKING:
    from OpenSSL import SSL

SETTLED = 1.0  # seconds that a control connection must last for the next reconnect to begin with the shortest pause
REPEAT_WARNING = 60.0  # seconds between two warnings about the same failure to connect
FAREWELL = 1.0  # seconds for the server to end its side of the control connection when we leave


class Client:
    """One tunnel's client: `start`, `run`, then `stop_accepting` and `close`; `daemon.Tunnel` says who calls what."""

    def __init__(self, url: ClientURL, settings: Settings, key: Key | None, log: Log) -> None:
        self.url = url
        self.log = log
        self.stats = Stats()
        self.sessions = Crew(log, settings.semaphore_limit)
        self.settings = settings
        self.key = key
        self.target = Target(url.target)
        self.flows = TargetFlows(self.target.dial_udp, settings, log, self.stats)
        self.lanes = Crew(log)
        self._stopping = Event()
        self._ended = Event()
        self._control: Control | None = None
        self._pool: ClientPool | None = None

    def start(self) -> None:
        """Nothing to open: whatever a client needs is retried."""

    def run(self) -> None:
        """Connect, serve, and connect again, until `stop_accepting`; raises what crashed."""
        backoff = Backoff(self.settings.service_cooldown)
        sweeper = gevent.spawn(self.flows.sweep_forever)
        try:
            while not self._stopping.is_set():
                began = time.monotonic()
                try:
                    control, agreement = self._connect()
                except OSError as error:
                    self.stats.trouble["connects_failed"] += 1
                    why = reason(error)
                    message = "cannot reach the server %s: %s; trying again"
                    self.log.limited(
                        logging.WARNING, why, message, self.url.tunnel, why, seconds=REPEAT_WARNING, burst=1
                    )
                else:
                    self._serve(control, agreement)
                    if time.monotonic() - began > SETTLED:
                        backoff.reset()
                self._stopping.wait(backoff.pause())
        finally:
            sweeper.kill()
            self._ended.set()

    def stop_accepting(self) -> None:
        """Take no new launches beyond those that the server has already sent; running sessions go on."""
        self._stopping.set()
        if self._control:
            self._control.finish()
        self._ended.wait(FAREWELL)

    def close(self) -> None:
        """End everything at once."""
        self._stopping.set()
        if self._control:
            self._control.close("this end is stopping")
        self.lanes.kill()
        self.sessions.kill()

    def reload(self) -> None:
        """A client has no files of its own to look at."""

    def describe(self) -> str:
        """One line for an operator: where it is connected, and what has been done."""
        server = self._control.describe() if self._control else "none"
        return f"server {server}, {self._pool!r}, {len(self.sessions)} sessions, {len(self.flows)} flows, {self.stats}"

    # One control connection

    def _connect(self) -> tuple[Control, Agreement]:
        """A control connection after its handshake. Raises OSError, RefusedError among them."""
        timeout = self.settings.handshake_timeout
        try:
            self.target.resolve()
        except OSError as error:
            self.log.warning("target: %s; it is looked up again for each session", error)
        sock = dial(resolve(self.url.tunnel), timeout)
        try:
            control = Control(sock, self.settings.report_interval, self.log, self.stats)
            with gevent.Timeout(
                timeout, TimeoutError(f"{control.peer} did not complete a handshake within {timeout:g}s")
            ):
                agreement = introduce(control, self.key)
            heartbeat = agreement.tunnel.heartbeat
            control.agree(agreement.version, heartbeat / 1000 if heartbeat else self.settings.report_interval)
        except BaseException:
            sock.close()
            raise
        return control, agreement

    def _serve(self, control: Control, agreement: Agreement) -> None:
        """Serve one control connection until it ends."""
        self.stats.connects += 1
        tunnel = agreement.tunnel
        words = "connected to %s: data port %d, tls %d, wire v%d"
        self.log.info(words, control.peer, tunnel.data_port, tunnel.tls, tunnel.version)
        attachment = Attachment(self, control, self._route(control, agreement))
        self._control, self._pool = control, attachment.pool
        try:
            attachment.run()
        finally:
            self._control = self._pool = None
            if control.vanished:
                self.lanes.kill()  # they are as dead as their server; without it their flows would hang
            self.log.info("disconnected: %s", control.closed_because)

    def _route(self, control: Control, agreement: Agreement) -> Route:
        """How data connections are made: to where the server was reached, on the port that it named."""
        tunnel = agreement.tunnel
        reached = Endpoint(control.sock.family, control.sock.getpeername())
        return Route(
            endpoint=reached if tunnel.mux else reached.with_port(tunnel.data_port),
            host=self.url.tunnel.host or "localhost",
            timeout=self.settings.handshake_timeout,
            context=_context(tunnel.tls),
            verify=tunnel.tls == 2,
            session=agreement.session,
            shared_port=tunnel.mux,
            fingerprint=tunnel.fingerprint if agreement.session else "",
        )


class Attachment:
    """What a client has while it is connected: control connection, pool with its filler, queue of launches."""

    def __init__(self, client: Client, control: Control, route: Route) -> None:
        settings = self._settings = client.settings
        self._client = client
        self._log, self._stats, self._sessions, self._target = client.log, client.stats, client.sessions, client.target
        self._control = control
        self._launches: Queue[Launch | None] = Queue(settings.semaphore_limit)
        self._crew = Crew(self._log, on_crash=lambda _: control.close("a bug in this end, see above"))
        self.pool = ClientPool(self._log, self._stats, settings.min_pool_capacity, settings.max_pool_capacity)
        backoff = Backoff(settings.service_cooldown)
        self._filler = DialingFiller(self.pool, route.make, backoff, self._log, self._stats)

    def run(self) -> None:
        """Serve launches until the control connection ends."""
        self._crew.spawn("read signals", self._read_signals)
        self._crew.spawn("fill pool", self._filler.run)
        self._crew.spawn("report", self._report)
        try:
            self._dispatch_signals()
            gevent.sleep(0)  # the launches dispatched last claim their connections before the pool is flushed
        finally:
            self._control.close("this end is stopping")
            self._crew.kill()
            self._filler.dials.kill()
            self.pool.flush("the control connection ended")

    def _read_signals(self) -> None:
        try:
            for launch in self._control.signals():
                self._log.debug("signal: launch %s as %s", launch.id, KIND_NAMES[launch.kind])
                try:
                    self._launches.put_nowait(launch)
                except Full:
                    self._stats.trouble["launches_dropped"] += 1
                    self._log.limited(logging.WARNING, "full", "launch dropped: SEMAPHORE_LIMIT launches wait already")
                    self.pool.drop(launch.id)
        finally:
            self._launches.put(None)

    def _dispatch_signals(self) -> None:
        handlers = {TCP: self._launch_tcp, UDP: self._launch_udp, LANE: self._client.flows.run_lane}
        while launch := self._launches.get():
            # A lane has no end of its own, so it is no session that a shutdown waits for.
            crew = self._client.lanes if launch.kind == LANE else self._sessions
            crew.spawn("launch", self._launch, handlers[launch.kind], launch.id)

    def _launch(self, handler: Callable[[Stream, Log], None], id: str) -> None:
        try:
            data = self.pool.claim(id, self._settings.handshake_timeout)
        except NoDataConnection as error:
            self._stats.trouble["launches_unknown"] += 1
            self._log.limited(logging.WARNING, "unknown", "launch ignored: %s", error)
            return
        try:
            handler(data, self._log.session(id))
        finally:
            data.close()

    def _launch_tcp(self, data: Stream, log: Log) -> None:
        try:
            sock = self._target.dial(self._settings.handshake_timeout)
        except OSError as error:
            self._stats.trouble["targets_unreachable"] += 1
            self._log.limited(logging.WARNING, "target", "cannot reach the target: %s", reason(error))
            data.abort()  # the visitor is refused, too
            return
        log.debug("target %s connected", self._target)
        self._stats.tcp_sessions += 1
        log.debug("target %s: %s", self._target, exchange(data, TCPStream(sock), self._stats))

    def _launch_udp(self, data: Stream, log: Log) -> None:
        largest, timeout = self._settings.udp_data_buf_size, self._settings.udp_read_timeout
        self._stats.udp_sessions += 1
        try:
            question = read_datagram(data, largest, timeout)
            self._stats.bytes_up += len(question)
            with contextlib.closing(self._target.dial_udp()) as sock:
                answer = ask_target(sock, question, largest, timeout)
            data.write(answer)
            data.half_close()
        except ProtocolError as error:
            self._stats.trouble["dropped_too_large"] += 1
            self._log.limited(logging.WARNING, "too large", "dropped: %s", error)
        except OSError as error:
            self._stats.trouble["datagrams_unanswered"] += 1
            self._log.limited(logging.WARNING, "datagram", "datagram unanswered: %s", reason(error))
        else:
            self._stats.bytes_down += len(answer)
            log.debug("target %s: %d bytes asked, %d bytes answered", self._target, len(question), len(answer))

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self.pool.end_interval()
            self._log.tell_rest()
            self._log.debug("%s", self._client.describe())


class Target:
    """The service next to the client; its name is resolved at every reconnect, and again when it does not answer."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._endpoints: list[Endpoint] = []

    def __str__(self) -> str:
        return str(self._address)

    def resolve(self) -> None:
        """Look the name up. Raises OSError; the old endpoints stay then."""
        self._endpoints = resolve(self._address)

    def dial(self, timeout: float) -> socket.socket:
        """A TCP connection to the service. Raises OSError."""
        known = self._endpoints
        try:
            return dial(known, timeout)
        except OSError:
            self.resolve()
            if self._endpoints == known:
                raise
        return dial(self._endpoints, timeout)

    def dial_udp(self) -> socket.socket:
        """A UDP socket connected to the service. Raises OSError."""
        if not self._endpoints:
            self.resolve()
        return dial_udp(self._endpoints[0])


def _context(tls: int) -> SSL.Context | None:
    if not tls:
        return None
    from nodepass.tls import client_context

    return client_context(verify=tls == 2)
