"""The metrics endpoint: `/metrics`, `/healthz` and `/readyz` over HTTP, on the address of METRICS_LISTEN.

Owns that address and the file of its Unix socket. It reads the tunnels' state through `watch` and changes nothing. The
daemon starts it first and closes it last, so that it answers while tunnels drain.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from ipaddress import ip_address

from nodepass.config.kinds import Listen
from nodepass.config.urls import Address
from nodepass.log import Limit, Log
from nodepass.metrics.exposition import CONTENT_TYPE, Exposition
from nodepass.metrics.http import Answer, HTTPServer, Request
from nodepass.net.activation import NOTHING, PassedSocket, Share
from nodepass.net.listen import listen_tcp
from nodepass.net.sockets import format_sockaddr
from nodepass.net.unix import UnixListener
from nodepass.stats import Stats
from nodepass.tunnel.interface import METRICS, Watched

WHAT = "METRICS_LISTEN"
LOOPBACK = "localhost"  # where no host is given: the metrics are for this machine unless configured otherwise


class MetricsEndpoint:
    """The endpoint: `start`, `answer`, `close`. `watch` returns the present state of all tunnels."""

    def __init__(
        self,
        listen: Listen,
        watch: Callable[[], Sequence[Watched]],
        log: Log,
        stats: Stats,
        share: Share = NOTHING,
    ) -> None:
        """`share`: the sockets that were passed to the process."""
        self._share = share.of(METRICS)
        self._listeners: list[socket.socket] = []
        self._listen = listen
        self._watch = watch
        self._log, self._stats = log, stats
        self._exposition = Exposition(watch, stats)
        self._unix: UnixListener | None = None
        self._server: HTTPServer | None = None

    def start(self) -> None:
        """Listen; requests wait. Raises ListenError."""
        if self._listen.path:
            path = self._listen.path
            self._unix = UnixListener(path, WHAT, passed=self._share.take_unix(path))
            self._listeners = [self._unix.sock]
        else:
            self._listeners = listen_tcp(Address(self._listen.host or LOOPBACK, self._listen.port), WHAT, self._share)
        self._server = HTTPServer(self._listeners, self._answer, self._log, self._stats)

    def answer(self) -> None:
        """Answer requests from now on: this process is the one that serves the tunnels."""
        assert self._server, "it has started"
        self._server.start()
        names = [format_sockaddr(each.getsockname()) for each in self._listeners if not self._listen.path]
        where = " and ".join(f"http://{name}/metrics" for name in names) or f"unix:{self._listen.path}"
        self._log.info("metrics.listening", "metrics listening: %(address)s", address=where)

    @property
    def listeners(self) -> list[PassedSocket]:
        """What another process needs to answer at the same address."""
        return [PassedSocket(METRICS, each) for each in self._listeners]

    def hand_over(self) -> None:
        """Close every connection: another process answers from now on."""
        if self._unix:
            self._unix.hand_over()
        self.close()

    def stop(self, timeout: float) -> None:
        """Go on until `close`: what restarts or watches the process may ask while it drains."""

    def close(self) -> None:
        """Close every connection, and remove the socket's file."""
        if self._unix:
            self._unix.close()
        if self._server:
            self._server.close()

    def _answer(self, request: Request) -> Answer:
        path, routes = request.path, {"/metrics": self._metrics, "/healthz": self._health, "/readyz": self._readiness}
        if path not in routes:
            return Answer.of(HTTPStatus.NOT_FOUND, f"available: {', '.join(routes)}")
        if path == "/metrics" and not self._is_own(request.host):
            text = f"Host {request.host!r} is refused; allowed: an address, localhost, or the name in METRICS_LISTEN"
            return Answer.of(HTTPStatus.MISDIRECTED_REQUEST, text)
        try:
            return routes[path]()
        except Exception as error:  # noqa: BLE001  # a bug: answered with a 500, and the endpoint goes on
            self._log.error("metrics.bug", "request for %(path)s crashed (bug)", Limit(), error, path=path)
            return Answer.of(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error, see the log")

    def _is_own(self, host: str) -> bool:
        """Whether a Host is no other site's name: by one that points here, a web page could read what is for us.

        (DNS rebinding: the browser of a machine that reaches the endpoint believes it to be that page's own server.)
        """
        if self._listen.path or host in ("", LOOPBACK, self._listen.host.lower().removesuffix(".")):
            return True
        try:
            ip_address(host.partition("%")[0])
        except ValueError:
            return False
        return True

    def _metrics(self) -> Answer:
        return Answer(HTTPStatus.OK, self._exposition.text(), CONTENT_TYPE)

    def _health(self) -> Answer:
        """Alive: this answer shows that the event loop runs; the supervisor of each tunnel must run, too."""
        lines = [f"{each.name}: its supervisor has ended" for each in self._watch() if not each.alive]
        return _verdict(lines, healthy=not lines)

    def _readiness(self) -> Answer:
        """Ready: every tunnel could serve a session now."""
        watched = self._watch()
        lines = [f"{each.name}: {each.view.unready or 'ready'}" for each in watched]
        return _verdict(lines, healthy=not any(each.view.unready for each in watched))


def _verdict(lines: Sequence[str], healthy: bool) -> Answer:
    status = HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer.of(status, "\n".join(lines) or "ok")
