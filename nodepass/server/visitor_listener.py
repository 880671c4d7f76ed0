"""Accepts visitors' TCP connections, and relays each over a data connection, within SEMAPHORE_LIMIT.

At the limit the next visitor waits in the kernel's queue. Behind a proxy, `visitors.proxies` says who the visitor is.
Which visitors are served is decided by `visitors.policy`: one that is refused is reset before it costs the client
anything. Where a data connection comes from is decided by `clients`; bytes are moved by `net.relay`.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence

import gevent

from nodepass.config.kinds import format_duration
from nodepass.config.urls import UnixPath
from nodepass.errors import NoDataConnection, NoTarget, ProxyHeaderError
from nodepass.log import Limit
from nodepass.net.listen import accept_forever, accept_waiting, close_all
from nodepass.net.relay import relay
from nodepass.net.sockets import Endpoint, Socket, format_without_zone
from nodepass.net.stream import TCPStream
from nodepass.server.clients import Clients
from nodepass.tasks import WorkerPool
from nodepass.tunnel.buffers import kernel_buffers
from nodepass.tunnel.part import Common, Part
from nodepass.visitors.access_log import AccessLog, Visit
from nodepass.visitors.policy import Policy
from nodepass.visitors.proxies import Proxies
from nodepass.wire.signals import TCP

# Seconds by which a launch precedes the end of a visitor's stream that came with it: a v1 client takes an idle data
# connection at its end for dead.
HEAD_START = 0.1


class VisitorListener(Part):
    """Serves visitors; `stop` still accepts those that have connected already, and then closes the listeners."""

    def __init__(
        self,
        common: Common,
        listeners: list[socket.socket],
        clients: Clients,
        sessions: WorkerPool,
        policy: Policy | None = None,
    ) -> None:
        """`policy`: None where all visitors are served."""
        super().__init__(common)
        self._listeners = listeners
        self._clients = clients
        self._sessions = sessions
        self._policy = policy
        self._access = AccessLog.of(common)
        self._proxies = Proxies.at_target(common)
        self._rates = common.rates

    def start(self) -> None:
        for listener in self._listeners:
            self._start_loop("accept visitors", self._accept, listener)

    def stop(self, timeout: float) -> None:
        """Closing a listener resets what waits in the kernel's queue, so all of that is accepted before."""
        self._end_loops()
        with contextlib.suppress(TimeoutError), gevent.Timeout(timeout, TimeoutError()):
            for listener in self._listeners:
                for sock, peer in accept_waiting(listener, self._wait_at_limit):
                    self._begin(sock, peer)
        close_all(self._listeners)

    def end_accepting(self) -> None:
        """What waits in the kernel's queue is the other process's."""
        self._end_loops()
        close_all(self._listeners)
        self._listeners = []

    def _accept(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log, self._wait_at_limit):
            self._begin(sock, peer)

    def _wait_at_limit(self) -> None:
        if self._sessions.full():
            self._stats.trouble["limit_reached"] += 1
            self._log.warning("visitor.limit_reached", "SEMAPHORE_LIMIT reached; new visitors wait", Limit(burst=1))
            self._sessions.wait_for_slot()

    def _begin(self, sock: Socket, peer: Endpoint) -> None:
        is_proxied = self._proxies and peer.host and self._proxies.trusts(peer.host)
        serve = self._serve_proxied if is_proxied else self._serve
        self._sessions.spawn("serve visitor", serve, sock, peer, time.monotonic())

    def _serve_proxied(self, sock: Socket, proxy: Endpoint, began: float) -> None:
        """Serve the visitor that a proxy names."""
        assert self._proxies
        try:
            peer, local = self._proxies.read(sock, proxy, began)
        except ProxyHeaderError as error:
            with contextlib.closing(sock):
                self._proxies.refuse(proxy, error, self._stats.visitors_refused)
                if self._access:
                    self._begin_visit(self._access, proxy, sock.getsockname(), began).end(error.reason)
        except BaseException:
            sock.close()
            raise
        else:
            self._serve(sock, peer, began, local)

    def _serve(self, sock: Socket, peer: Endpoint, began: float, local: Endpoint | None = None) -> None:
        """One visitor: launch a data connection, relay until both have ended, close both.

        `local`: the address that it has connected to, where that is not the socket's.
        """
        visitor = TCPStream(sock, resets=True)  # see listen_both
        counted = None
        try:
            visit = None
            if self._access:
                sockaddr = local.sockaddr if local else sock.getsockname()
                visit = self._begin_visit(self._access, peer, sockaddr, began)
            if self._policy and not (counted := self._policy.begin(peer.host, peer, visit)):
                return
            known = (visit.visitor, visit.local) if visit else (str(peer), str(local)) if local else ()
            id, data, slot = self._clients.launch(TCP, self._settings.pool_get_timeout, sock, known)
            slot.sessions += 1
            try:
                if visit:
                    visit.session, visit.client = id, slot.client
                log = self._log.session(id)
                log.debug("visitor.connected", "visitor %(visitor)s connected", visitor=peer)
                if slot.version == 1 and visitor.peek() is False:
                    gevent.sleep(HEAD_START)
                with kernel_buffers.share(sock, data.sock):
                    on_end = visit.end_relayed if visit else None
                    traffic = relay(visitor, data, self._stats, began, slot.deadlines, on_end, self._rates)
                words = "visitor %(visitor)s: " + traffic.SENTENCE
                log.debug("session.closed", words, visitor=peer, **traffic.fields())
            finally:
                slot.sessions -= 1
                data.close()
        except NoDataConnection as error:
            outcome = self._report_unserved(peer, error)
            if visit:
                visit.end(outcome)
        finally:
            visitor.close()
            if self._policy and counted:
                self._policy.end(counted)

    def _begin_visit(self, access: AccessLog, peer: Endpoint, local: Sequence[object], began: float) -> Visit:
        if peer.family == socket.AF_UNIX:
            return access.begin("tcp", began, "", str(UnixPath(peer.sockaddr[0])))
        return access.begin("tcp", began, format_without_zone(peer.sockaddr), format_without_zone(local))

    def _report_unserved(self, peer: Endpoint, error: NoDataConnection) -> str:
        """Count and log a visitor without a session; returns the outcome."""
        outcome = "unserved"
        words, why = "closed visitor %(visitor)s: no data connection within %(timeout)s", "pool_empty"
        if isinstance(error, NoTarget):
            outcome, why = "unreachable", error.reason
            words = "closed visitor %(visitor)s: " + str(error)
        elif not self._clients.connected:
            words, why = f"{words}, no client is connected", "no_client"
        self._stats.tcp.ended[outcome] += 1
        timeout = format_duration(self._settings.pool_get_timeout)
        self._log.warning("visitor.unserved", words, Limit(), visitor=peer, timeout=timeout, reason=why)
        return outcome
