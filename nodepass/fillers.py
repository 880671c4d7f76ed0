"""What fills the pool: the client dials, the server accepts.

Each connection is prepared in a greenlet of its own with a deadline, so that one silent peer holds up nobody.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable
from random import uniform
from typing import TYPE_CHECKING

import gevent

from nodepass.crew import Crew
from nodepass.errors import VerificationError
from nodepass.listen import accept_forever
from nodepass.log import Log
from nodepass.net import Endpoint, Stream, TCPStream, dial, format_sockaddr, reason, recv_exactly
from nodepass.pool import ClientPool, ServerPool
from nodepass.protocol import ID_LENGTH, parse_id
from nodepass.stats import Stats

if TYPE_CHECKING:
    from OpenSSL import SSL

DIALS_AT_ONCE = 64
HANDSHAKES_AT_ONCE = 256
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


class DialingFiller:
    """The client's: keeps the pool at its capacity, several dials at once; failures slow it down."""

    def __init__(
        self, pool: ClientPool, make: Callable[[], tuple[str, Stream]], backoff: Backoff, log: Log, stats: Stats
    ) -> None:
        self._pool = pool
        self.dials = Crew(log, DIALS_AT_ONCE)
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
            if self._failures or pool.died_young:
                self._failures = pool.died_young = 0
                gevent.sleep(self._backoff.pause())
            while pool.missing > 0:
                pool.dialling += 1
                self.dials.spawn("dial data connection", self._add_one)

    def _add_one(self) -> None:
        try:
            id, stream = self._make()
        except OSError as error:
            self._failures += 1
            self._stats.trouble["data_connections_failed"] += 1
            level = logging.ERROR if isinstance(error, VerificationError) else logging.WARNING
            self._log.limited(level, "data connection", "cannot make a data connection: %s", reason(error), burst=1)
        else:
            self._failures = 0
            self._backoff.reset()
            self._pool.add(id, stream)
        finally:
            self._pool.end_dial()


def dial_data(endpoint: Endpoint, host: str, context: SSL.Context | None, timeout: float) -> tuple[str, Stream]:
    """One data connection: dial, TLS if the server has it, read the id; all within `timeout` seconds.

    Raises OSError.
    """
    with gevent.Timeout(timeout, TimeoutError(f"{endpoint}: no id within {timeout:g}s")):
        sock = dial([endpoint], timeout)
        try:
            stream: Stream = TCPStream(sock)
            if context:
                from nodepass.tls import connect_tls

                stream = connect_tls(sock, context, host)
            return parse_id(recv_exactly(stream, ID_LENGTH)), stream
        except BaseException:
            sock.close()
            raise


class AcceptingFiller:
    """The server's: takes the data connections of the connected client, and of nobody else."""

    def __init__(self, pool: ServerPool, log: Log, stats: Stats, timeout: float) -> None:
        self._pool = pool
        self._log = log
        self._stats = stats
        self._timeout = timeout
        self.handshakes = Crew(log, HANDSHAKES_AT_ONCE)

    def run(
        self,
        listener: socket.socket,
        owner: Callable[[socket.socket], object],
        context: Callable[[], SSL.Context | None],
    ) -> None:
        """Accept until the listener is closed.

        `owner` says whose a connection is, None for nobody's; it is asked again when the handshake is over, since the
        client may have changed meanwhile.
        """
        for sock in accept_forever(listener, self._log, self.handshakes.wait_for_place):
            whose = owner(sock)
            if whose is None:
                self._refuse(sock, "it is not from the connected client")
            elif len(self._pool) >= self._pool.bounds[1]:
                self._refuse(sock, "the pool is full")
            else:
                self.handshakes.spawn(
                    "accept data connection", self._prepare, sock, context(), lambda s=sock, w=whose: owner(s) is w
                )

    def _prepare(self, sock: socket.socket, context: SSL.Context | None, still_wanted: Callable[[], bool]) -> None:
        try:
            with gevent.Timeout(self._timeout, TimeoutError(f"no TLS handshake within {self._timeout:g}s")):
                stream: Stream = TCPStream(sock)
                if context:
                    from nodepass.tls import accept_tls

                    stream = accept_tls(sock, context)
                id = self._new_id()
                stream.write(id.encode())
        except OSError as error:
            self._refuse(sock, reason(error))
        except BaseException:
            sock.close()
            raise
        else:
            if still_wanted():
                self._pool.add(id, stream)
            else:
                stream.close()

    def _new_id(self) -> str:
        while (id := secrets.token_hex(ID_LENGTH // 2)) in self._pool:
            pass
        return id

    def _refuse(self, sock: socket.socket, because: str) -> None:
        self._stats.trouble["data_connections_refused"] += 1
        try:
            peer = format_sockaddr(sock.getpeername())
        except OSError:
            peer = "a peer that has gone"
        self._log.limited(logging.WARNING, "data refused", "data connection from %s refused: %s", peer, because)
        sock.close()
