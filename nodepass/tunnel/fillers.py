"""What fills the pool: the client dials, the server accepts.

Each connection is prepared in a greenlet of its own with a deadline, so that one silent peer holds up nobody.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import uniform
from typing import TYPE_CHECKING

import gevent

from nodepass.client.pool import ClientPool
from nodepass.errors import ClosedError, ProtocolError, VerificationError
from nodepass.log import Log
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, Socket, dial, reason
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.server.pending import PendingConnections
from nodepass.server.pool import ServerPool
from nodepass.stats import Stats, failure
from nodepass.tasks import WorkerPool
from nodepass.tunnel.handshake import Agreement
from nodepass.wire.auth import PROOF_LENGTH, SessionKey, same
from nodepass.wire.signals import DATA_PREFIX, ID_LENGTH, parse_id

if TYPE_CHECKING:
    from OpenSSL import SSL

DIALS_AT_ONCE = 64
SAME_MOMENT = 0.1  # seconds: a server that goes away refuses dials too; that it has gone then says it all
FIRST_PAUSE = 0.1  # seconds before a failed attempt is repeated; doubled with each failure


class Backoff:
    """Pauses between attempts: 0.1 s, doubling up to `longest` seconds, with jitter so that many clients spread out."""

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._next = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin again with the shortest pause."""
        self._next = min(FIRST_PAUSE, self._longest)

    def pause(self) -> float:
        """Seconds to wait now."""
        seconds, self._next = self._next, min(2 * self._next, self._longest)
        return uniform(0.75, 1.0) * seconds


class DataDialer:
    """The client's: keeps the pool at its capacity, several dials at once; failures slow it down."""

    def __init__(
        self, pool: ClientPool, make: Callable[[], tuple[str, Stream]], backoff: Backoff, log: Log, stats: Stats
    ) -> None:
        self._pool = pool
        self.dials = WorkerPool(log, stats, DIALS_AT_ONCE)
        self._make = make
        self._backoff = backoff
        self._log = log
        self._stats = stats
        self._failures = 0  # since the last success

    def run(self) -> None:
        """Fill until killed."""
        pool = self._pool
        while True:
            pool.wanted.wait()
            pool.wanted.clear()
            if pool.is_unwanted() or self._failures:
                self._failures = 0
                gevent.sleep(self._backoff.pause())
            while pool.missing > 0:
                pool.dialling += 1
                self.dials.spawn("dial data connection", self._add_one)

    def _add_one(self) -> None:
        began = time.monotonic()
        try:
            id, stream = self._make()
        except OSError as error:
            self._failures += 1
            self._stats.data_failures[failure(error)] += 1
            gevent.sleep(SAME_MOMENT)
            level = logging.ERROR if isinstance(error, VerificationError) else logging.WARNING
            self._log.limited(level, "data connection", "cannot make a data connection: %s", reason(error), burst=1)
        except Exception:
            self._failures += 1  # a bug must not be repeated without a pause
            raise
        else:
            self._stats.data_dials.observe(time.monotonic() - began)
            self._failures = 0
            self._backoff.reset()
            self._pool.add(id, stream)
        finally:
            self._pool.end_dial()


@dataclass(frozen=True)
class Route:
    """How a client makes data connections while it has one control connection."""

    endpoint: Endpoint
    host: str  # that the server was asked for by: the certificate's name
    timeout: float  # seconds for each connection to become ready
    context: SSL.Context | None  # None without TLS
    verify: bool  # the certificate's chain and name
    session: SessionKey | None  # None without a key
    shared_port: bool  # connections say first what they are
    fingerprint: str  # that the certificate must have, or nothing

    def make(self) -> tuple[str, Stream]:
        """Dial, TLS, read the id, prove the key. Raises OSError."""
        with gevent.Timeout(self.timeout) as late:
            sock = dial([self.endpoint], self.timeout)
            try:
                return self._prepare(sock)
            except BaseException as error:
                sock.close()
                if error is late:
                    raise TimeoutError(f"{self.endpoint}: not ready within {self.timeout:g}s") from None
                raise

    def _prepare(self, sock: Socket) -> tuple[str, Stream]:
        plain = TCPStream(sock)
        stream: Stream = plain
        if self.shared_port:
            stream.write(DATA_PREFIX)
        if self.context:
            from nodepass.tls.stream import connect_tls
            from nodepass.tls.verify import Expected

            stream = connect_tls(sock, self.context, Expected(self.host, self.verify, self.fingerprint))
        else:
            plain.wait_readable()  # an id takes a round trip; a read that finds none yet costs more
        try:
            id = parse_id(recv_exactly(stream, ID_LENGTH))
        except ClosedError:
            words = (
                "closed by the server before it gave an id: its pool is full (MAX_POOL_CAPACITY), or its log says why"
            )
            raise ClosedError(words) from None
        if self.session:
            stream.write(self.session.data_proof(id))
        # Its launch may be on its way when this process is killed, and then its end must not look like an answer.
        stream.reset_on_close(True)
        return id, stream


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
        self._log.limited(level, because, "data connection from %s refused: %s", peer, because)
        sock.close()


def _check(proof: bytes, expected: bytes) -> None:
    if not same(proof, expected):
        raise ProtocolError("its proof of the key is wrong")
