"""Accepts data connections and prepares each for the pool: TLS, an id, and the proof of the key where there is one.

Only connections of the connected client are taken, and `client_slot` says which those are. Each is prepared in a
greenlet of its own, so that a silent peer holds up no other. `control_listener` hands over those that come to the
tunnel port (DATA_PORT=tunnel).
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

import gevent

from nodepass.errors import ProtocolError, reason
from nodepass.log import Limit
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, Socket
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.server.client_slot import ClientSlot
from nodepass.server.pending import QUIET, PendingConnections
from nodepass.stats import failure
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import PROOF_LENGTH, same
from nodepass.wire.signals import ID_LENGTH

if TYPE_CHECKING:
    from nodepass.tls.certificates import ServerCertificate


class DataListener(Part):
    """Fills the server's pool with what its client dials."""

    def __init__(
        self,
        common: Common,
        listeners: list[socket.socket],
        slot: ClientSlot,
        certificate: ServerCertificate | None,
    ) -> None:
        """`listeners` are none where data connections come to the tunnel port; `certificate` is None without TLS."""
        super().__init__(common)
        self._listeners = listeners
        self._slot = slot
        self._pool = slot.pool
        self._certificate = certificate
        self._pending = PendingConnections("data", self._log, self._stats)

    def start(self) -> None:
        for listener in self._listeners:
            self._start_loop("accept data connections", self._accept, listener)

    def close(self) -> None:
        super().close()
        self._pending.close()

    def admit(self, sock: Socket, peer: Endpoint) -> None:
        """Prepare one connection for the pool, which owns it from then on."""
        agreement = self._slot.agreement_with(peer)
        if agreement is None:
            self._reject_other(sock, peer)
        elif self._pool.full:
            self._reject(sock, peer, "pool_full", "the pool is full")
        elif self._certificate or agreement.session:
            self._pending.accept(sock, self._prepare, peer, agreement, silence=QUIET if self._certificate else 0.0)
        else:
            self._add(sock, peer)

    def _accept(self, listener: socket.socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            self.admit(sock, peer)

    def _add(self, sock: Socket, peer: Endpoint) -> None:
        """Eight bytes into a new connection need neither a wait nor a greenlet."""
        id, stream = self._new_id(), TCPStream(sock)
        try:
            stream.write(id.encode())
        except OSError as error:
            self._reject(sock, peer, failure(error), reason(error))
        else:
            self._pool.add(id, stream)

    def _prepare(self, sock: Socket, peer: Endpoint, agreement: Agreement) -> None:
        """Shake hands, send the id, check the proof of the key, and give the connection to the pool."""
        timeout = self._settings.handshake_timeout
        late = TimeoutError(f"not ready within {timeout:g}s")
        try:
            with gevent.Timeout(self._pending.time_left(sock, timeout), late):
                stream = self._encrypted(sock) if self._certificate else TCPStream(sock)
                id = self._new_id()
                stream.write(id.encode())
                if agreement.session:
                    verify_proof(recv_exactly(stream, PROOF_LENGTH), agreement.session.data_proof(id))
        except OSError as error:
            self._reject(sock, peer, failure(error), reason(error))
        except BaseException:
            sock.close()
            raise
        else:
            if self._slot.agreement_with(peer) is agreement:
                self._pool.add(id, stream)
            else:
                stream.close()  # the client has changed meanwhile

    def _encrypted(self, sock: Socket) -> Stream:
        from nodepass.tls.stream import accept_tls

        assert self._certificate
        return accept_tls(sock, self._certificate.context)

    def _new_id(self) -> str:
        while (id := os.urandom(ID_LENGTH // 2).hex()) in self._pool:
            pass
        return id

    def _reject_other(self, sock: Socket, peer: Endpoint) -> None:
        if self._slot.control:
            self._reject(sock, peer, "wrong_address", "not from the connected client's address")
        else:  # most often the last ones of a client that has just left, which is no reason for a warning
            self._reject(sock, peer, "no_client", "no client is connected", logging.DEBUG)

    def _reject(self, sock: Socket, peer: Endpoint, why: str, because: str, level: int = logging.WARNING) -> None:
        self._stats.data_failures[why] += 1
        words = "rejected data connection from %(peer)s: %(error)s"
        self._log.log(level, "data.rejected", words, Limit(because), peer=peer, reason=why, error=because)
        sock.close()


def verify_proof(proof: bytes, expected: bytes) -> None:
    """Raise ProtocolError where a data connection's proof of the key is wrong."""
    if not same(proof, expected):
        raise ProtocolError("wrong proof of the key")
