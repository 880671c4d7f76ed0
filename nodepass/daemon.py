"""The process: its tunnels side by side, each restarted by itself when it crashes, and what POSIX signals do.

Signals only wake the main greenlet, which acts. SIGTERM and SIGINT drain and stop; a second one exits at once.
SIGHUP looks at the certificate files. SIGUSR1 writes statistics and greenlets to the log.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import gevent
from gevent.event import Event
from gevent.queue import SimpleQueue
from gevent.util import format_run_info

from nodepass.client import Client
from nodepass.config import Settings, format_duration
from nodepass.control import Control
from nodepass.crew import Crew, Workers, report_bug
from nodepass.errors import ConfigError, ListenError, NodepassError
from nodepass.limits import raise_descriptor_limit
from nodepass.log import Log
from nodepass.proofs import Key
from nodepass.server import Server
from nodepass.stats import Stats, View, Watched
from nodepass.urls import ClientURL, ServerURL

if TYPE_CHECKING:
    from gevent import Greenlet

    from nodepass.monitor import Monitor

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Tunnel(Protocol):
    """What the process asks of a tunnel, in this order: start, run, stop_accepting, close."""

    log: Log
    stats: Stats
    sessions: Workers

    @property
    def control(self) -> Control | None:
        """The control connection to its peer, while there is one."""

    def start(self) -> None:
        """Open what must be there at start. Raises ListenError."""

    def run(self) -> None:
        """Serve until closed; raises what crashed it."""

    def stop_accepting(self) -> None:
        """Take no new sessions; running ones go on."""

    def close(self) -> None:
        """End everything at once."""

    def reload(self) -> None:
        """Look at files again."""

    def describe(self) -> str:
        """One line for an operator."""

    def view(self) -> View:
        """What the metrics show of it at this moment."""


def make_tunnel(url: ServerURL | ClientURL, settings: Settings, key: Key | None, log: Log, stats: Stats) -> Tunnel:
    """The tunnel that a URL describes. Raises ConfigError where its certificate is not usable."""
    if isinstance(url, ServerURL):
        return Server(url, settings, key, log, stats)
    return Client(url, settings, key, log, stats)


class Daemon:
    """All tunnels of the process."""

    def __init__(self, urls: Sequence[ServerURL | ClientURL], settings: Settings, key: Key | None) -> None:
        self._settings = settings
        self._key = key
        self._log = Log("nodepass")
        self._stats = Stats()  # of what belongs to no tunnel
        self._signals: SimpleQueue[int] = SimpleQueue()
        self._stopping = Event()
        self._crew = Crew(self._log, self._stats)
        self._urls = [(url, Log(name), Stats()) for url, name in zip(urls, _names(urls), strict=True)]
        self._tunnels = [make_tunnel(url, settings, key, log, stats) for url, log, stats in self._urls]
        self._supervising: list[Greenlet[..., None]] = []
        self._monitor = self._make_monitor()

    @property
    def bugs(self) -> int:
        """How often something crashed, a session, a loop or a whole tunnel; the log has each with its traceback."""
        everywhere = (self._stats, *(stats for _, _, stats in self._urls))
        return sum(stats.trouble["bugs"] + stats.trouble["crashes"] for stats in everywhere)

    def run(self) -> None:
        """Start every tunnel, serve until a signal says stop, drain. Raises ListenError where one cannot start."""
        gevent.get_hub().print_exception = self._report_stray  # type: ignore[method-assign,assignment]
        with self._monitored():
            self._run()

    def _make_monitor(self) -> Monitor | None:
        """What METRICS_LISTEN asks for. Raises ConfigError where what it needs is not installed."""
        listen = self._settings.metrics_listen
        if listen is None:
            return None
        try:
            from nodepass.monitor import Monitor
        except ImportError as error:
            raise ConfigError(f"METRICS_LISTEN: {error}; install it with: pip install prometheus-client") from None
        return Monitor(listen, self._watch, self._log, self._stats)

    @contextlib.contextmanager
    def _monitored(self) -> Iterator[None]:
        """Answer an operator's programs meanwhile, also while tunnels drain."""
        if self._monitor is None:
            yield
            return
        self._monitor.start()
        try:
            yield
        finally:
            self._monitor.close()

    def _watch(self) -> list[Watched]:
        """All tunnels as they are now."""
        watched = []
        for index, tunnel in enumerate(self._tunnels):
            view = tunnel.view()
            if self._stopping.is_set():
                view = replace(view, unready="stopping")
            dead = bool(self._supervising) and self._supervising[index].ready() and not self._stopping.is_set()
            watched.append(Watched(tunnel.log.where, tunnel.stats, view, not dead))
        return watched

    def _run(self) -> None:
        raise_descriptor_limit(len(self._tunnels), self._settings, self._log)
        for number in (*STOPPING, signal.SIGHUP, signal.SIGUSR1):
            gevent.signal_handler(number, self._signals.put, number)
        started: list[Tunnel] = []
        try:
            for tunnel in self._tunnels:
                tunnel.start()
                started.append(tunnel)
        except ListenError:
            for tunnel in started:
                tunnel.close()
            raise
        for index in range(len(self._tunnels)):
            self._supervising.append(self._crew.spawn("supervise", self._supervise, index))
        self._wait_for_stop()
        stop, second = self._crew.spawn("stop", self._stop), self._crew.spawn("hear signals", self._wait_for_stop)
        gevent.wait([stop, second], count=1)
        if not stop.ready():
            self._log.warning("a second signal: exiting at once, %d sessions cut", self._running())

    def _wait_for_stop(self) -> None:
        """Act on signals until one says stop."""
        while (number := self._signals.get()) not in STOPPING:
            if number == signal.SIGHUP:
                self._log.info("SIGHUP: looking at the certificate files")
                for tunnel in self._tunnels:
                    self._crew.spawn("reload", tunnel.reload)
            else:
                self._crew.spawn("dump", self._dump)

    def _supervise(self, index: int) -> None:
        """Run one tunnel; after a crash make it anew, so that the others in the process never notice."""
        while not self._stopping.is_set():
            tunnel = self._tunnels[index]
            try:
                tunnel.run()
                return
            except Exception:
                tunnel.stats.trouble["crashes"] += 1
                pause = format_duration(self._settings.service_cooldown)
                tunnel.log.exception("this tunnel crashed, which is a bug; it starts again in %s", pause)
            self._crew.spawn("close", tunnel.close).join()
            self._restart(index)

    def _restart(self, index: int) -> None:
        url, log, stats = self._urls[index]
        while not self._stopping.wait(self._settings.service_cooldown):
            try:
                tunnel = make_tunnel(url, self._settings, self._key, log, stats)
                tunnel.start()
            except NodepassError as error:
                log.error("cannot start again: %s", error)
            except Exception as error:  # noqa: BLE001  # the next attempt may do better
                report_bug("starting again", error, log, stats)
            else:
                self._tunnels[index] = tunnel
                return

    def _stop(self) -> None:
        """Drain every tunnel within SHUTDOWN_TIMEOUT, then cut what is left."""
        self._stopping.set()
        deadline = time.monotonic() + self._settings.shutdown_timeout
        grace = format_duration(self._settings.shutdown_timeout)
        self._log.info("stopping: %d sessions running, they have %s to finish", self._running(), grace)
        gevent.joinall([self._crew.spawn("stop accepting", tunnel.stop_accepting) for tunnel in self._tunnels])
        for tunnel in self._tunnels:
            tunnel.sessions.join(max(0.0, deadline - time.monotonic()))
        cut = sum(tunnel.sessions.kill() for tunnel in self._tunnels)
        if cut:
            self._log.warning("cut %d sessions that had not finished within %s", cut, grace)
        gevent.joinall([self._crew.spawn("close", tunnel.close) for tunnel in self._tunnels])
        self._log.info("stopped")

    def _running(self) -> int:
        return sum(len(tunnel.sessions) for tunnel in self._tunnels)

    def _dump(self) -> None:
        """What an operator asks for with SIGUSR1."""
        for tunnel in self._tunnels:
            tunnel.log.always("%s", tunnel.describe())
        self._log.always("%s", f"bugs {self.bugs}, see their tracebacks" if self.bugs else "no bugs")
        for line in cast(Callable[[], list[str]], format_run_info)():  # gevent's stubs say that it returns nothing
            self._log.always("%s", line)

    def _report_stray(self, context: object, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """What gevent would print of an exception that nobody has caught: a callback's of the loop, say."""
        report_bug(f"{context!r:.200}", (error or kind()).with_traceback(trace), self._log, self._stats)


def _names(urls: Sequence[ServerURL | ClientURL]) -> list[str]:
    """The log's names of the tunnels: `server:10101`, numbered where two would be the same."""
    names: list[str] = []
    for url in urls:
        same = sum(name.partition("#")[0] == url.name for name in names)
        names.append(f"{url.name}#{same + 1}" if same else url.name)
    return names
