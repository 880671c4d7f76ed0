"""What an operator's programs ask of the process over HTTP: `/metrics`, `/healthz`, `/readyz`.

Owns the address of METRICS_LISTEN. Reads what `daemon` shows it and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http import HTTPStatus

from nodepass.config import Listen
from nodepass.log import Log
from nodepass.metrics.exposition import CONTENT_TYPE, Exposition
from nodepass.metrics.http import Answer, HTTPServer
from nodepass.net.listen import listen_tcp
from nodepass.net.sockets import format_sockaddr
from nodepass.net.unix import UnixListener
from nodepass.stats import Stats
from nodepass.tunnel.interface import Watched
from nodepass.urls import Address

WHAT = "METRICS_LISTEN"
LOOPBACK = "localhost"  # where no host is named: what this tells is nobody else's business


class MetricsEndpoint:
    """The endpoint, from `start` to `close`; `watch` shows all tunnels as they are now."""

    def __init__(self, listen: Listen, watch: Callable[[], Sequence[Watched]], log: Log, stats: Stats) -> None:
        self._listen = listen
        self._watch = watch
        self._log, self._stats = log, stats
        self._exposition = Exposition(watch)
        self._unix: UnixListener | None = None
        self._server: HTTPServer | None = None

    def start(self) -> None:
        """Listen, and answer from now on. Raises ListenError."""
        if self._listen.path:
            self._unix = UnixListener(self._listen.path, WHAT)
            listeners, where = [self._unix.sock], f"unix:{self._listen.path}"
        else:
            listeners = listen_tcp(Address(self._listen.host or LOOPBACK, self._listen.port), WHAT)
            where = " and ".join(f"http://{format_sockaddr(each.getsockname())}/metrics" for each in listeners)
        self._server = HTTPServer(listeners, self._answer, self._log, self._stats)
        self._server.start()
        self._log.info("metrics.listening", "metrics: %(address)s", address=where)

    def close(self) -> None:
        """End it, and remove its socket's file."""
        if self._unix:
            self._unix.close()
        if self._server:
            self._server.close()

    def _answer(self, path: str) -> Answer:
        routes = {"/metrics": self._metrics, "/healthz": self._health, "/readyz": self._notifier}
        if path not in routes:
            return Answer.of(HTTPStatus.NOT_FOUND, f"here are: {', '.join(routes)}")
        try:
            return routes[path]()
        except Exception as error:  # noqa: BLE001  # a bug; the answer is known only to have none
            self._log.error("metrics.bug", "no answer to %(path)s, which is a bug", crash=error, path=path)
            return Answer.of(HTTPStatus.INTERNAL_SERVER_ERROR, "see the log")

    def _metrics(self) -> Answer:
        return Answer(HTTPStatus.OK, self._exposition.text(), CONTENT_TYPE)

    def _health(self) -> Answer:
        """The event loop runs, or there were no answer; so do all who start tunnels again."""
        lines = [f"{each.name}: nobody would start it again" for each in self._watch() if not each.alive]
        return _verdict(lines, lines)

    def _notifier(self) -> Answer:
        watched = self._watch()
        lines = [f"{each.name}: {each.view.unready or 'ready'}" for each in watched]
        return _verdict(lines, [each.name for each in watched if each.view.unready])


def _verdict(lines: Sequence[str], bad: Sequence[str]) -> Answer:
    return Answer.of(HTTPStatus.SERVICE_UNAVAILABLE if bad else HTTPStatus.OK, "\n".join(lines) or "ok")
