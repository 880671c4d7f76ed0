"""What systemd is told: that the tunnels are ready, their status, that the process is healthy, that it stops.

Owns the greenlet that watches the tunnels; that it runs shows that the event loop does. How a notification is sent is
the business of `systemd`. Without a service manager nothing is sent, and START_TIMEOUT counts all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import gevent

from nodepass.config.kinds import format_duration
from nodepass.config.settings import Settings
from nodepass.daemon.systemd import ServiceManager, extend_timeout, reloading, status
from nodepass.errors import StartError, reason
from nodepass.log import Limit, Log
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.interface import Observed

MARGIN = 10.0  # seconds that systemd is asked to wait longer than the program itself needs at most
START_PERIOD = 1.0  # seconds: longest pause between two status lines during the start
SECOND_LOOK = 0.1  # seconds
REPEAT = 60.0  # seconds between two log lines about the same reason


class Notifier:
    """Watches the tunnels from `start` to `close`. `on_failure` gets the error where START_TIMEOUT is exceeded."""

    def __init__(
        self,
        manager: ServiceManager,
        tunnels: Sequence[Observed],
        settings: Settings,
        log: Log,
        stats: Stats,
        on_failure: Callable[[StartError], object],
    ) -> None:
        self._manager = manager
        self._tunnels = tunnels
        self._settings = settings
        self._log = log
        self._tasks = TaskGroup(log, stats)
        self._on_failure = on_failure
        self._ready = self._stopping = False
        self._last_status = ""
        # Twice within the watchdog's time, and at least as often as statistics are written.
        self._period = min(settings.report_interval, manager.watchdog / 2 or settings.report_interval)

    def start(self) -> None:
        """Begin to watch; READY=1 follows when every tunnel is ready."""
        if self._settings.start_timeout:
            self._send(extend_timeout(self._settings.start_timeout + MARGIN))
        self._tasks.spawn("notify", self._run)

    def stop(self, timeout: float) -> None:
        """Announce the drain: systemd must wait for it, whatever its unit says. The watchdog is served meanwhile."""
        self._stopping = True
        self._send_state("STOPPING=1", extend_timeout(self._settings.shutdown_delay + timeout + MARGIN))

    def close(self) -> None:
        """Watch no more."""
        self._tasks.kill()

    def hand_over(self, process: int) -> None:
        """Have systemd take the process of this id for the service; from now on that one notifies it."""
        self._send(f"MAINPID={process}")
        self._tasks.kill()
        self._manager = replace(self._manager, address="")

    def begin_reload(self) -> None:
        """Announce a reload; `end_reload` must follow."""
        if self._ready:
            self._send(*reloading())

    def end_reload(self) -> None:
        """Announce the end of a reload."""
        if self._ready:
            self._send("READY=1")

    def _run(self) -> None:
        try:
            self._wait_until_ready()
        except StartError as error:
            self._on_failure(error)
            return
        if not self._manager.address:
            return
        while not self._send_state("READY=1"):
            gevent.sleep(self._period)
        self._ready = True
        while True:
            gevent.sleep(self._period)
            self._send_state()

    def _wait_until_ready(self) -> None:
        """Return when every tunnel is ready. Raises StartError where that takes longer than START_TIMEOUT."""
        limit = self._settings.start_timeout
        deadline = time.monotonic() + limit if limit else float("inf")
        period = min(self._period, START_PERIOD)
        for tunnel in self._tunnels:
            while not tunnel.ready.wait(min(period, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise StartError(f"no handshake within START_TIMEOUT ({format_duration(limit)}): {self._unready()}")
                self._send_state()

    def _unready(self) -> str:
        return "; ".join(f"{each.log.tunnel}: {each.status()}" for each in self._tunnels if not each.ready.is_set())

    def _send_state(self, *lines: str) -> bool:
        """Send these lines, the watchdog's unless a tunnel is unhealthy, and the status; whether systemd took them."""
        healthy = self._stopping or not self._find_unhealthy()
        several = len(self._tunnels) > 1
        text = "; ".join(f"{each.log.tunnel}: {each.status()}" if several else each.status() for each in self._tunnels)
        now = status(f"stopping: {text}" if self._stopping else text)
        if not self._send(*lines, *(["WATCHDOG=1"] if healthy else []), *([now] if now != self._last_status else [])):
            return False
        self._last_status = now
        return True

    def _find_unhealthy(self) -> bool:
        """Whether a tunnel is unhealthy also at a second look; the log says why.

        If the whole process was suspended, what has arrived meanwhile is read between the two looks.
        """
        if any(tunnel.unhealthy_reason() for tunnel in self._tunnels):
            gevent.sleep(SECOND_LOOK)
        found = False
        for tunnel in self._tunnels:
            if unhealthy_reason := tunnel.unhealthy_reason():
                found = True
                words = "unhealthy; withholding the watchdog ping: %(error)s"
                tunnel.log.error("tunnel.unhealthy", words, Limit(seconds=REPEAT, burst=1), error=unhealthy_reason)
        return found

    def _send(self, *lines: str) -> bool:
        try:
            self._manager.notify(*lines)
        except OSError as error:
            limit = Limit(seconds=REPEAT, burst=1)
            self._log.warning("systemd.notify_failed", "cannot notify systemd: %(error)s", limit, error=reason(error))
            return False
        return True
