"""The server's story: it listens for its client and for visitors, and brings each visitor to a data connection."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gevent
from gevent import Greenlet
from gevent.event import AsyncResult, Event

from nodepass.config import Settings
from nodepass.log import Log, literal
from nodepass.net.activation import DATA, TUNNEL, Share
from nodepass.net.listen import close_all, listen_in_range, listen_target, listen_tcp, port_of
from nodepass.net.sockets import format_sockaddr
from nodepass.server.client_slot import ClientSlot
from nodepass.server.control_listener import ControlListener
from nodepass.server.datagram_listener import DatagramListener
from nodepass.server.visitor_listener import VisitorListener
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, WorkerPool, find_ended
from nodepass.tunnel.control import STOPPING, ServerControl
from nodepass.tunnel.interface import View, report_fields
from nodepass.urls import ServerURL
from nodepass.wire.auth import Key
from nodepass.wire.signals import Offer

if TYPE_CHECKING:
    from OpenSSL import SSL

    from nodepass.tls.certificates import ServerCertificate


class Server:
    """One tunnel's server: `start`, `run`, then `stop` and `close`; `interface.Tunnel` says who calls what."""

    def __init__(
        self, url: ServerURL, settings: Settings, key: Key | None, log: Log, stats: Stats, share: Share
    ) -> None:
        self.url = url
        self.log = log
        self.stats = stats
        self.ready = Event()  # every listener is open
        self._settings = settings
        self._share = share
        self._watched: list[Greenlet[..., None]] = []  # loops that end only with this tunnel
        self._failed: AsyncResult[None] = AsyncResult()
        self.sessions = WorkerPool(log, stats, settings.semaphore_limit)
        self._loops = TaskGroup(log, stats, on_crash=self._failed.set_exception)
        self._doors = TaskGroup(log, stats, on_crash=self._failed.set_exception)  # the loops that let visitors in
        self._slot = ClientSlot(key, settings, self._context, log, stats)
        self._control_listener = ControlListener(self._slot, key, settings, self._loops, self._tunnel, log, stats)
        self._visitor_listener = VisitorListener(self._slot, self.sessions, settings, log, stats)
        self._listeners: dict[str, list[socket.socket]] = {}
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
        try:
            self._listeners["tunnel"] = listen_tcp(self.url.tunnel, TUNNEL, self._share)
            if not self.url.tunnel.port:
                self.log.rename(f"server:{port_of(self._listeners['tunnel'])}")
            if not self._settings.data_port.tunnel:
                host, ports = self.url.tunnel.host, self._settings.data_port
                self._listeners["data"] = listen_in_range(host, ports, DATA, self._share)
            self._listeners["tcp"], self._listeners["udp"] = listen_target(self.url.target, self._share)
            self.ready.set()
        except BaseException:
            self.close()
            raise

    def run(self) -> None:
        """Serve until `close`; raises what crashed one of the loops."""
        tunnel, data, target = (self._addresses(each) for each in ("tunnel", self._data_listeners, "tcp"))
        self.log.info(
            "server.listening",
            "listening: tunnel %(tunnel_address)s, data %(data_address)s, target %(target_address)s (tcp, udp),"
            " tls %(tls)d",
            tunnel_address=tunnel,
            data_address=data,
            target_address=target,
            tls=self.url.tls,
        )
        self._watched = list(self._spawn_loops())
        self._failed.get()

    def _spawn_loops(self) -> Iterator[Greenlet[..., None]]:
        for listener in self._listeners["tunnel"]:
            yield self._loops.spawn("accept clients", self._control_listener.run, listener)
        for listener in self._listeners.get("data", []):
            yield self._loops.spawn("accept data connections", self._slot.filler.run, listener)
        for listener in self._listeners["tcp"]:
            yield self._doors.spawn("accept visitors", self._visitor_listener.run, listener)
        for sock in self._listeners["udp"]:
            door = DatagramListener(sock, self._slot, self.sessions, self._settings, self.log, self.stats)
            yield self._doors.spawn("receive datagrams", door.run)
        yield self._loops.spawn("report", self._report)
        yield self._loops.spawn("end silent flows", self._slot.flows.sweep_forever)
        if self._certificate:
            yield self._loops.spawn("watch certificate", self._certificate.watch, self._settings.reload_interval)

    def stop(self, timeout: float) -> int:
        """As `Tunnel.stop`."""
        deadline = time.monotonic() + timeout
        self._stop_accepting()
        self.sessions.join(max(0.0, deadline - time.monotonic()))
        return self.sessions.kill()

    def _stop_accepting(self) -> None:
        """Take no new visitors but those that have connected already; sessions, and the client they need, go on."""
        self._control_listener.shut()
        self._doors.kill()
        self._visitor_listener.let_in_waiting(self._listeners.get("tcp", []))
        close_all(self._listeners.get("tcp", []))  # not the UDP sockets: sessions answer from them

    def close(self) -> None:
        """End everything at once."""
        self._doors.kill()
        self._loops.kill()
        self._control_listener.close()
        if self._slot.control:
            self._slot.lose(self._slot.control, STOPPING)
        self._slot.filler.handshakes.kill()
        self._slot.flows.end_all()
        self.sessions.kill()
        for listeners in self._listeners.values():
            close_all(listeners)
        self._failed.set(None)

    def reload(self) -> None:
        """Look at the certificate files now."""
        if self._certificate:
            self._certificate.reload(asked=True)

    def describe(self) -> str:
        """One line for an operator: who is connected, and what has been done."""
        return f"{self.status()}, {self.stats}"

    def status(self) -> str:
        """How it is now, for an operator: who is connected, what is ready, what runs."""
        slot = self._slot
        client = slot.control.describe() if slot.control else "none"
        return f"client {client}, {slot.pool}, {len(self.sessions)} sessions, {len(slot.flows)} flows"

    def unhealthy_reason(self) -> str:
        """What is wrong with this end, so that only a restart helps; empty while it is well."""
        return find_ended(self._watched) or (self._slot.control.unhealthy_reason() if self._slot.control else "")

    def view(self) -> View:
        """What the metrics show of it at this moment."""
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

    def _context(self) -> SSL.Context | None:
        return self._certificate.context if self._certificate else None

    def _addresses(self, what: str) -> str:
        return " and ".join(format_sockaddr(each.getsockname()) for each in self._listeners[what])

    @property
    def _data_listeners(self) -> str:
        return "data" if "data" in self._listeners else "tunnel"

    def _tunnel(self) -> Offer:
        """What a client that has been let in is told."""
        return Offer(
            port_of(self._listeners[self._data_listeners]),
            self.url.tls,
            heartbeat=max(1, round(1000 * self._settings.report_interval)),
            mux=self._data_listeners == "tunnel",
            fingerprint=self._certificate.identity.fingerprint if self._certificate and self.url.tls == 1 else "",
        )

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self._slot.pool.end_interval()
            self.log.report_suppressed()
            self.log.debug("tunnel.report", literal(self.describe()), **report_fields(self.view(), self.stats))
