"""The part of `nodepass --check` about a client: its targets, and of each server the handshake and the data port.

A check is non-disruptive: a server that has a client which responds does not give its place away. The check completes
no data connection, because the server would give it to a visitor: it connects to the data port after it has left, when
the server accepts no data connection into its pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass, replace

import gevent

from nodepass.client.health import HealthCheck
from nodepass.client.target import http_host
from nodepass.config.settings import Settings
from nodepass.config.urls import SERVERS, Address, ClientURL, Place, UnixPath
from nodepass.errors import RefusedError, VerificationError, reason
from nodepass.log import Log
from nodepass.net.sockets import Socket, dial, resolve
from nodepass.net.stream import TCPStream
from nodepass.net.unix import dial_unix
from nodepass.outbound.source import bind_of, find_missing
from nodepass.outbound.ways import Direct, Proxied, Way
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tools.check_ports import is_connected
from nodepass.tools.report import Report
from nodepass.tunnel.control import STOPPING, Agreement, ClientControl
from nodepass.tunnel.handshake import Terms, connect_to_server, explain, hint_for
from nodepass.wire.auth import Key, new_client_id
from nodepass.wire.negotiation import BUSY
from nodepass.wire.signals import SHUTDOWN

_LOCAL = ("", "localhost", "127.0.0.1", "::1")


def check_client(
    url: ClientURL, settings: Settings, key: Key | None, report: Report, own_ports: Collection[int]
) -> None:
    """Check one client URL. `own_ports`: the tunnel ports of the servers in the same command."""
    for error in find_missing(settings):
        report.warn(url.name, f"{reason(error)}; until it has, connections fail")
    for place in url.targets:
        _check_target(url, place, settings, report)
    terms = replace(Terms.of(url, new_client_id(), [key] if key else []), is_check=True)
    terms.prepare()
    bridges = TaskGroup(Log(url.name), Stats())
    for address in url.tunnels:
        if address.port in own_ports and address.host in _LOCAL:
            report.ok(url.name, f"server {address}: another URL of this command; not tried")
            continue
        own = terms.for_server(address.host, terms.client)
        try:
            ways = _find_ways(url, address, settings, bridges)
        except OSError as error:
            report.fail(url.name, f"server {address}: cannot be reached: {reason(error)}")
            continue
        for server, way in ways:
            _check_server(url, server, way, settings, own, report)
    bridges.kill()


def _find_ways(url: ClientURL, address: Address, settings: Settings, bridges: TaskGroup) -> list[tuple[str, Way]]:
    """How the servers at an address of the URL are reached, and how each is shown. Raises OSError."""
    bind = bind_of(settings.source_address, "SOURCE_ADDRESS")
    if passage := url.passages.get(address):
        proxy = Address(passage.proxy.host, passage.proxy.port)
        return [(str(address), Proxied(address, passage, bind, lambda _: resolve(proxy), bridges.spawn))]
    endpoints = resolve(address)
    if settings.servers == "all":
        return [(str(each), Direct([each], bind)) for each in endpoints[:SERVERS]]
    return [(str(address), Direct(endpoints, bind))]


def _check_server(url: ClientURL, server: str, way: Way, settings: Settings, terms: Terms, report: Report) -> None:
    """Check one server, which is shown as `server`."""
    try:
        already_connected = isinstance(way, Direct) and is_connected(way.endpoints)
        sock = way.dial(settings.handshake_timeout)
    except OSError as error:
        report.fail(url.name, f"server {server}: cannot be reached: {reason(error)}")
        return
    with contextlib.closing(sock):
        control = ClientControl(TCPStream(sock), settings.report_interval, Log(url.name), Stats())
        way = way.settle(sock)
        where = f"through {way.passage.proxy}" if isinstance(way, Proxied) else f"at {way}"
        report.ok(url.name, f"server {server}: reached {where}")
        _ServerCheck(url, server, settings, terms, report, control, way, already_connected).run()


def _check_target(url: ClientURL, place: Place, settings: Settings, report: Report) -> None:
    """Try one target as HEALTH_CHECK does, or without it by connecting."""
    check = settings.health_check
    if not settings.tcp and check == "off":
        report.ok(url.name, f"target {place}: UDP only; not tried")
        return
    over = " over TCP" if isinstance(place, Address) else ""
    timeout, words = settings.handshake_timeout, f"HEALTH_CHECK={check}"
    try:
        sock = dial_unix(place.path, timeout) if isinstance(place, UnixPath) else _dial(place, settings)
    except OSError as error:
        words = f"target {place}: cannot be reached{over}: {reason(error)}"
        report.warn(url.name, f"{words}; the tunnel retries for each visitor")
        return
    try:
        HealthCheck(settings, url.tunnel_name).run(sock, http_host(place), timeout)
    except OSError as error:
        report.warn(url.name, f"target {place}: reached, but {words} has failed: {reason(error)}")
    else:
        report.ok(url.name, f"target {place}: reached" + (f", {words} has succeeded" if check != "off" else ""))


def _dial(target: Address, settings: Settings) -> Socket:
    bind = bind_of(settings.target_source_address, "TARGET_SOURCE_ADDRESS")
    return dial(resolve(target), settings.handshake_timeout, bind=bind)


@dataclass(frozen=True)
class _ServerCheck:
    """The check of a server, over a new control connection."""

    url: ClientURL
    place: str  # the server, as it is shown
    settings: Settings
    terms: Terms
    report: Report
    control: ClientControl
    way: Way  # that it has taken
    already_connected: bool  # this machine is, so a client of this server may be running

    def run(self) -> None:
        """Complete the handshake, check the data port, disconnect."""
        timeout = self.settings.handshake_timeout
        try:
            with gevent.Timeout(timeout, TimeoutError(f"no handshake within {timeout:g}s; {self._hint}")):
                agreement = connect_to_server(self.control, self.terms)
        except OSError as error:
            self.control.hang_up()
            self._report_failure(error)
        else:
            self._check_agreement(agreement)

    @property
    def _hint(self) -> str:
        return hint_for(self.terms, self.way.has_proxy)

    def _report_failure(self, error: OSError) -> None:
        if isinstance(error, RefusedError) and error.reason == BUSY:
            proven = "; the key matches" if self.terms.key else ""
            self._warn(f"{error}{proven}; expected if that is this tunnel's client")
        elif isinstance(error, TimeoutError) and self.already_connected:
            words = "no response, as from a wire v1 server that has a client"
            self._warn(f"{words}; this machine is already connected to it")
        else:
            self._fail(f"handshake failed: {explain(error, self._hint)}")

    def _check_agreement(self, agreement: Agreement) -> None:
        offer = agreement.offer
        port = "the tunnel port" if offer.mux else f"port {offer.data_port}"
        proven = ", both ends authenticated with the key" if agreement.session else ""
        self._ok(f"handshake complete: wire v{offer.version}, tls {offer.tls}, data connections to {port}{proven}")
        way = self.way if offer.mux else self.way.with_port(offer.data_port)
        if offer.version == 1:
            if offer.tls == 2:
                self._check_v1_certificate(way)
            words = "a NodePass v1.0.4 server notices only at its next heartbeat that this check has left"
            self._warn(f"{words}; a client started before then waits for it")
            return
        if offer.tls == 2:
            self._ok(f"certificate verified for {self.terms.host!r}")
        self._leave()
        if not offer.mux:
            self._check_data_port(way)

    def _check_v1_certificate(self, way: Way) -> None:
        """In wire v1 only data connections show the certificate."""
        from nodepass.tls.stream import check_certificate
        from nodepass.tls.verify import Expected, Verify

        timeout = self.settings.handshake_timeout
        try:
            with (
                gevent.Timeout(timeout, TimeoutError(f"{way}: no TLS handshake within {timeout:g}s")),
                contextlib.closing(way.dial(timeout)) as sock,
            ):
                check_certificate(sock, Expected(self.terms.host, Verify.ENFORCE), v2=False)
        except VerificationError as error:
            self._fail(f"data port {way}: {error}")
        except OSError as error:
            self._fail_data(error)
        else:
            self._ok(f"data port {way}: certificate verified for {self.terms.host!r}")

    def _leave(self) -> None:
        """End the control connection, and wait until the server has noticed: then it accepts the next client."""
        self.control.finish(STOPPING, SHUTDOWN)
        for _ in self.control.signals(lambda: True):
            pass

    def _check_data_port(self, way: Way) -> None:
        """Connect, after `_leave`: without a client the server accepts no connection into its pool."""
        try:
            way.dial(self.settings.handshake_timeout).close()
        except OSError as error:
            self._fail_data(error)
        else:
            self._ok(f"data port {way}: reached")

    def _fail_data(self, error: OSError) -> None:
        self._fail(f"data port: cannot be reached, see DATA_PORT: {reason(error)}")

    def _ok(self, text: str) -> None:
        self.report.ok(self.url.name, f"server {self.place}: {text}")

    def _warn(self, text: str) -> None:
        self.report.warn(self.url.name, f"server {self.place}: {text}")

    def _fail(self, text: str) -> None:
        self.report.fail(self.url.name, f"server {self.place}: {text}")
