"""The server: opens the listeners of one tunnel, makes the parts that serve them, and starts, stops and closes those.

Clients come to `control_listener`, their data connections to `data_listener`, visitors to `visitor_listener` and
`datagram_listener`; what they meet in is `client_slot`. The process calls a server as `tunnel.interface` says.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gevent
from gevent.event import AsyncResult, Event

from nodepass.config import Settings
from nodepass.log import Log, literal
from nodepass.net.activation import Share
from nodepass.net.listen import close_all, listen_both, listen_in_range, listen_tcp, port_of
from nodepass.net.sockets import format_sockaddr
from nodepass.server.client_slot import ClientSlot
from nodepass.server.control_listener import ControlListener
from nodepass.server.data_listener import DataListener
from nodepass.server.datagram_listener import DatagramListener
from nodepass.server.visitor_listener import VisitorListener
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.control import ServerControl
from nodepass.tunnel.interface import DATA, TARGET, TUNNEL, View, report_fields
from nodepass.tunnel.part import Common, Loop, Part, stop_parts
from nodepass.urls import ServerURL
from nodepass.wire.auth import Key
from nodepass.wire.signals import Offer

if TYPE_CHECKING:
    from nodepass.tls.certificates import ServerCertificate


@dataclass(frozen=True)
class Listeners:
    """The sockets that a server listens on."""

    tunnel: list[socket.socket]
    data: list[socket.socket]  # none where data connections come to the tunnel port
    visitors: list[socket.socket]
    datagrams: list[socket.socket]  # from visitors

    @classmethod
    def open(cls, url: ServerURL, settings: Settings, share: Share) -> Listeners:
        """Open all, or none. Raises ListenError."""
        with contextlib.ExitStack() as opened:
            tunnel = listen_tcp(url.tunnel, "tunnel address", share.of(TUNNEL))
            opened.callback(close_all, tunnel)
            data: list[socket.socket] = []
            if not settings.data_port.tunnel:
                data = listen_in_range(url.tunnel.host, settings.data_port, "data port", share.of(DATA))
                opened.callback(close_all, data)
            visitors, datagrams = listen_both(url.target, "target address", share.of(TARGET))
            opened.pop_all()
        return cls(tunnel, data, visitors, datagrams)

    def close(self) -> None:
        """Close all."""
        for sockets in (self.tunnel, self.data, self.visitors, self.datagrams):
            close_all(sockets)


class Server:
    """One tunnel's server: `start`, `run`, then `stop` and `close`; `interface.Tunnel` says who calls what."""

    def __init__(
        self, url: ServerURL, settings: Settings, key: Key | None, log: Log, stats: Stats, share: Share
    ) -> None:
        self.url = url
        self.log = log
        self.stats = stats
        self.ready = Event()  # every listener is open
        self.sessions = WorkerPool(log, stats, settings.semaphore_limit)
        self._settings = settings
        self._share = share
        self._failed: AsyncResult[None] = AsyncResult()
        loops = TaskGroup(log, stats, on_crash=self._failed.set_exception)
        self._common = Common(settings, log, stats, loops)
        self._slot = ClientSlot(self._common, key)
        self._listeners: Listeners | None = None
        self._parts: list[Part] = []  # from `start` on
        self._certificate: ServerCertificate | None = None
        if url.tls:
            from nodepass.tls.certificates import ServerCertificate

            self._certificate = ServerCertificate(url.crt, url.key, log)

    @property
    def control(self) -> ServerControl | None:
        """The control connection to the client, while one is connected."""
        return self._slot.control

    def start(self) -> None:
        """Open every listener. Raises ListenError."""
        listeners = self._listeners = Listeners.open(self.url, self._settings, self._share)
        if not self.url.tunnel.port:
            self.log.tunnel = f"server:{port_of(listeners.tunnel)}"
        self._parts = self._make_parts(listeners)
        self.ready.set()

    def run(self) -> None:
        """Serve until `close`; raises what crashed one of the loops."""
        assert self._listeners, "it has been started"
        self._log_listening(self._listeners)
        for part in self._parts:
            part.start()
        self._failed.get()

    def stop(self, timeout: float) -> int:
        """As `Tunnel.stop`: from here on clients are refused and visitors do not reach it, and sessions drain.

        The connected client and the UDP sockets stay for as long as sessions need them.
        """
        return stop_parts(self._parts, self.sessions, timeout)

    def close(self) -> None:
        """End everything at once."""
        for part in self._parts:
            part.close()
        self.sessions.kill()
        if self._listeners:
            self._listeners.close()
        self._failed.set(None)

    def _make_parts(self, listeners: Listeners) -> list[Part]:
        """All parts, in the order in which they stop: first what lets in clients, then what lets in visitors."""
        common, slot, certificate = self._common, self._slot, self._certificate
        data_listener = DataListener(common, listeners.data, slot, certificate)
        parts: list[Part] = [
            ControlListener(common, listeners.tunnel, slot, data_listener, self._offer(listeners)),
            data_listener,
            *(DatagramListener(common, sock, slot, self.sessions) for sock in listeners.datagrams),
            VisitorListener(common, listeners.visitors, slot, self.sessions),
            slot,
            slot.flows,
            Loop(common, "report", self._report),
        ]
        if certificate:
            interval = self._settings.reload_interval
            parts.append(Loop(common, "watch certificate", lambda: certificate.watch(interval)))
        return parts

    def _offer(self, listeners: Listeners) -> Offer:
        """What an admitted client is told; a certificate made in memory stays the same."""
        return Offer(
            port_of(listeners.data or listeners.tunnel),
            self.url.tls,
            heartbeat=max(1, round(1000 * self._settings.report_interval)),
            mux=not listeners.data,
            fingerprint=self._certificate.identity.fingerprint if self._certificate and self.url.tls == 1 else "",
        )

    def _log_listening(self, listeners: Listeners) -> None:
        self.log.info(
            "server.listening",
            "listening: tunnel %(tunnel_address)s, data %(data_address)s, target %(target_address)s (tcp, udp),"
            " tls %(tls)d",
            tunnel_address=_addresses(listeners.tunnel),
            data_address=_addresses(listeners.data or listeners.tunnel),
            target_address=_addresses(listeners.visitors),
            tls=self.url.tls,
        )

    def reload(self) -> None:
        """Read the certificate files again."""
        if self._certificate:
            self._certificate.reload(asked=True)

    def describe(self) -> str:
        """One line for an operator: its status and its counters."""
        return f"{self.status()}, {self.stats}"

    def status(self) -> str:
        """How it is now, for an operator: its client, its pool, its sessions and flows."""
        slot = self._slot
        client = slot.control.describe() if slot.control else "none"
        return f"client {client}, {slot.pool}, {len(self.sessions)} sessions, {len(slot.flows)} flows"

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""."""
        ended = next(filter(None, (part.find_ended() for part in self._parts)), "")
        return ended or (self.control.unhealthy_reason() if self.control else "")

    def view(self) -> View:
        """As `Tunnel.view`."""
        control, pool = self._slot.control, self._slot.pool
        return View(
            role="server",
            unready="" if control else "no client is connected",
            peer=control.endpoint.host if control else "",  # its port changes with each reconnect
            wire=control.version if control else 0,
            round_trip=control.round_trip if control else None,
            pool_idle=len(pool),
            pool_capacity=pool.capacity,
            slots_used=len(self.sessions),
            slots=self._settings.semaphore_limit,
            flows=len(self._slot.flows),
            certificate_expiry=self._certificate.identity.expiry if self._certificate else None,
        )

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self._slot.pool.end_interval()
            self.log.report_suppressed()
            self.log.debug("tunnel.report", literal(self.describe()), **report_fields(self.view(), self.stats))


def _addresses(listeners: list[socket.socket]) -> str:
    return " and ".join(format_sockaddr(each.getsockname()) for each in listeners)
