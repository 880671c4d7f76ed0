"""The server: opens the listeners of one tunnel, makes the parts that serve them, and starts, stops and closes those.

Its client and that one's data connections come through `tunnel_port`, which tunnels of different names share; visitors
come to `visitor_listener` and `datagram_listener`, which ask `visitors.policy`; what they meet in is `clients`. The
process calls a server as `tunnel.interface` says.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace

import gevent
from gevent.event import AsyncResult, Event

from nodepass.config.kinds import format_duration
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ServerURL, UnixPath
from nodepass.errors import ClosedError
from nodepass.log import Limit, literal
from nodepass.net.activation import PassedSocket, Share
from nodepass.net.listen import BACKLOG, close_all, listen_both, port_of
from nodepass.net.sockets import format_sockaddr
from nodepass.net.unix import UnixListener
from nodepass.server.clients import Clients
from nodepass.server.control_listener import ControlListener
from nodepass.server.data_listener import DataListener
from nodepass.server.datagram_listener import DatagramListener
from nodepass.server.tunnel_port import TunnelPort
from nodepass.server.visitor_listener import VisitorListener
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.control import GOODBYE, MISSED_HEARTBEATS
from nodepass.tunnel.interface import DATA, NO_DATA_CONNECTIONS, TARGET, TUNNEL, View, name_protocols, report_fields
from nodepass.tunnel.part import Common, Loop, Part, Records, stop_parts
from nodepass.tunnel.rates import Rates
from nodepass.tunnel.security import SecurityLog, security_of, summarize
from nodepass.visitors.policy import Policy
from nodepass.visitors.rules import Rules
from nodepass.wire.auth import Key
from nodepass.wire.negotiation import HEARTBEATS

RARELY = Limit(seconds=60.0, burst=1)
BEGIN_WITHIN = 1.0  # seconds for accepted visitors to get their data connections, where a new process takes over
LOOK_EVERY = 0.005  # seconds between two looks whether they have


class Server:
    """One tunnel's server: `start`, `run`, then `stop` and `close`; `interface.Tunnel` says who calls what."""

    def __init__(
        self,
        url: ServerURL,
        port: TunnelPort,
        settings: Settings,
        keys: Callable[[], Sequence[Key]],
        records: Records,
        share: Share,
        rules: Rules,
    ) -> None:
        """`port`: the tunnel port that this tunnel will join; `keys`: each of which its client may prove now."""
        self.url = url
        log, stats, access, meter = records
        self.log = log
        self.stats = stats
        self.meter = meter
        self.ready = Event()  # every listener is open
        self.sessions = WorkerPool(log, stats, settings.semaphore_limit)
        self._settings = settings
        self._port = port
        self._keys = keys
        self._share = share
        self._beat = min(settings.report_interval, HEARTBEATS[1] / 1000)  # seconds
        self._failed: AsyncResult[None] = AsyncResult()
        loops = TaskGroup(log, stats, on_crash=self._failed.set_exception)
        self._common = Common(settings, log, stats, loops, access, Rates.of(settings, stats), meter)
        self._policy = Policy.of(self._common, rules)
        present = keys()
        self._security = SecurityLog(security_of(url, bool(present)), log)
        self._clients = Clients(self._common, url.tunnel_name, present, self._report_security)
        self._clients.flows.policy = self._policy
        self._visitors: list[socket.socket] = []  # listeners
        self._datagrams: list[socket.socket] = []  # sockets
        self._unix: UnixListener | None = None  # the one of the visitors' listeners, where that is a Unix socket
        self._parts: list[Part] = []  # from `start` on
        self._is_handed_over = False

    def start(self) -> None:
        """Open every listener. Raises ListenError."""
        self._port.join(self._clients, self._failed.set_exception)
        try:
            self._visitors, self._datagrams = self._open_target()
        except BaseException:
            self._port.leave(self._clients)
            raise
        if not self.url.tunnel.port:
            tunnel = Address(self.url.tunnel.host, port_of(self._port.tunnel))
            self.log.tunnel = replace(self.url, tunnel=tunnel).name
        self._parts = self._make_parts()
        self.ready.set()

    def _open_target(self) -> tuple[list[socket.socket], list[socket.socket]]:
        """Listeners and UDP sockets for visitors. Raises ListenError."""
        share, wanted, target = self._share.of(TARGET), self._settings, self.url.target
        if isinstance(target, UnixPath):
            owner, mode = wanted.unix_owner, wanted.unix_mode
            passed = share.take_unix(target.path)
            self._unix = UnixListener(target.path, "target address", mode, owner, BACKLOG, passed)
            return [self._unix.sock], []
        return listen_both(target, "target address", share, wanted.keepalive, tcp=wanted.tcp, udp=wanted.udp)

    def run(self) -> None:
        """Serve until `close`; raises what crashed one of the loops."""
        self._log_listening()
        self._report_security()
        self._port.run(make_port_parts)
        for part in self._parts:
            part.start()
        self._failed.get()

    def stop(self, timeout: float) -> int:
        """As `Tunnel.stop`: from here on clients are refused and visitors do not reach it, and sessions drain.

        The connected client and the UDP sockets stay for as long as sessions need them. SHUTDOWN_DELAY comes before:
        what asks for readiness is told `stopping` meanwhile.
        """
        if (delay := self._settings.shutdown_delay) and not self._is_handed_over:
            words = "unready, and still serving visitors for %(delay)s (SHUTDOWN_DELAY)"
            self.log.info("server.leaving", words, delay=format_duration(delay))
            gevent.sleep(delay)
        cut = stop_parts(self._parts, self.sessions, timeout)
        self._clients.dismiss(GOODBYE)
        return cut

    # Where another process takes over

    @property
    def client_id(self) -> str:
        """A server has none."""
        return ""

    @property
    def listeners(self) -> list[PassedSocket]:
        """As `Tunnel.listeners`."""
        port, target = self._port, [*self._visitors, *self._datagrams]
        roles = ((TUNNEL, port.tunnel), (DATA, port.data), (TARGET, target))
        return [PassedSocket(role, sock) for role, sockets in roles for sock in sockets if sock.fileno() >= 0]

    def offer_places(self) -> None:
        """A server has none."""

    def keep_places(self) -> None:
        """A server has none."""

    def end_accepting(self) -> None:
        """As `Tunnel.end_accepting`; one that still waits for a data connection after BEGIN_WITHIN will have none."""
        for part in self._parts:
            part.end_accepting()
        if self._unix:
            self._unix.hand_over()
        with contextlib.suppress(TimeoutError), gevent.Timeout(BEGIN_WITHIN, TimeoutError()):
            while self._clients.flows.is_opening or len(self.sessions) > self._clients.sessions:
                gevent.sleep(LOOK_EVERY)

    def hand_over(self) -> None:
        """As `Tunnel.hand_over`."""
        self._is_handed_over = True
        self._port.end_accepting()
        self._clients.hand_over()

    def close(self) -> None:
        """End everything at once; the client is told."""
        with contextlib.ExitStack() as closing:  # where one step crashes the others follow; the last one is first here
            closing.callback(self._failed.set, None)
            closing.callback(close_all, self._datagrams)
            closing.callback(close_all, self._visitors)
            if self._unix:
                closing.callback(self._unix.close)
            closing.callback(self._port.leave, self._clients)
            closing.callback(self.sessions.kill)
            for part in reversed(self._parts):
                closing.callback(part.close)

    def _make_parts(self) -> list[Part]:
        """All parts, in the order in which they stop: first what lets in clients, then what lets in visitors."""
        common, clients, policy = self._common, self._clients, self._policy
        parts: list[Part] = [
            clients,
            *(DatagramListener(common, sock, clients, self.sessions, policy) for sock in self._datagrams),
            VisitorListener(common, self._visitors, clients, self.sessions, policy),
            clients.flows,
            Loop(common, "watch data connections", self._watch_supply),
            Loop(common, "report", self._report),
        ]
        if policy:
            parts.append(Loop(common, "watch the files of visitors", policy.watch))
        if self.meter:
            parts.append(Loop(common, "count traffic", self.meter.run))
        return parts

    def _log_listening(self) -> None:
        self.log.info(
            "server.listening",
            "listening: tunnel %(tunnel_address)s, data %(data_address)s, target %(target_address)s"
            " (%(protocols)s), tls %(tls)d",
            tunnel_address=_addresses(self._port.tunnel),
            data_address=_addresses(self._port.data or self._port.tunnel),
            target_address=str(self.url.target) if self._unix else _addresses(self._visitors or self._datagrams),
            protocols=", ".join(self._settings.protocols),
            tls=self.url.tls,
        )

    def reload(self) -> None:
        """Read the files of visitors and of the certificate again, and take the keys that the tunnel has now."""
        if revoked := self._clients.set_keys(self._keys()):
            if self._clients.connected:
                error = ClosedError("the client's key has been removed")
                cut = sum(slot.deadlines.end_all(error) for slot in revoked)
            else:
                cut = self.sessions.kill()
            words = "cut %(sessions)d sessions of the client whose key has been removed"
            self.log.warning("client.revoked", words, sessions=cut)
        if self._policy:
            self._policy.reload()
        if self._port.certificate:
            self._port.certificate.reload(asked=True)

    def describe(self) -> str:
        """One line for an operator: its status and its counters."""
        return f"{self.status()}, {self.stats}"

    def status(self) -> str:
        """How it is now, for an operator: its clients, their pools, its sessions and flows."""
        carried = name_protocols(self._settings.protocols)
        sessions = f"{len(self.sessions)} sessions, {len(self._clients.flows)} flows{carried}"
        security = summarize(self._security.of(self._clients.newest))
        return f"{self._clients.describe()}, {sessions}, security: {security}"

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""."""
        ended = next(filter(None, (part.find_ended() for part in self._parts)), "") or self._port.find_ended()
        return ended or next(filter(None, (each.unhealthy_reason() for each in self._clients.controls)), "")

    def view(self) -> View:
        """As `Tunnel.view`."""
        clients, controls = self._clients, self._clients.controls
        trips = [each.round_trip for each in controls if each.round_trip is not None]
        return View(
            role="server",
            unready=self._unready(),
            peers=tuple((each.endpoint.host, each.version) for each in controls),  # a port changes with each reconnect
            places=len(clients.slots),
            round_trip=max(trips, default=None),
            pool_idle=sum(len(slot.pool) for slot in clients.slots),
            pool_capacity=sum(slot.pool.capacity for slot in clients.connected or clients.slots[:1]),
            slots_used=len(self.sessions),
            slots=self._settings.semaphore_limit,
            flows=len(clients.flows),
            certificate_expiry=self._port.certificate.identity.expiry if self._port.certificate else None,
            security=self._security.of(clients.newest),
            protocols=self._settings.protocols,
            rates=self._settings.rates,
            traffic_used=self.meter.used if self.meter else None,
            traffic_limit=self.meter.limit.bytes if self.meter else None,
        )

    def _unready(self) -> str:
        connected = self._clients.connected
        if not connected:
            return "no client is connected"
        supplied = [slot for slot in connected if not slot.pool.is_lacking(MISSED_HEARTBEATS * self._beat)]
        if not supplied:
            return NO_DATA_CONNECTIONS
        if any(slot.control and slot.control.target_answers for slot in supplied):
            return ""
        return "the client's target does not answer"

    def _watch_supply(self) -> None:
        """Log once that no data connections come from the client, and once that they come again."""
        seen, is_reported = None, False
        while True:
            gevent.sleep(self._beat)
            is_lacking = self._unready() == NO_DATA_CONNECTIONS
            newest = self._clients.newest
            if is_lacking and seen is newest and not is_reported:  # one that has just connected gets its time
                is_reported = True
                self._report_lacking()
            elif is_reported and newest and not is_lacking:
                is_reported = False
                self.log.info("data.restored", "data connections come from the client again", RARELY)
            seen = newest if is_lacking else None

    def _report_lacking(self) -> None:
        words = "no data connections come from the client, so visitors are not served"
        port = port_of(self._port.data or self._port.tunnel)
        if self._port.mux:
            words += "; its log has the reason"
        else:
            words += (
                ": is the data port reachable? The firewall must let TCP port %(port)d through; DATA_PORT=tunnel needs"
                " one port only"
            )
        self.log.warning("data.missing", words, RARELY, port=port)

    def _report_security(self) -> None:
        self._security.report(self._clients.newest)

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            for slot in self._clients.connected or self._clients.slots[:1]:
                slot.pool.end_interval()
            self.log.report_suppressed()
            self.log.debug("tunnel.report", literal(self.describe()), **report_fields(self.view(), self.stats))


def make_port_parts(common: Common, port: TunnelPort) -> list[Part]:
    """What serves a tunnel port, whichever of its tunnels runs first."""
    data_listener = DataListener(common, port)
    parts: list[Part] = [ControlListener(common, port, data_listener), data_listener]
    if certificate := port.certificate:
        interval = common.settings.reload_interval
        parts.append(Loop(common, "watch certificate", lambda: certificate.watch(interval)))
    return parts


def _addresses(listeners: list[socket.socket]) -> str:
    return " and ".join(format_sockaddr(each.getsockname()) for each in listeners)
