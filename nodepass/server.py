"""The server's story: it listens for its client and for visitors, and brings each visitor to a data connection."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gevent
from gevent import Greenlet
from gevent.event import AsyncResult, Event

from nodepass.config import Settings, format_duration
from nodepass.control import Control
from nodepass.crew import Crew, Workers, find_ended
from nodepass.door import DatagramDoor
from nodepass.errors import NoDataConnection, RefusedError
from nodepass.handshake import hear
from nodepass.inherited import DATA, TUNNEL, Share
from nodepass.link import Link
from nodepass.listen import (
    accept_forever,
    accept_waiting,
    close_all,
    listen_in_range,
    listen_target,
    listen_tcp,
    port_of,
)
from nodepass.lobby import Lobby
from nodepass.log import Log
from nodepass.net import Endpoint, Socket, as_blocking, as_plain, format_sockaddr, plain_host, reason
from nodepass.proofs import Key
from nodepass.protocol import SHUTDOWN, TCP, Refusal, Tunnel
from nodepass.relay import exchange
from nodepass.sorting import is_data_connection
from nodepass.stats import Stats, View, failure
from nodepass.stream import TCPStream
from nodepass.urls import ServerURL

if TYPE_CHECKING:
    from OpenSSL import SSL

    from nodepass.certificates import ServerCertificate

# Seconds for a launch to be read before the end of a visitor's stream that came with it: a v1 client takes an idle data
# connection at its end for dead.
HEAD_START = 0.1


class Server:
    """One tunnel's server: `start`, `run`, then `stop_accepting` and `close`; `daemon.Tunnel` says who calls what."""

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
        self.sessions = Workers(log, stats, settings.semaphore_limit)
        self._loops = Crew(log, stats, on_crash=self._failed.set_exception)
        self._doors = Crew(log, stats, on_crash=self._failed.set_exception)  # the loops that let visitors in
        self._clients = Lobby("the tunnel address", log, stats)
        self._link = Link(key, settings, log, stats)
        self._key = key
        self._stopping = False
        self._listeners: dict[str, list[socket.socket]] = {}
        self._certificate: ServerCertificate | None = None
        if url.tls:
            from nodepass.certificates import ServerCertificate

            self._certificate = ServerCertificate(url.crt, url.key, log)

    @property
    def control(self) -> Control | None:
        """The control connection to the client, while one is connected."""
        return self._link.control

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
        self.log.info("listening: tunnel %s, data %s, target %s (tcp, udp), tls %d", tunnel, data, target, self.url.tls)
        self._watched = list(self._spawn_loops())
        self._failed.get()

    def _spawn_loops(self) -> Iterator[Greenlet[..., None]]:
        for listener in self._listeners["tunnel"]:
            yield self._loops.spawn("accept clients", self._accept_clients, listener)
        for listener in self._listeners.get("data", []):
            yield self._loops.spawn("accept data connections", self._link.filler.run, listener, self._context)
        for listener in self._listeners["tcp"]:
            yield self._doors.spawn("accept visitors", self._accept_visitors, listener)
        for sock in self._listeners["udp"]:
            door = DatagramDoor(sock, self._link, self.sessions, self._settings, self.log, self.stats)
            yield self._doors.spawn("receive datagrams", door.run)
        yield self._loops.spawn("report", self._report)
        yield self._loops.spawn("end silent flows", self._link.flows.sweep_forever)
        if self._certificate:
            yield self._loops.spawn("watch certificate", self._certificate.watch, self._settings.reload_interval)

    def stop_accepting(self) -> None:
        """Take no new visitors but those that have connected already; sessions, and the client they need, go on."""
        self._stopping = True
        self._doors.kill()
        with contextlib.suppress(TimeoutError), gevent.Timeout(self._settings.shutdown_timeout, TimeoutError()):
            for listener in self._listeners.get("tcp", []):
                for sock, peer in accept_waiting(listener, self._wait_for_slot):
                    self.sessions.spawn("serve visitor", self._serve_visitor, sock, peer)
        close_all(self._listeners.get("tcp", []))  # not the UDP sockets: sessions answer from them

    def close(self) -> None:
        """End everything at once."""
        for crew in (self._doors, self._loops, self._clients):
            crew.kill()
        if self._link.control:
            self._link.lose(self._link.control, "this end is stopping")
        self._link.filler.handshakes.kill()
        self._link.flows.end_all()
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
        link = self._link
        client = link.control.describe() if link.control else "none"
        return f"client {client}, {link.pool}, {len(self.sessions)} sessions, {len(link.flows)} flows"

    def ailment(self) -> str:
        """What is wrong with this end, so that only a restart helps; empty while it is well."""
        return find_ended(self._watched) or (self._link.control.ailment() if self._link.control else "")

    def view(self) -> View:
        """What the metrics show of it at this moment."""
        control, pool = self._link.control, self._link.pool
        return View(
            role="server",
            unready="" if control else "no client is connected",
            peer=plain_host(control.endpoint.sockaddr) if control else "",  # its port changes with each reconnect
            wire=control.version if control else 0,
            round_trip=control.round_trip if control else None,
            pool_idle=len(pool),
            pool_capacity=pool.capacity,
            slots_used=len(self.sessions),
            slots=self._settings.semaphore_limit,
            certificate_expiry=self._certificate.identity.expiry if self._certificate else None,
        )

    def _context(self) -> SSL.Context | None:
        return self._certificate.context if self._certificate else None

    def _addresses(self, what: str) -> str:
        return " and ".join(format_sockaddr(each.getsockname()) for each in self._listeners[what])

    # The client

    @property
    def _data_listeners(self) -> str:
        return "data" if "data" in self._listeners else "tunnel"

    def _tunnel(self) -> Tunnel:
        """What a client that has been let in is told."""
        return Tunnel(
            port_of(self._listeners[self._data_listeners]),
            self.url.tls,
            heartbeat=max(1, round(1000 * self._settings.report_interval)),
            mux=self._data_listeners == "tunnel",
            fingerprint=self._certificate.identity.fingerprint if self._certificate and self.url.tls == 1 else "",
        )

    def _accept_clients(self, listener: socket.socket) -> None:
        shared = self._data_listeners == "tunnel"
        for sock, _ in accept_forever(listener, self.log):
            if shared and self._link.version == 1 and self._link.is_from_client(sock):
                self._link.filler.admit(sock, self._context())
            else:
                self._clients.receive(as_blocking(sock), self._sort if shared else self._serve_client)

    def _sort(self, sock: socket.socket) -> None:
        """Tell a client from a data connection, where both come to one port."""
        try:
            is_data = is_data_connection(sock)
        except OSError:
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        if is_data:
            self._clients.leave(sock)
            self._link.filler.admit(as_plain(sock), self._context())
        else:
            self._serve_client(sock)

    def _serve_client(self, sock: socket.socket) -> None:
        with contextlib.closing(sock):
            try:
                control = Control(sock, self._settings.report_interval, self.log, self.stats)
                admitted = self._greet(control)
            except OSError as error:
                self.stats.control_failures[failure(error)] += 1
                self.log.debug("a connection to the tunnel address came to nothing: %s", reason(error))
            else:
                if admitted:
                    self._stay_with(control)

    def _greet(self, control: Control) -> bool:
        """Whether a newcomer is the client now. Raises OSError."""
        try:
            caller = hear(control, self._key, self._settings.handshake_timeout)
            if self._stopping:
                raise RefusedError(SHUTDOWN, "this server is shutting down")
            self._link.admit(control, caller, self._tunnel())
        except RefusedError as error:
            self.stats.control_failures[failure(error)] += 1
            self.log.limited(logging.WARNING, "turned away", "client %s turned away: %s", control.peer, error)
            with contextlib.suppress(OSError):  # it has been counted already
                control.send(Refusal(error.reason))
            return False
        return True

    def _stay_with(self, control: Control) -> None:
        """Keep the connected client until it is gone."""
        self._clients.leave(control.sock)
        self.stats.connects += 1
        self.log.info("client connected from %s: wire v%d", control.peer, control.version)
        beat = self._loops.spawn("send heartbeats", control.beat)
        try:
            control.wait_until_ended()
        finally:
            beat.kill(block=False)
            self._link.lose(control, "this end is stopping")
            self.log.info("client disconnected: %s (%s)", control.closed_because, control.peer)

    # Visitors

    def _accept_visitors(self, listener: socket.socket) -> None:
        for sock, peer in accept_forever(listener, self.log, self._wait_for_slot):
            self.sessions.spawn("serve visitor", self._serve_visitor, sock, peer, time.monotonic())

    def _wait_for_slot(self) -> None:
        if self.sessions.full():
            self.stats.trouble["limit_reached"] += 1
            self.log.limited(logging.WARNING, "limit", "SEMAPHORE_LIMIT reached: new visitors wait", burst=1)
            self.sessions.wait_for_place()

    def _serve_visitor(self, sock: Socket, peer: Endpoint, began: float) -> None:
        try:
            self._bring(sock, peer, began)
        finally:
            sock.close()

    def _bring(self, sock: Socket, peer: Endpoint, began: float) -> None:
        """Bring a visitor to a data connection, and stay until both have ended."""
        timeout = self._settings.pool_get_timeout
        try:
            id, data = self._link.launch(TCP, timeout)
        except NoDataConnection:
            self.stats.tcp.ended["unserved"] += 1
            because = "" if self._link.control else ": no client is connected"
            words = "visitor %s closed, no data connection within %s%s"
            self.log.limited(logging.WARNING, "unserved visitors", words, peer, format_duration(timeout), because)
            return
        log = self.log.session(id)
        log.debug("visitor %s connected", peer)
        visitor = TCPStream(sock)
        if self._link.version == 1 and visitor.peek() is False:
            gevent.sleep(HEAD_START)
        log.debug("visitor %s: %s", peer, exchange(visitor, data, self.stats, began))

    # Upkeep

    def _report(self) -> None:
        while True:
            gevent.sleep(self._settings.report_interval)
            self._link.pool.end_interval()
            self.log.tell_rest()
            self.log.debug("%s", self.describe())
