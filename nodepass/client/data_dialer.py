"""Dials data connections until the pool is full, several at once, each with a deadline; failures slow it down."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import uniform
from typing import TYPE_CHECKING

import gevent

from nodepass.client.pool import ClientPool
from nodepass.errors import ClosedError, VerificationError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Endpoint, Socket, dial
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.stats import Stats, failure
from nodepass.tasks import WorkerPool
from nodepass.wire.auth import SessionKey
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
            if pool.should_pause() or self._failures:
                self._failures = 0
                gevent.sleep(self._backoff.pause())
            while pool.missing > 0:
                pool.begin_dial()
                self.dials.spawn("dial data connection", self._add_one)

    def _add_one(self) -> None:
        began = time.monotonic()
        try:
            id, stream = self._make()
        except OSError as error:
            self._failures += 1
            self._stats.data_failures[why := failure(error)] += 1
            gevent.sleep(SAME_MOMENT)
            level, check = logging.WARNING, ""
            if isinstance(error, VerificationError):
                level, check = logging.ERROR, error.check
            words = "cannot make a data connection: %(error)s"
            self._log.log(
                level, "data.dial_failed", words, Limit(burst=1), reason=why, check=check, error=reason(error)
            )
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
