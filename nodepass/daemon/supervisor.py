"""A tunnel and its restarts: after a crash it is made again, and the other tunnels of the process do not notice.

Owns the present `Tunnel` and replaces it; its log and its counters outlive it. What kind of tunnel it is, `make` knows.
`daemon` starts, runs, stops and closes it; the metrics read `watched`, and `notifier` its health.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gevent.event import Event

from nodepass.config.kinds import format_duration
from nodepass.errors import NodepassError
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, report_bug
from nodepass.tunnel.interface import Tunnel, Watched


class Supervisor:
    """One tunnel: `start`, `begin`, `stop`, `close`, as `tunnel.interface.Tunnel` has them."""

    def __init__(self, make: Callable[[], Tunnel], cooldown: float, tasks: TaskGroup) -> None:
        self.tunnel = make()
        self.cut = 0  # sessions that `stop` has cut
        self._make = make
        self._cooldown = cooldown  # seconds between a crash and the restart
        self._tasks = tasks
        self._stopping = Event()
        self._has_begun = self._ended = False

    @property
    def log(self) -> Log:
        """The tunnel's."""
        return self.tunnel.log

    @property
    def stats(self) -> Stats:
        """The tunnel's."""
        return self.tunnel.stats

    @property
    def ready(self) -> Event:
        """Set once the present tunnel can serve."""
        return self.tunnel.ready

    def status(self) -> str:
        """The tunnel's state, for an operator."""
        return self.tunnel.status()

    def unhealthy_reason(self) -> str:
        """Why a restart of the process is needed, or ""."""
        return self.tunnel.unhealthy_reason()

    def watched(self) -> Watched:
        """The tunnel's present state, for the metrics."""
        view, is_stopping = self.tunnel.view(), self._stopping.is_set()
        if is_stopping:
            view = replace(view, unready="stopping")
        return Watched(self.log.tunnel, self.stats, view, alive=is_stopping or not self._ended)

    def start(self) -> None:
        """Open the tunnel's listeners. Raises ListenError."""
        self.tunnel.start()

    def begin(self) -> None:
        """Have `run` run from now on, unless it does already: two would take each other's place at the server."""
        if not self._has_begun:
            self._has_begun = True
            self._tasks.spawn("supervise", self.run)

    def run(self) -> None:
        """Serve until `stop` and `close`; restart the tunnel after each crash."""
        try:
            while not self._stopping.is_set() and self._run_until_crash():
                self._tasks.spawn("close", self.tunnel.close).join()  # if that crashes too, a restart is still right
                self._restart()
        finally:
            self._ended = True

    def stop(self, timeout: float) -> None:
        """Take no new sessions, wait at most `timeout` seconds for running ones, cut the rest."""
        self._stopping.set()
        self.cut = self.tunnel.stop(timeout)

    def close(self) -> None:
        """Close everything at once."""
        self._stopping.set()
        self.tunnel.close()

    def _run_until_crash(self) -> bool:
        """Whether it was a crash that ended it."""
        try:
            self.tunnel.run()
        except Exception as error:  # noqa: BLE001  # a bug, which ends this tunnel only
            self.stats.trouble["crashes"] += 1
            words = "tunnel crashed (bug); restarting in %(pause)s"
            self.log.error("tunnel.crashed", words, crash=error, pause=format_duration(self._cooldown))
            return True
        return False

    def _restart(self) -> None:
        """Make and start the next tunnel after the cooldown, and again after each failure, until `stop`."""
        while not self._stopping.wait(self._cooldown):
            try:
                tunnel = self._make()
                tunnel.start()
            except NodepassError as error:
                self.log.error("tunnel.restart_failed", "restart failed: %(error)s", error=error)
            except Exception as error:  # noqa: BLE001  # a bug; the next attempt may succeed
                report_bug("restart", error, self.log, self.stats)
            else:
                if self._stopping.is_set():  # meanwhile
                    tunnel.close()
                else:
                    self.tunnel = tunnel
                return
