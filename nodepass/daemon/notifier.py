"""What the service manager hears: that the tunnels are ready, how they are, that they are healthy, that they stop.

The daemon runs it in a greenlet of its own; that this greenlet gets to run is itself the first half of being healthy.
How it is said is the business of `systemd`; without a service manager nothing is said, and START_TIMEOUT counts alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import gevent

from nodepass.config import Settings, format_duration
from nodepass.daemon.systemd import ServiceManager, extend_timeout, reloading, status
from nodepass.errors import StartError, reason
from nodepass.log import Limit, Log
from nodepass.tunnel.interface import Observed

MARGIN = 10.0  # seconds more than the program itself may take that systemd is asked to wait for it
START_PERIOD = 1.0  # seconds, at most, between two looks while somebody may be watching the start
SECOND_LOOK = 0.1  # seconds
REPEAT = 60.0  # seconds between two lines about the same unhealthy_reason


class Notifier:
    """Watches the tunnels, which the daemon may replace in their list, and tells the service manager."""

    def __init__(self, manager: ServiceManager, tunnels: Sequence[Observed], settings: Settings, log: Log) -> None:
        self._manager = manager
        self._tunnels = tunnels
        self._settings = settings
        self._log = log
        self._ready = self._stopping = False
        self._told = ""  # the last status
        # Twice in the time that the watchdog allows, and as often as statistics are written.
        self._period = min(settings.report_interval, manager.watchdog / 2 or settings.report_interval)

    def run(self) -> None:
        """Say so when every tunnel is ready, and then how they are, until killed.

        Raises StartError saying what fails where that takes longer than START_TIMEOUT.
        """
        self._wait_until_ready()
        if not self._manager.address:
            return
        while not self._tell_state("READY=1"):
            gevent.sleep(self._period)
        self._ready = True
        while True:
            gevent.sleep(self._period)
            self._tell_state()

    def begin_reload(self) -> None:
        """The files are being looked at; `end_reload` has to follow."""
        if self._ready:
            self._tell(*reloading())

    def end_reload(self) -> None:
        """The files have been looked at."""
        if self._ready:
            self._tell("READY=1")

    def begin_stop(self) -> None:
        """The tunnels drain: systemd is to wait for as long as SHUTDOWN_TIMEOUT says, whatever the unit says."""
        self._stopping = True
        self._tell_state("STOPPING=1", extend_timeout(self._settings.shutdown_timeout + MARGIN))

    def _wait_until_ready(self) -> None:
        limit = self._settings.start_timeout
        deadline = time.monotonic() + limit if limit else float("inf")
        if limit:
            self._tell(extend_timeout(limit + MARGIN))
        period = min(self._period, START_PERIOD)
        for index in range(len(self._tunnels)):
            while not self._tunnels[index].ready.wait(min(period, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise StartError(f"no handshake within START_TIMEOUT ({format_duration(limit)}): {self._unready()}")
                self._tell_state()

    def _unready(self) -> str:
        return "; ".join(f"{each.log.tunnel}: {each.status()}" for each in self._tunnels if not each.ready.is_set())

    def _tell_state(self, *lines: str) -> bool:
        """Tell how the tunnels are, and that they are well; whether that could be said."""
        well = self._stopping or not self._find_unhealthy()
        several = len(self._tunnels) > 1
        text = "; ".join(f"{each.log.tunnel}: {each.status()}" if several else each.status() for each in self._tunnels)
        now = status(f"stopping: {text}" if self._stopping else text)
        if not self._tell(*lines, *(["WATCHDOG=1"] if well else []), *([now] if now != self._told else [])):
            return False
        self._told = now
        return True

    def _find_unhealthy(self) -> bool:
        """Whether a tunnel is not well, also at a second look, which is logged.

        Where it was this process that stood still for a while, what has arrived meanwhile is read between the two.
        """
        if any(tunnel.unhealthy_reason() for tunnel in self._tunnels):
            gevent.sleep(SECOND_LOOK)
        found = False
        for tunnel in self._tunnels:
            if unhealthy_reason := tunnel.unhealthy_reason():
                found = True
                words = "this tunnel is not well, so the watchdog is kept waiting: %(error)s"
                tunnel.log.error("tunnel.unhealthy", words, Limit(seconds=REPEAT, burst=1), error=unhealthy_reason)
        return found

    def _tell(self, *lines: str) -> bool:
        try:
            self._manager.notify(*lines)
        except OSError as error:
            limit = Limit(seconds=REPEAT, burst=1)
            self._log.warning("systemd.notify_failed", "cannot notify systemd: %(error)s", limit, error=reason(error))
            return False
        return True
