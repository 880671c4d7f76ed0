"""Dials data connections for the client's pool: several at once, each with a deadline; failures slow it down.

One greenlet waits until connections are missing and begins their dials; each dial is a short piece of work in a
greenlet of its own. How one connection is made, up to the proof of the key, is a `Route`, which `connector`
makes after each handshake. `Backoff` is for the dials of both kinds of connection.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from random import uniform
from typing import TYPE_CHECKING

import gevent
from gevent.event import Event

from nodepass.client.pool import ClientPool
from nodepass.config.settings import Settings
from nodepass.errors import ClosedError, ProtocolError, VerificationError, reason
from nodepass.log import Limit
from nodepass.net.sockets import Socket, acknowledge
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.outbound.ways import Way
from nodepass.stats import failure
from nodepass.tasks import WorkerPool
from nodepass.tunnel.control import Agreement, Control
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import PROOF_LENGTH, same
from nodepass.wire.negotiation import DataHello
from nodepass.wire.signals import ID_LENGTH, parse_id

if TYPE_CHECKING:
    from nodepass.tls.sessions import Sessions
    from nodepass.tls.verify import Expected

DIALS_AT_ONCE = 64
SAME_MOMENT = 0.1  # seconds: a server that goes away refuses dials, too; then its going is logged, and this is not
UNREACHABLE = ("closed", "proxy", "timeout", "unreachable")  # failures of which a firewall can be the cause
RARELY = Limit(seconds=60.0, burst=1)
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


class DataDialer(Part):
    """Keeps the pool at its capacity."""

    def __init__(self, common: Common, pool: ClientPool, route: Route) -> None:
        super().__init__(common)
        self._pool = pool
        self._route = route
        self._dials = WorkerPool(self._log, self._stats, DIALS_AT_ONCE)
        self._backoff = Backoff(self._settings.service_cooldown)
        self._failures = 0  # since the last success
        self._is_lacking = False  # and the log says so
        self._may_dial = Event()
        self._may_dial.set()

    def start(self) -> None:
        self._start_loop("fill pool", self._fill)

    def close(self) -> None:
        super().close()
        self._dials.kill()

    def pause(self, timeout: float) -> None:
        """Begin no dial until `resume`; return when those that run have ended, or after `timeout` seconds."""
        self._may_dial.clear()
        self._dials.join(timeout)

    def resume(self) -> None:
        """Dial again."""
        self._may_dial.set()

    def _fill(self) -> None:
        pool = self._pool
        while True:
            pool.wanted.wait()
            pool.wanted.clear()
            if pool.should_pause() or self._failures:
                self._failures = 0
                gevent.sleep(self._backoff.pause())
            while pool.missing > 0:
                self._may_dial.wait()
                pool.begin_dial()
                self._dials.spawn("dial data connection", self._dial)

    def _dial(self) -> None:
        """Add one connection to the pool."""
        began = time.monotonic()
        try:
            id, stream = self._route.make()
        except OSError as error:
            self._failures += 1
            self._pool.note_failed_dial()
            gevent.sleep(SAME_MOMENT)
            self._report_failure(error)
        except Exception:
            self._failures += 1  # a bug must not be repeated without a pause
            raise
        else:
            self._stats.data_dials.observe(time.monotonic() - began)
            self._failures = 0
            self._backoff.reset()
            self._pool.add(id, stream)
            if self._is_lacking:
                self._is_lacking = False
                self._log.info("data.restored", "data connections can be opened again", RARELY)
        finally:
            self._pool.end_dial()

    def _report_failure(self, error: OSError) -> None:
        """Count and log it; where the pool has run out, also what that means and where to look."""
        why, because = failure(error), reason(error)
        self._stats.data_failures[why] += 1
        level, check = logging.WARNING, ""
        if isinstance(error, VerificationError):
            level, check = logging.ERROR, error.check
        words = "cannot open a data connection: %(error)s"
        self._log.log(level, "data.dial_failed", words, Limit(burst=1), reason=why, check=check, error=because)
        if self._pool.is_lacking and not self._is_lacking:
            self._is_lacking = True
            words = "no data connections to %(address)s, so visitors are not served: %(error)s"
            if why in UNREACHABLE and not self._route.agreement.offer.mux:
                words += "; is the data port reachable? DATA_PORT=tunnel on the server needs one port only"
            address = self._route.way
            self._log.warning("data.missing", words, RARELY, address=address, reason=why, error=because)


@dataclass(frozen=True)
class Route:
    """How data connections are made while one control connection lasts."""

    way: Way
    host: str  # of the server, as it was given: the name that its certificate must have
    timeout: float  # seconds for each connection to become ready
    keepalive: float  # seconds between probes
    agreement: Agreement
    sessions: Sessions | None  # to resume TLS from; None without TLS and in wire v1

    @classmethod
    def of(cls, way: Way, control: Control, agreement: Agreement, host: str, settings: Settings) -> Route:
        """The way on which the server was reached, to the port that it offered."""
        offer = agreement.offer
        way = way if offer.mux else way.with_port(offer.data_port)
        sessions = _open_sessions(control, agreement, host) if offer.tls and offer.version > 1 else None
        return cls(way, host, settings.handshake_timeout, settings.keepalive, agreement, sessions)

    def close(self) -> None:
        """The control connection has ended: its TLS sessions are forgotten."""
        if self.sessions:
            self.sessions.forget()

    def make(self) -> tuple[str, Stream]:
        """Dial, TLS, say whose it is, read the id, prove the key. Raises OSError."""
        sock: Socket | None = None
        with gevent.Timeout(self.timeout) as late:
            try:
                sock = self.way.dial(self.timeout, self.keepalive)
                return self._prepare(sock)
            except BaseException as error:
                if sock:
                    sock.close()
                if error is late:
                    raise TimeoutError(f"{self.way}: not ready within {self.timeout:g}s") from None
                raise

    def _prepare(self, sock: Socket) -> tuple[str, Stream]:
        plain = TCPStream(sock)
        stream: Stream = self._encrypted(sock) if self.agreement.offer.tls else plain
        if sid := self.agreement.offer.sid:
            stream.write(DataHello(sid).encode())
        if stream is plain:
            plain.wait_readable()  # the id takes a round trip, and a read that fails costs more than this wait
        try:
            id = parse_id(recv_exactly(stream, ID_LENGTH))
            self._prove(stream, id)
        except ClosedError:
            words = "closed by the server before it sent an id: its pool is full (MAX_POOL_CAPACITY), or see its log"
            raise ClosedError(words) from None
        if self.way.has_proxy:
            acknowledge(sock)
        if self.sessions and not stream.plain:
            self.sessions.offer(stream)
        # If this process is killed while the launch is in transit, the end must not look like the target's.
        stream.reset_on_close(True)
        return id, stream

    def _encrypted(self, sock: Socket) -> Stream:
        from nodepass.tls.stream import connect_tls

        session = self.sessions.take() if self.sessions else None
        return connect_tls(sock, _expected(self.agreement, self.host), self.agreement.version > 1, session)

    def _prove(self, stream: Stream, id: str) -> None:
        """With a key: check that the server has it and prove the same, on this very channel."""
        session = self.agreement.session
        if not session:
            return
        channel = stream.exporter()
        if not same(recv_exactly(stream, PROOF_LENGTH), session.id_proof(id, channel)):
            raise ProtocolError("wrong proof of the key behind the id (possible man in the middle)")
        stream.write(session.data_proof(id, channel))


def _expected(agreement: Agreement, host: str) -> Expected:
    """What a data connection's certificate must be: the control connection's has been judged already."""
    from nodepass.tls.verify import Expected, Verify

    return Expected(host, Verify.ENFORCE if agreement.offer.tls == 2 else Verify.IGNORE)


def _open_sessions(control: Control, agreement: Agreement, host: str) -> Sessions:
    from nodepass.tls.sessions import Sessions

    sessions = Sessions(_expected(agreement, host))
    sessions.offer(control.stream)
    return sessions
