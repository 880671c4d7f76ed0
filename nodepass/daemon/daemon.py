"""The process: its tunnels side by side, each restarted by itself when it crashes, and what POSIX signals do.

Signals only wake the main greenlet, which acts. SIGTERM and SIGINT drain and stop; a second one exits at once.
SIGHUP looks at the certificate files. SIGUSR1 writes statistics and greenlets to the log.
"""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import gevent
from gevent.event import Event
from gevent.queue import SimpleQueue
from gevent.util import format_run_info

from nodepass.client.client import Client
from nodepass.config import Settings, format_duration
from nodepass.daemon.limits import survey
from nodepass.daemon.notifier import Notifier
from nodepass.daemon.systemd import ServiceManager
from nodepass.errors import ConfigError, NodepassError, StartError
from nodepass.log import Log, literal
from nodepass.net.activation import Inherited, Share
from nodepass.server.server import Server
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, report_bug
from nodepass.tunnel.interface import LISTENER_ROLES, Tunnel, Watched, report_fields
from nodepass.urls import ClientURL, ServerURL, may_need_tls
from nodepass.wire.auth import Key

if TYPE_CHECKING:
    from gevent import Greenlet

    from nodepass.metrics.endpoint import MetricsEndpoint

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """All tunnels of the process."""

    def __init__(
        self, urls: Sequence[ServerURL | ClientURL], settings: Settings, key: Key | None, manager: ServiceManager
    ) -> None:
        self._log = Log("nodepass")
        self._limits = survey(settings, len(urls), may_need_tls(urls))
        self._settings = settings = self._limits.settings
        self._stats = Stats()  # of what belongs to no tunnel
        self._signals: SimpleQueue[int] = SimpleQueue()
        self._stopping = Event()
        self._tasks = TaskGroup(self._log, self._stats)
        self._inherited = Inherited(manager.sockets, LISTENER_ROLES)
        self._plans = [
            (url, settings, key, Log(name), Stats(), self._inherited.share())
            for url, name in zip(urls, name_tunnels(urls), strict=True)
        ]
        self._tunnels = [make_tunnel(*plan) for plan in self._plans]
        self._notifier = Notifier(manager, self._tunnels, settings, self._log)
        self._failure: StartError | None = None
        self._supervising: list[Greenlet[..., None]] = []
        self._endpoint = self._make_endpoint()

    @property
    def bugs(self) -> int:
        """How often something crashed, a session, a loop or a whole tunnel; the log has each with its traceback."""
        everywhere = (self._stats, *(tunnel.stats for tunnel in self._tunnels))
        return sum(stats.trouble["bugs"] + stats.trouble["crashes"] for stats in everywhere)

    def run(self) -> None:
        """Start every tunnel, serve until a signal says stop, drain.

        Raises ListenError or StartError where one cannot start, ConfigError where systemd passed what no URL uses.
        """
        gevent.get_hub().print_exception = self._report_stray  # type: ignore[method-assign,assignment]
        with self._with_endpoint():
            self._run()

    def _make_endpoint(self) -> MetricsEndpoint | None:
        """What METRICS_LISTEN asks for. Raises ConfigError where what it needs is not installed."""
        listen = self._settings.metrics_listen
        if listen is None:
            return None
        try:
            from nodepass.metrics.endpoint import MetricsEndpoint
        except ImportError as error:
            raise ConfigError(f"METRICS_LISTEN: {error}; install it with: pip install prometheus-client") from None
        return MetricsEndpoint(listen, self._watch, self._log, self._stats)

    @contextlib.contextmanager
    def _with_endpoint(self) -> Iterator[None]:
        """Answer an operator's programs meanwhile, also while tunnels drain."""
        if self._endpoint is None:
            yield
            return
        self._endpoint.start()
        try:
            yield
        finally:
            self._endpoint.close()

    def _watch(self) -> list[Watched]:
        """All tunnels as they are now."""
        watched = []
        for index, tunnel in enumerate(self._tunnels):
            view = tunnel.view()
            if self._stopping.is_set():
                view = replace(view, unready="stopping")
            dead = bool(self._supervising) and self._supervising[index].ready() and not self._stopping.is_set()
            watched.append(Watched(tunnel.log.tunnel, tunnel.stats, view, not dead))
        return watched

    def _run(self) -> None:
        self._log.info(
            "process.limits",
            literal(self._limits.line),
            files=self._limits.files,
            sessions=self._limits.sessions,
            memory=self._limits.memory.size if self._limits.memory else None,
            memory_of=self._limits.memory.what if self._limits.memory else None,
            memory_sessions=self._limits.memory_sessions,
        )
        for warning in self._limits.warnings:
            self._log.warning(
                "process.limits_exceeded",
                literal(warning.words),
                reason=warning.reason,
                needed=warning.needed,
                available=warning.available,
                semaphore_limit=warning.semaphore_limit,
            )
        for number in (*STOPPING, signal.SIGHUP, signal.SIGUSR1):
            gevent.signal_handler(number, self._signals.put, number)
        started: list[Tunnel] = []
        try:
            for tunnel in self._tunnels:
                tunnel.start()
                started.append(tunnel)
            self._refuse_unused_sockets()
        except NodepassError:
            for tunnel in started:
                tunnel.close()
            raise
        for index in range(len(self._tunnels)):
            self._supervising.append(self._tasks.spawn("supervise", self._supervise, index))
        self._tasks.spawn("notify", self._notify)
        self._wait_for_stop()
        self._notifier.begin_stop()
        stop, second = self._tasks.spawn("stop", self._stop), self._tasks.spawn("hear signals", self._wait_for_stop)
        gevent.wait([stop, second], count=1)
        if not stop.ready():
            self._log.warning(
                "process.exiting",
                "a second signal: exiting at once, %(sessions)d sessions cut",
                sessions=self._running(),
            )
        if self._failure:
            raise self._failure

    def _refuse_unused_sockets(self) -> None:
        """Raise ConfigError where systemd passed a socket that fits no URL: connections to it would wait forever."""
        if unused := self._inherited.unused():
            allowed = "the tunnel, data and target addresses of the server URLs"
            raise ConfigError(f"systemd passed {unused}, which fits no URL; allowed: {allowed}")

    def _notify(self) -> None:
        """Keep the service manager informed; what does not start in time ends the process."""
        try:
            self._notifier.run()
        except StartError as error:
            self._failure = error
            self._signals.put(signal.SIGTERM)

    def _wait_for_stop(self) -> None:
        """Act on signals until one says stop."""
        while (number := self._signals.get()) not in STOPPING:
            if number == signal.SIGHUP:
                self._tasks.spawn("reload", self._reload)
            else:
                self._tasks.spawn("dump", self._dump)

    def _reload(self) -> None:
        self._log.info("process.reloading", "SIGHUP: looking at the certificate files")
        self._notifier.begin_reload()
        gevent.joinall([self._tasks.spawn("reload", tunnel.reload) for tunnel in self._tunnels])
        self._notifier.end_reload()

    def _supervise(self, index: int) -> None:
        """Run one tunnel; after a crash make it anew, so that the others in the process never notice."""
        while not self._stopping.is_set():
            tunnel = self._tunnels[index]
            try:
                tunnel.run()
                return
            except Exception as error:  # noqa: BLE001  # a bug, which ends this tunnel only
                tunnel.stats.trouble["crashes"] += 1
                pause = format_duration(self._settings.service_cooldown)
                words = "this tunnel crashed, which is a bug; it starts again in %(pause)s"
                tunnel.log.error("tunnel.crashed", words, crash=error, pause=pause)
            self._tasks.spawn("close", tunnel.close).join()
            self._restart(index)

    def _restart(self, index: int) -> None:
        log, stats = self._tunnels[index].log, self._tunnels[index].stats
        while not self._stopping.wait(self._settings.service_cooldown):
            try:
                tunnel = make_tunnel(*self._plans[index])
                tunnel.start()
            except NodepassError as error:
                log.error("tunnel.restart_failed", "cannot start again: %(error)s", error=error)
            except Exception as error:  # noqa: BLE001  # the next attempt may do better
                report_bug("starting again", error, log, stats)
            else:
                self._tunnels[index] = tunnel
                return

    def _stop(self) -> None:
        """Drain every tunnel within SHUTDOWN_TIMEOUT, then cut what is left."""
        self._stopping.set()
        timeout = self._settings.shutdown_timeout
        grace = format_duration(timeout)
        words = "stopping: %(sessions)d sessions running, they have %(grace)s to finish"
        self._log.info("process.stopping", words, sessions=self._running(), grace=grace)
        cut: Counter[str] = Counter()

        def stop(tunnel: Tunnel) -> None:
            cut[tunnel.log.tunnel] = tunnel.stop(timeout)

        gevent.joinall([self._tasks.spawn("stop", stop, tunnel) for tunnel in self._tunnels])
        if cut.total():
            words = "cut %(sessions)d sessions that had not finished within %(grace)s"
            self._log.warning("process.cut", words, sessions=cut.total(), grace=grace)
        gevent.joinall([self._tasks.spawn("close", tunnel.close) for tunnel in self._tunnels])
        self._log.info("process.stopped", "stopped")

    def _running(self) -> int:
        return sum(len(tunnel.sessions) for tunnel in self._tunnels)

    def _dump(self) -> None:
        """What an operator asks for with SIGUSR1."""
        for tunnel in self._tunnels:
            tunnel.log.always("tunnel.report", literal(tunnel.describe()), **report_fields(tunnel.view(), tunnel.stats))
        bugs = f"bugs {self.bugs}, see their tracebacks" if self.bugs else "no bugs"
        self._log.always("process.bugs", bugs, bugs=self.bugs)
        for line in cast(Callable[[], list[str]], format_run_info)():  # gevent's stubs say that it returns nothing
            self._log.always("process.greenlets", "%(line)s", line=line)

    def _report_stray(self, context: object, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """What gevent would print of an exception that nobody has caught: a callback's of the loop, say."""
        report_bug(f"{context!r:.200}", (error or kind()).with_traceback(trace), self._log, self._stats)


def make_tunnel(
    url: ServerURL | ClientURL, settings: Settings, key: Key | None, log: Log, stats: Stats, share: Share
) -> Tunnel:
    """The tunnel that a URL describes. Raises ConfigError where its certificate is not usable."""
    if isinstance(url, ServerURL):
        return Server(url, settings, key, log, stats, share)
    return Client(url, settings, key, log, stats)


def name_tunnels(urls: Sequence[ServerURL | ClientURL]) -> list[str]:
    """The log's names of the tunnels: `server:10101`, numbered where two would be the same."""
    names: list[str] = []
    for url in urls:
        same = sum(name.partition("#")[0] == url.name for name in names)
        names.append(f"{url.name}#{same + 1}" if same else url.name)
    return names
