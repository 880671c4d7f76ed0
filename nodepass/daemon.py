"""The process: its tunnels side by side, each restarted by itself when it crashes, and what POSIX signals do.

Signals only wake the main greenlet, which acts. SIGTERM and SIGINT drain and stop; a second one exits at once.
SIGHUP looks at the certificate files. SIGUSR1 writes statistics and greenlets to the log.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import gevent
from gevent.event import Event
from gevent.queue import SimpleQueue
from gevent.util import format_run_info

from nodepass.client import Client
from nodepass.config import Settings, format_duration
from nodepass.control import Control
from nodepass.crew import Crew, Workers
from nodepass.errors import NodepassError, StartError
from nodepass.inherited import Inherited, Share
from nodepass.limits import raise_descriptor_limit
from nodepass.log import Log
from nodepass.proofs import Key
from nodepass.readiness import Readiness, Watched
from nodepass.server import Server
from nodepass.stats import Stats
from nodepass.systemd import ServiceManager
from nodepass.urls import ClientURL, ServerURL

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Tunnel(Watched, Protocol):
    """What the process asks of a tunnel, in this order: start, run, stop_accepting, close."""

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


def make_tunnel(url: ServerURL | ClientURL, settings: Settings, key: Key | None, log: Log, share: Share) -> Tunnel:
    """The tunnel that a URL describes. Raises ConfigError where its certificate is not usable."""
    if isinstance(url, ServerURL):
        return Server(url, settings, key, log, share)
    return Client(url, settings, key, log)


class Daemon:
    """All tunnels of the process."""

    def __init__(
        self, urls: Sequence[ServerURL | ClientURL], settings: Settings, key: Key | None, manager: ServiceManager
    ) -> None:
        self._settings = settings
        self._key = key
        self._log = Log("nodepass")
        self._signals: SimpleQueue[int] = SimpleQueue()
        self._stopping = Event()
        self._supervisors = Crew(self._log)
        self._inherited = Inherited(manager.sockets)
        self._urls = [(url, Log(name), self._inherited.share()) for url, name in zip(urls, _names(urls), strict=True)]
        self._tunnels = [make_tunnel(url, settings, key, log, share) for url, log, share in self._urls]
        self._readiness = Readiness(manager, self._tunnels, settings, self._log)
        self._failure: StartError | None = None

    def run(self) -> None:
        """Start every tunnel, serve until a signal says stop, drain.

        Raises ListenError or StartError where one cannot start, ConfigError where systemd passed what no URL uses.
        """
        raise_descriptor_limit(len(self._tunnels), self._settings, self._log)
        for number in (*STOPPING, signal.SIGHUP, signal.SIGUSR1):
            gevent.signal_handler(number, self._signals.put, number)
        started: list[Tunnel] = []
        try:
            for tunnel in self._tunnels:
                tunnel.start()
                started.append(tunnel)
            self._inherited.refuse_unused()
        except NodepassError:
            for tunnel in started:
                tunnel.close()
            raise
        for index in range(len(self._tunnels)):
            self._supervisors.spawn("supervise", self._supervise, index)
        self._supervisors.spawn("notify", self._notify)
        self._wait_for_stop()
        self._readiness.begin_stop()
        stop, second = gevent.spawn(self._stop), gevent.spawn(self._wait_for_stop)
        gevent.wait([stop, second], count=1)
        if not stop.ready():
            self._log.warning("a second signal: exiting at once, %d sessions cut", self._running())
        if self._failure:
            raise self._failure

    def _notify(self) -> None:
        """Keep the service manager informed; what does not start in time ends the process."""
        try:
            self._readiness.run()
        except StartError as error:
            self._failure = error
            self._signals.put(signal.SIGTERM)

    def _wait_for_stop(self) -> None:
        """Act on signals until one says stop."""
        while (number := self._signals.get()) not in STOPPING:
            if number == signal.SIGHUP:
                self._log.info("SIGHUP: looking at the certificate files")
                self._readiness.begin_reload()
                for tunnel in self._tunnels:
                    tunnel.reload()
                self._readiness.end_reload()
            else:
                self._dump()

    def _supervise(self, index: int) -> None:
        """Run one tunnel; after a crash make it anew, so that the others in the process never notice."""
        while not self._stopping.is_set():
            tunnel = self._tunnels[index]
            try:
                tunnel.run()
                return
            except Exception:
                tunnel.log.exception("this tunnel crashed, which is a bug; it starts again")
            tunnel.close()
            self._restart(index)

    def _restart(self, index: int) -> None:
        url, log, share = self._urls[index]
        while not self._stopping.wait(self._settings.service_cooldown):
            try:
                tunnel = make_tunnel(url, self._settings, self._key, log, share)
                tunnel.start()
            except NodepassError as error:
                log.error("cannot start again: %s", error)
            else:
                self._tunnels[index] = tunnel
                return

    def _stop(self) -> None:
        """Drain every tunnel within SHUTDOWN_TIMEOUT, then cut what is left."""
        self._stopping.set()
        deadline = time.monotonic() + self._settings.shutdown_timeout
        grace = format_duration(self._settings.shutdown_timeout)
        self._log.info("stopping: %d sessions running, they have %s to finish", self._running(), grace)
        gevent.joinall([gevent.spawn(tunnel.stop_accepting) for tunnel in self._tunnels])
        for tunnel in self._tunnels:
            tunnel.sessions.join(max(0.0, deadline - time.monotonic()))
        cut = sum(tunnel.sessions.kill() for tunnel in self._tunnels)
        if cut:
            self._log.warning("cut %d sessions that had not finished within %s", cut, grace)
        for tunnel in self._tunnels:
            tunnel.close()
        self._log.info("stopped")

    def _running(self) -> int:
        return sum(len(tunnel.sessions) for tunnel in self._tunnels)

    def _dump(self) -> None:
        """What an operator asks for with SIGUSR1."""
        for tunnel in self._tunnels:
            tunnel.log.always("%s", tunnel.describe())
        for line in cast(Callable[[], list[str]], format_run_info)():  # gevent's stubs say that it returns nothing
            self._log.always("%s", line)


def _names(urls: Sequence[ServerURL | ClientURL]) -> list[str]:
    """The log's names of the tunnels: `server:10101`, numbered where two would be the same."""
    names: list[str] = []
    for url in urls:
        same = sum(name.partition("#")[0] == url.name for name in names)
        names.append(f"{url.name}#{same + 1}" if same else url.name)
    return names
