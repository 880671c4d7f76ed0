"""The server's TCP entrance: accepts visitors and brings each to a data connection, within SEMAPHORE_LIMIT."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable

import gevent

from nodepass.config import Settings, format_duration
from nodepass.errors import NoDataConnection
from nodepass.log import Limit, Log
from nodepass.net.listen import accept_forever, accept_waiting
from nodepass.net.relay import exchange
from nodepass.net.sockets import Endpoint, Socket
from nodepass.net.stream import TCPStream
from nodepass.server.client_slot import ClientSlot
from nodepass.stats import Stats
from nodepass.tasks import WorkerPool
from nodepass.wire.signals import TCP

# Seconds for a launch to be read before the end of a visitor's stream that came with it: a v1 client takes an idle data
# connection at its end for dead.
HEAD_START = 0.1


class VisitorListener:
    """Lets visitors in; at the limit the next waits in the kernel's queue."""

    def __init__(self, slot: ClientSlot, sessions: WorkerPool, settings: Settings, log: Log, stats: Stats) -> None:
        self._slot = slot
        self._sessions = sessions
        self._settings = settings
        self._log = log
        self._stats = stats

    def run(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log, self._wait_for_place):
            self._let_in(sock, peer)

    def let_in_waiting(self, listeners: Iterable[socket.socket]) -> None:
        """Before the listeners are closed: let in who has connected already, within SHUTDOWN_TIMEOUT."""
        with contextlib.suppress(TimeoutError), gevent.Timeout(self._settings.shutdown_timeout, TimeoutError()):
            for listener in listeners:
                for sock, peer in accept_waiting(listener, self._wait_for_place):
                    self._let_in(sock, peer)

    def _let_in(self, sock: Socket, peer: Endpoint) -> None:
        self._sessions.spawn("serve visitor", self._serve, sock, peer, time.monotonic())

    def _wait_for_place(self) -> None:
        if self._sessions.full():
            self._stats.trouble["limit_reached"] += 1
            self._log.warning("visitor.limit_reached", "SEMAPHORE_LIMIT reached: new visitors wait", Limit(burst=1))
            self._sessions.wait_for_slot()

    def _serve(self, sock: Socket, peer: Endpoint, began: float) -> None:
        try:
            self._bring(sock, peer, began)
        finally:
            sock.close()

    def _bring(self, sock: Socket, peer: Endpoint, began: float) -> None:
        """Bring a visitor to a data connection, and stay until both have ended."""
        timeout = self._settings.pool_get_timeout
        try:
            id, data = self._slot.launch(TCP, timeout)
        except NoDataConnection:
            self._stats.tcp.ended["unserved"] += 1
            words = "visitor %(visitor)s closed, no data connection within %(timeout)s"
            why = "pool_empty"
            if not self._slot.control:
                why, words = "no_client", f"{words}: no client is connected"
            self._log.warning(
                "visitor.unserved",
                words,
                Limit(),
                visitor=peer,
                timeout=format_duration(timeout),
                reason=why,
            )
            return
        log = self._log.session(id)
        log.debug("visitor.connected", "visitor %(visitor)s connected", visitor=peer)
        visitor = TCPStream(sock, resets=True)  # see listen_target
        if self._slot.version == 1 and visitor.peek() is False:
            gevent.sleep(HEAD_START)
        traffic = exchange(visitor, data, self._stats, began)
        log.debug("session.closed", "visitor %(visitor)s: " + traffic.SENTENCE, visitor=peer, **traffic.fields())
