"""Keeps the client connected to one server: dials, shakes hands, runs the connection, begins again after its end.

What happens while a control connection lasts is in `connection`. Failures are logged and counted here, and attempts
are repeated with growing pauses until `stop`. Which servers there are, `servers` knows.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import gevent
from gevent.event import Event

from nodepass.client.connection import Connection
from nodepass.client.data_dialer import Backoff, Route
from nodepass.client.launches import ServerLaunches
from nodepass.client.names import Member, Name
from nodepass.client.pool import ClientPool
from nodepass.config.kinds import DAY
from nodepass.errors import ProxyError, RefusedError, VerificationError
from nodepass.log import Limit
from nodepass.net.stream import TCPStream
from nodepass.outbound.idle_cuts import IdleCuts
from nodepass.outbound.source import bind_of
from nodepass.outbound.ways import Direct, Proxied, Way
from nodepass.stats import failure
from nodepass.tunnel.control import STOPPING, Agreement, ClientControl, Ending
from nodepass.tunnel.handshake import Terms, connect_to_server, explain, hint_for
from nodepass.tunnel.part import Common, Part
from nodepass.tunnel.security import SecurityLog
from nodepass.wire.auth import Key
from nodepass.wire.negotiation import BUSY
from nodepass.wire.signals import BYES, RELOAD, REPLACED, SHUTDOWN

SETTLED = 1.0  # seconds that a control connection must last for the next reconnect to begin with the shortest pause
REPEAT_WARNING = 60.0  # seconds between two warnings about the same failure to connect
REPEAT_BUSY = 600.0  # seconds, where there are other servers: it may be one of them, at another address
DIALS_WITHIN = 1.0  # seconds for data connections that are being made, where another process takes the place
FAREWELL = 1.0  # seconds for the server to end its side of the control connection at a shutdown
SAME_SERVER = "if this client is connected to it at another address, leave one of the two out, or raise CLIENTS there"


@dataclass(frozen=True)
class Server:
    """A server of the client: its address as it is shown, where that is, and what is demanded of it."""

    text: str
    name: Name | Member
    terms: Terms
    is_only: bool = True
    is_new: bool = True  # this tunnel has had no connection to it
    proxied: Proxied | None = None  # through which proxy it is reached; then `name` is the proxy's


class Connector(Part):
    """Has the client's connection to a server, or the reason why there is none."""

    def __init__(
        self,
        common: Common,
        server: Server,
        launches: ServerLaunches,
        security: SecurityLog,
        ready: Event,
        log_statistics: Callable[[], None],
    ) -> None:
        """`ready` is set once a handshake has succeeded."""
        super().__init__(common)
        self.connection: Connection | None = None  # while there is one
        self.failure = "not connected yet"  # why there is none
        self.server = server
        self._terms = server.terms
        self._bind = bind_of(common.settings.source_address, "SOURCE_ADDRESS")
        self._hint = ""  # where to look when the server leaves without a word
        self._cuts = IdleCuts()
        self._ready = ready
        self._security = security
        self._pool_limits = self._settings.min_pool_capacity, self._settings.max_pool_capacity
        self._is_first = server.is_new
        self._launches = launches
        self._log_statistics = log_statistics
        self._may_connect = Event()  # not while another process takes the place
        self._may_connect.set()
        self._stopping = Event()
        self._ended = Event()

    @property
    def control(self) -> ClientControl | None:
        """The control connection to the server, while there is one."""
        return self.connection.control if self.connection else None

    def describe(self) -> str:
        """The server and the pool, or why there is no connection, for an operator."""
        if self.connection:
            return f"{self.connection.control.describe()}, {self.connection.pool}"
        return f"not connected: {self.failure}"

    def set_key(self, key: Key) -> None:
        """Prove this key from the next connection on, which begins at once where it is another one."""
        terms = replace(self._terms, key=key)
        if terms == self._terms:
            return
        self._terms = terms
        if self.control:
            self.control.finish(Ending(RELOAD, BYES[RELOAD]), RELOAD)

    def limit_pool(self, lowest: int, highest: int) -> None:
        """The capacity that the pool may have, from now on."""
        self._pool_limits = lowest, highest
        if self.connection:
            self.connection.pool.limit(lowest, highest)

    def offer_place(self) -> None:
        """Do not connect again, because another process takes this one's place; leave it at once where that is v1's.

        A server takes one v1 client at a time, and cannot tell that the other one is the same. Nor can a v2 server tell
        whose a data connection is, where it needs no line: so none is being made when the other process connects.
        """
        self._may_connect.clear()
        if not self.connection:
            return
        if self.connection.control.version == 1:
            self.connection.control.finish(STOPPING, SHUTDOWN)
        else:
            self.connection.dialer.pause(DIALS_WITHIN)

    def keep_place(self) -> None:
        """Connect again, also where that process has taken the place."""
        self._may_connect.set()
        if self.connection:
            self.connection.dialer.resume()

    def start(self) -> None:
        self._start_loop("stay connected", self._stay_connected)

    def stop(self, timeout: float) -> None:
        """Leave the server; launches that it has already sent are still served."""
        self._stopping.set()
        if self.control:
            self.control.finish(STOPPING, SHUTDOWN)
            self._ended.wait(min(FAREWELL, timeout))

    def close(self) -> None:
        """End the connection at once."""
        self._stopping.set()
        if self.control:
            self.control.close(STOPPING)
        super().close()

    def unhealthy_reason(self) -> str:
        """Why a restart is needed, or ""; a server that cannot be reached is no reason."""
        return self.find_ended() or (self.connection.unhealthy_reason() if self.connection else "")

    def _stay_connected(self) -> None:
        backoff = Backoff(self._settings.service_cooldown)
        try:
            while self._wait_until_allowed():
                began = time.monotonic()
                try:
                    way, control, agreement = self._connect()
                except OSError as error:
                    self._report_failure(error)
                    told = error.reason if isinstance(error, RefusedError) else ""
                else:
                    self._serve(way, control, agreement)
                    told = control.ending.reason
                    if time.monotonic() - began > SETTLED:
                        backoff.reset()
                        if told == RELOAD:
                            continue  # what is there now accepts already
                self.server.name.refresh()  # it may have moved; the next attempt does not wait for that
                # Two clients with one key must not throw each other out as fast as they can.
                pause = self._settings.service_cooldown if told in (BUSY, REPLACED) else backoff.pause()
                if self._may_connect.is_set():
                    self._stopping.wait(pause)
        finally:
            self._ended.set()

    def _wait_until_allowed(self) -> bool:
        """Whether to connect, once that is known."""
        gevent.wait([self._may_connect, self._stopping], count=1)
        return not self._stopping.is_set()

    def _connect(self) -> tuple[Way, ClientControl, Agreement]:
        """A control connection after its handshake, and the way to it. Raises OSError, RefusedError among them."""
        timeout = self._settings.handshake_timeout
        self._terms.prepare()
        name = self.server.name
        if isinstance(name, Name) and not name.has_endpoints:
            self.failure = f"looking up {name.host!r}"
        way: Way = self.server.proxied or Direct(name.endpoints(timeout), self._bind)
        self._hint = hint_for(self._terms, way.has_proxy)
        stream = TCPStream(way.dial(timeout))
        with contextlib.ExitStack() as failed:
            failed.callback(stream.close)
            settings = self._settings
            control = ClientControl(stream, settings.report_interval, self._log, self._stats, settings.keepalive)
            failed.callback(control.hang_up)
            if way.has_proxy:
                control.note_proxy(str(way))
            late = TimeoutError(f"{control.peer} did not complete a handshake within {timeout:g}s; {self._hint}")
            with gevent.Timeout(timeout, late):
                agreement = connect_to_server(control, self._terms)
            failed.pop_all()
        return way.settle(control.sock), control, agreement

    def _report_failure(self, error: OSError) -> None:
        """Count and log why there is no connection; the same kind of it again only after REPEAT_WARNING."""
        self._stats.control_failures[token := failure(error)] += 1
        refused = isinstance(error, RefusedError | VerificationError)
        level, what = (logging.ERROR, "handshake failed with") if refused else (logging.WARNING, "cannot reach")
        why, repeat = explain(error, self._hint), REPEAT_WARNING
        if not self.server.is_only and isinstance(error, RefusedError) and error.reason == BUSY:
            level, why, repeat = logging.WARNING, f"{why}; {SAME_SERVER}", REPEAT_BUSY
        check = error.check if isinstance(error, VerificationError) else ""
        code = error.code if isinstance(error, ProxyError) else ""
        # Not by the text, which the server could vary. The kernel's and the resolver's errors have a number.
        kind = " ".join(filter(None, (token, check, code, "" if error.errno is None else f"errno {error.errno}")))
        self.failure = f"{what} the server {self.server.text}: {why}"
        self._log.log(
            level,
            "server.rejected" if refused else "server.unreachable",
            what + " the server %(server)s: %(error)s; retrying",
            Limit(kind, repeat, 1),
            server=self.server.text,
            reason=token,
            check=check,
            error=why,
        )

    def _serve(self, way: Way, control: ClientControl, agreement: Agreement) -> None:
        """Run one connection until it ends."""
        if self._stopping.is_set():  # since the dial
            control.close(STOPPING)
            return
        self._stats.connects += 1
        self._stats.reconnects += not self._is_first
        self._is_first = False
        self._log_connected(control, agreement)
        if way.has_proxy and not agreement.offer.tls:
            words = (
                "without TLS, most proxies end a session when one of its ends has sent all, and make a cut stream look"
                " whole: use a key, or tls=1"
            )
            self._log.warning("server.clear_through_proxy", words, Limit(seconds=DAY, burst=1), server=control.peer)
        self._security.report(control)
        route = Route.of(way, control, agreement, self._terms.host, self._settings)
        pool = ClientPool(self._log, self._stats, *self._pool_limits, self._cuts if way.has_proxy else None)
        self.connection = Connection(self.common, control, pool, route, self._launches, self._log_statistics)
        self._ready.set()
        try:
            self.connection.run()
        finally:
            self.connection = None
            self.failure = control.ending.words
            if control.vanished:
                self._launches.lose_server()
            self._log.info(
                "server.disconnected",
                "disconnected: %(error)s",
                Limit(),
                server=control.peer,
                reason=control.ending.reason,
                error=control.ending.words,
            )

    def _log_connected(self, control: ClientControl, agreement: Agreement) -> None:
        offer = agreement.offer
        self._log.info(
            "server.connected",
            "connected to %(server)s: data port %(data_port)d, tls %(tls)d, wire v%(wire)d",
            Limit(),
            server=control.peer,
            data_port=offer.data_port,
            tls=offer.tls,
            wire=offer.version,
        )
        if offer.tls and offer.version == 1:
            words = "the signals of this wire v1 server are not encrypted; only data connections are"
            self._log.warning("server.clear_signals", words, Limit(), server=control.peer)
        if offer.version == 1 and self._settings.proxy_protocol != "off":
            words = "this wire v1 server tells no visitor's address: the target's PROXY headers say that it is unknown"
            self._log.warning("server.no_addresses", words, Limit(seconds=DAY, burst=1), server=control.peer)
