"""Accepts data connections and prepares each for the pool, so that one silent peer holds up nobody."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import gevent

from nodepass.errors import ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, Socket
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.server.pending import PendingConnections
from nodepass.server.pool import ServerPool
from nodepass.stats import Stats, failure
from nodepass.tunnel.control import Agreement
from nodepass.wire.auth import PROOF_LENGTH, same
from nodepass.wire.signals import ID_LENGTH

if TYPE_CHECKING:
    from OpenSSL import SSL


class DataListener:
    """The server's: takes the data connections of the connected client, and of nobody else."""

    def __init__(
        self,
        pool: ServerPool,
        owner: Callable[[Endpoint], Agreement | None],
        has_client: Callable[[], bool],
        context: Callable[[], SSL.Context | None],
        log: Log,
        stats: Stats,
        timeout: float,
    ) -> None:
        """`owner` says whose a peer's connection is: the agreement with the client, None if it is nobody's.

        `context` is TLS's at this moment, None without TLS.
        """
        self._pool = pool
        self._owner = owner
        self._has_client = has_client
        self._context = context
        self._log = log
        self._stats = stats
        self._timeout = timeout
        self.handshakes = PendingConnections("the data port", log, stats)

    def run(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            self.admit(sock, peer)

    def admit(self, sock: Socket, peer: Endpoint) -> None:
        """Prepare one connection for the pool, which owns it from then on."""
        whose, context = self._owner(peer), self._context()
        if whose is None:
            self._refuse_stranger(sock, peer)
        elif len(self._pool) >= self._pool.bounds[1]:
            self._refuse(sock, peer, "pool_full", "the pool is full")
        elif context or whose.session:
            self.handshakes.receive(sock, self._prepare, peer, context, whose, speaks_first=context is not None)
        else:
            self._add(sock, peer)

    def _add(self, sock: Socket, peer: Endpoint) -> None:
        """Eight bytes into a new connection need neither a wait nor a greenlet."""
        id, stream = self._new_id(), TCPStream(sock)
        try:
            stream.write(id.encode())
        except OSError as error:
            self._refuse(sock, peer, failure(error), reason(error))
        else:
            self._pool.add(id, stream)

    def _prepare(self, sock: Socket, peer: Endpoint, context: SSL.Context | None, whose: Agreement) -> None:
        try:
            late = TimeoutError(f"not ready within {self._timeout:g}s")
            with gevent.Timeout(self.handshakes.left(sock, self._timeout), late):
                stream: Stream = TCPStream(sock)
                if context:
                    from nodepass.tls.stream import accept_tls

                    stream = accept_tls(sock, context)
                id = self._new_id()
                stream.write(id.encode())
                if whose.session:
                    _check(recv_exactly(stream, PROOF_LENGTH), whose.session.data_proof(id))
        except OSError as error:
            self._refuse(sock, peer, failure(error), reason(error))
        except BaseException:
            sock.close()
            raise
        else:
            if self._owner(peer) is whose:
                self._pool.add(id, stream)
            else:
                stream.close()  # the client has changed meanwhile

    def _new_id(self) -> str:
        while (id := os.urandom(ID_LENGTH // 2).hex()) in self._pool:
            pass
        return id

    def _refuse_stranger(self, sock: Socket, peer: Endpoint) -> None:
        if self._has_client():
            self._refuse(sock, peer, "wrong_address", "it is not from the connected client")
        else:  # most often the last ones of a client that has just left, which is nothing to warn of
            self._refuse(sock, peer, "no_client", "no client is connected", logging.DEBUG)

    def _refuse(self, sock: Socket, peer: Endpoint, why: str, because: str, level: int = logging.WARNING) -> None:
        self._stats.data_failures[why] += 1
        words = "data connection from %(peer)s refused: %(error)s"
        self._log.log(level, "data.rejected", words, Limit(because), peer=peer, reason=why, error=because)
        sock.close()


def _check(proof: bytes, expected: bytes) -> None:
    if not same(proof, expected):
        raise ProtocolError("its proof of the key is wrong")
