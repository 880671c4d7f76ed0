"""What `nodepass --check` finds out about a client: its target, its server, their handshake, the data port.

Nobody may be hurt by it. While this machine has a connection to the server, which is a running client's, the key is not
proven: who proves it takes the client's place. And no data connection is made ready, for the server would give it to a
visitor: one goes as far as the server's certificate, or is made when the server takes it no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

import gevent

from nodepass.config import Settings
from nodepass.errors import RefusedError, VerificationError, reason
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, as_blocking, dial, resolve
from nodepass.net.stream import TCPStream
from nodepass.stats import Stats
from nodepass.tools.check_ports import is_connected
from nodepass.tools.report import Report
from nodepass.tunnel.control import Agreement, ClientControl
from nodepass.tunnel.handshake import connect_to_server
from nodepass.urls import ClientURL
from nodepass.wire.auth import Key
from nodepass.wire.signals import BUSY, DATA_PREFIX, KEY_REQUIRED, Offer

FAREWELL = 1.0  # seconds for the server to notice that we have left
_LOCAL = ("", "localhost", "127.0.0.1", "::1")


def check_client(
    url: ClientURL, settings: Settings, key: Key | None, report: Report, own_ports: Collection[int]
) -> None:
    """Check one client URL. `own_ports`: tunnel ports of the servers in the same command."""
    _check_target(url, settings, report)
    if url.tunnel.port in own_ports and url.tunnel.host in _LOCAL:
        report.ok(url.name, f"server {url.tunnel}: another URL of this command, not running now: not tried")
        return
    try:
        endpoints = resolve(url.tunnel)
        is_live = is_connected(endpoints)
        sock = as_blocking(dial(endpoints, settings.handshake_timeout))
    except OSError as error:
        report.fail(url.name, f"server {url.tunnel}: cannot be reached: {reason(error)}")
        return
    with contextlib.closing(sock):
        control = ClientControl(sock, settings.report_interval, Log(url.name), Stats())
        report.ok(url.name, f"server {url.tunnel}: reached at {control.endpoint}")
        _Visit(url, settings, key, report, control).pay(is_live)


def _check_target(url: ClientURL, settings: Settings, report: Report) -> None:
    try:
        dial(resolve(url.target), settings.handshake_timeout).close()
    except OSError as error:
        words = f"target {url.target}: cannot be reached by TCP now: {reason(error)}"
        report.warn(url.name, f"{words}; the tunnel tries again for each visitor")
    else:
        report.ok(url.name, f"target {url.target}: reached")


@dataclass(frozen=True)
class _Visit:
    """One visit to a server, over a control connection that has just been made."""

    url: ClientURL
    settings: Settings
    key: Key | None
    report: Report
    control: ClientControl

    def pay(self, is_live: bool) -> None:
        """Come to an agreement with the server, as far as that hurts nobody, and leave."""
        timeout = self.settings.handshake_timeout
        try:
            with gevent.Timeout(timeout, TimeoutError(f"no handshake within {timeout:g}s")):
                agreement = connect_to_server(self.control, None if is_live else self.key)
        except RefusedError as error:
            self._tell_refusal(error, is_live)
        except TimeoutError as error:
            if is_live:
                self._warn(
                    "silent, as a wire v1 server is that has its client; this machine is connected to it already"
                )
            else:
                self._fail(f"no agreement: {error}")
        except OSError as error:
            self._fail(f"no agreement: {reason(error)}")
        else:
            self._tell_agreement(agreement, is_live)

    def _tell_refusal(self, error: RefusedError, is_live: bool) -> None:
        if error.reason == BUSY:
            self._warn(f"{error}; that is as it should be if it is this tunnel's own")
        elif is_live and self.key and error.reason == KEY_REQUIRED:
            self._warn(
                "it asks for the key; not proven to it, for this machine is connected to it already, and who proves the"
                " key takes the running client's place"
            )
        else:
            self._fail(f"no agreement: {error}")

    def _tell_agreement(self, agreement: Agreement, is_live: bool) -> None:
        tunnel = agreement.offer
        if is_live and self.key:
            self._fail("no agreement: the server has no key; this client requires one: give both the same")
            return
        proven = ", both ends have proven the key" if agreement.session else ""
        port = "the tunnel port" if tunnel.mux else f"port {tunnel.data_port}"
        self._ok(f"agreed: wire v{tunnel.version}, tls {tunnel.tls}, data connections to {port}{proven}")
        reached = self.control.endpoint
        endpoint = reached if tunnel.mux else reached.with_port(tunnel.data_port)
        if tunnel.tls == 2 or tunnel.fingerprint:
            self._look_at_certificate(endpoint, tunnel, vouched_for=bool(agreement.session))
        if tunnel.version == 1:
            words = "a NodePass v1.0.4 notices only at its next heartbeat that this check has left"
            self._warn(f"{words}; a client started before then waits for that")
            return
        self._leave()
        if not tunnel.tls and not tunnel.mux:
            self._try_data_port(endpoint)

    def _leave(self) -> None:
        """End the control connection, and wait until the server has noticed: the next client finds a free place."""
        self.control.finish()
        self.control.sock.settimeout(None)  # however brief its heartbeats
        with contextlib.suppress(TimeoutError), gevent.Timeout(FAREWELL, TimeoutError()):
            for _ in self.control.launches():
                pass

    def _try_data_port(self, endpoint: Endpoint) -> None:
        """Connect, after we have left: the server takes nobody's connection into its pool then."""
        try:
            dial([endpoint], self.settings.handshake_timeout).close()
        except OSError as error:
            self._fail_data(error)
        else:
            self._ok(f"data port {endpoint}: reached")

    def _look_at_certificate(self, endpoint: Endpoint, tunnel: Offer, vouched_for: bool) -> None:
        from nodepass.tls.stream import check_certificate, client_context
        from nodepass.tls.verify import Expected

        timeout = self.settings.handshake_timeout
        host = self.url.tunnel.host or "localhost"
        expected = Expected(host, tunnel.tls == 2, tunnel.fingerprint)
        try:
            with gevent.Timeout(timeout, TimeoutError(f"{endpoint}: no TLS handshake within {timeout:g}s")):
                sock = dial([endpoint], timeout)
                try:
                    if tunnel.mux:
                        TCPStream(sock).write(DATA_PREFIX)
                    check_certificate(sock, client_context(expected.verify), expected)
                finally:
                    sock.close()
        except VerificationError as error:
            self._fail(f"data port {endpoint}: {error}")
            return
        except OSError as error:
            self._fail_data(error)
            return
        if tunnel.tls == 2:
            self._ok(f"data port {endpoint}: certificate verified for {host!r}")
        elif vouched_for:
            self._ok(f"data port {endpoint}: certificate is the one that the server has vouched for with the key")
        else:
            self._ok(f"data port {endpoint}: certificate is the announced one; without a key nobody vouches for it")

    def _fail_data(self, error: OSError) -> None:
        self._fail(f"data port: cannot be reached, see DATA_PORT: {reason(error)}")

    def _ok(self, text: str) -> None:
        self.report.ok(self.url.name, f"server {self.url.tunnel}: {text}")

    def _warn(self, text: str) -> None:
        self.report.warn(self.url.name, f"server {self.url.tunnel}: {text}")

    def _fail(self, text: str) -> None:
        self.report.fail(self.url.name, f"server {self.url.tunnel}: {text}")
