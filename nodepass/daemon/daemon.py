"""The process: makes its parts, starts them, acts on POSIX signals, stops and closes the parts.

The parts are the metrics endpoint, the tunnels under their supervisors, and the notifier. A signal's handler only
queues its number; the main greenlet acts. SIGTERM and SIGINT drain and stop, and a second one exits at once. SIGHUP
reads certificates, keys and lists of networks again, or stops where the terminal was closed. SIGUSR1 logs statistics
and lists the greenlets. SIGUSR2 starts the program again, which takes over (`handover`); what has begun here drains.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import gevent
from gevent.lock import Semaphore
from gevent.queue import Queue

from nodepass.config.files import RETRY, FileState
from nodepass.config.kinds import format_duration
from nodepass.config.settings import Settings
from nodepass.config.urls import ClientURL, ServerURL, may_need_tls
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.dump import count_greenlets, list_greenlets, save
from nodepass.daemon.key_file import Keys
from nodepass.daemon.limits import survey
from nodepass.daemon.notifier import Notifier
from nodepass.daemon.supervisor import Supervisor
from nodepass.daemon.systemd import ServiceManager
from nodepass.daemon.terminal import Terminal
from nodepass.daemon.tunnels import make_tunnels
from nodepass.errors import ConfigError, StartError, reason
from nodepass.handover.accession import Accession
from nodepass.handover.receiver import NO_LEGACY, Legacy, Takeover
from nodepass.handover.succession import Succession
from nodepass.installed import how_to_add
from nodepass.log import Log, literal
from nodepass.net.activation import Inherited
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, report_bug
from nodepass.tunnel.buffers import kernel_buffers
from nodepass.tunnel.interface import LISTENER_ROLES, Watched, report_fields

if TYPE_CHECKING:
    from nodepass.metrics.endpoint import MetricsEndpoint

STOPPING = (signal.SIGTERM, signal.SIGINT)
HANDED_OVER = 0  # in the queue of signals: another process has taken over
LOOK_EVERY = 0.2  # seconds between two looks whether flows have ended


class Part(Protocol):
    """A part of the process."""

    def start(self) -> None:
        """Open what must be open before the process is ready. Raises ListenError."""

    def stop(self, timeout: float) -> None:
        """Begin nothing new, and let what runs end within `timeout` seconds."""

    def close(self) -> None:
        """Close everything at once."""


class Daemon:
    """The whole process. Raises ConfigError where a file of a tunnel, or what METRICS_LISTEN needs, is not usable."""

    def __init__(
        self,
        urls: Sequence[ServerURL | ClientURL],
        settings: Settings,
        keys: Keys,
        manager: ServiceManager,
        stats: Stats,
        access: AccessOutputs,
        takeover: Takeover | None = None,
    ) -> None:
        """`stats`: of what belongs to no tunnel; `access`: where the tunnels' access logs go.

        `takeover`: from another process, if there is one.
        """
        self._log, self._stats = Log("nodepass"), stats
        self._tasks = TaskGroup(self._log, self._stats)
        # not SimpleQueue: until gevent 25 that was the standard library's, whose `get` stops the whole process
        self._signals: Queue[int] = Queue()
        self._failure: StartError | None = None
        self._limits = survey([url.settings(settings) for url in urls], may_need_tls(urls))
        if self._limits.buffers is not None:
            kernel_buffers.limit(self._limits.buffers)
        self._settings = settings  # of the process
        self._urls, self._keys, self._access = urls, keys, access
        self._runtime_directory = manager.runtime_directory
        self._terminal, self._reloading = Terminal(), Semaphore()
        self._unusable_keys: FileState | None = None  # of the keys file, where it could not be used at a reload
        self._inherited = takeover.legacy.as_inherited() if takeover else Inherited(manager.sockets, LISTENER_ROLES)
        self._tunnels = self._make_tunnels(manager.state_directory, takeover.legacy if takeover else NO_LEGACY)
        self._accession = Accession(takeover, self._tunnels, self._log, self._tasks) if takeover else None
        if takeover:  # which waits for the servers that there are; one that is missing was missing before
            settings = replace(settings, start_timeout=0.0)
        self._notifier = Notifier(manager, self._tunnels, settings, self._log, self._stats, self._fail)
        # In the order of starting. All stop at once; the endpoint answers until it is closed, while tunnels drain.
        self._endpoint = self._make_endpoint()
        self._parts: list[Part] = [*self._tunnels, self._notifier]
        if self._endpoint:
            self._parts.insert(0, self._endpoint)
        announce = self._notifier.hand_over
        self._succession = Succession(self._tunnels, self._endpoint, self._log, self._tasks, announce)

    def _make_tunnels(self, state_directory: str, legacy: Legacy) -> list[Supervisor]:
        own = self._limits.settings
        makers = make_tunnels(self._urls, own, self._keys, self._inherited, self._access, state_directory, legacy)
        return [Supervisor(make, its.service_cooldown, self._tasks) for make, its in zip(makers, own, strict=True)]

    @property
    def bugs(self) -> int:
        """The number of crashes, of a session, a loop or a whole tunnel; the log has each with its traceback."""
        everywhere = (self._stats, *(tunnel.stats for tunnel in self._tunnels))
        return sum(stats.trouble["bugs"] + stats.trouble["crashes"] for stats in everywhere)

    def run(self) -> None:
        """Start every part, serve until a signal says stop, drain.

        Raises ListenError or StartError where a part cannot start, ConfigError where systemd passed an unused socket.
        """
        gevent.get_hub().print_exception = self._report_stray  # type: ignore[method-assign,assignment]
        for number in (*STOPPING, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # else nohup has started it
                gevent.signal_handler(number, self._signals.put, number)
        self._start()
        self._log_limits()
        for tunnel in self._tunnels:
            tunnel.begin()
        self._wait_for_stop()
        self._succession.cancel()
        stop = self._tasks.spawn("stop", self._drain if self._succession.is_over else self._stop)
        gevent.wait([stop, self._tasks.spawn("handle signals", self._wait_for_stop)], count=1)
        if not stop.ready() and self._succession.is_over:  # it was the first signal to stop
            grace = self._settings.shutdown_timeout
            self._log_stopping(grace)
            gevent.wait([stop, self._tasks.spawn("handle signals", self._wait_for_stop)], grace, count=1)
        if not stop.ready():
            words = "exiting immediately, cutting %(sessions)d sessions"
            self._log.warning("process.exiting", words, sessions=self._sessions())
            self._succession.count()
            if self._endpoint:
                self._endpoint.close()  # removes the file of its socket; the kernel closes everything else
        if self._failure:
            raise self._failure

    def _make_endpoint(self) -> MetricsEndpoint | None:
        """What METRICS_LISTEN asks for. Raises ConfigError where what it needs is not installed."""
        listen = self._settings.metrics_listen
        if listen is None:
            return None
        try:
            from nodepass.metrics.endpoint import MetricsEndpoint
        except ImportError as error:
            raise ConfigError(f"METRICS_LISTEN: {error}; {how_to_add(error)}") from None
        return MetricsEndpoint(listen, self._watch, self._log, self._stats, self._inherited.share())

    def _watch(self) -> list[Watched]:
        return [tunnel.watched() for tunnel in self._tunnels]

    def _log_limits(self) -> None:
        limits = self._limits
        self._log.info(
            "process.limits",
            literal(limits.line),
            files=limits.files,
            sessions=limits.sessions,
            memory=limits.memory.size if limits.memory else None,
            memory_of=limits.memory.what if limits.memory else None,
            memory_sessions=limits.memory_sessions,
        )
        for warning in limits.warnings:
            self._log.warning(
                "process.limits_exceeded",
                literal(warning.words),
                reason=warning.reason,
                needed=warning.needed,
                available=warning.available,
                semaphore_limit=warning.semaphore_limit,
            )

    def _start(self) -> None:
        """Start every part; if one fails, close those that have started."""
        with contextlib.ExitStack() as started:
            for part in self._parts:
                if part is self._notifier and self._accession:
                    self._take_over(self._accession)  # until then another process is the service
                part.start()
                if not self._accession:  # else the listeners' files belong to the process before
                    started.callback(part.close)
                    if part is self._endpoint:
                        self._endpoint.answer()
            self._refuse_unused_sockets()
            started.pop_all()

    def _take_over(self, accession: Accession) -> None:
        """Return when this process is the service. Raises StartError, ConfigError."""
        self._refuse_unused_sockets()
        accession.run(2 * self._settings.handshake_timeout)
        if self._endpoint:
            self._endpoint.answer()

    def _hand_over(self) -> None:
        """SIGUSR2: have a new process take over."""
        try:
            if self._succession.run():
                self._inherited.close()
                self._signals.put(HANDED_OVER)
        except StartError as error:
            self._fail(error)

    def _refuse_unused_sockets(self) -> None:
        """Raise ConfigError where a socket was passed that no URL uses: connections to it would wait forever."""
        if unused := self._inherited.unused():
            allowed = "the tunnel, data and target addresses of the server URLs, unless TCP or UDP is off there"
            raise ConfigError(f"{self._inherited.source} passed {unused}, which no URL uses; allowed: {allowed}")

    def _stop(self) -> None:
        """Drain within SHUTDOWN_TIMEOUT, then close every part."""
        timeout = self._settings.shutdown_timeout
        self._log_stopping(timeout)
        self._end_sessions(timeout)
        self._close_parts()

    def _log_stopping(self, timeout: float) -> None:
        words = "stopping; draining %(sessions)d sessions for up to %(grace)s"
        self._log.info("process.stopping", words, sessions=self._sessions(), grace=format_duration(timeout))

    def _drain(self) -> None:
        """Another process has taken over: let sessions and flows end within DRAIN_TIMEOUT, then close every part."""
        timeout = self._settings.drain_timeout
        self._log.info(
            "process.handed_over",
            "process %(process)d has taken over; %(sessions)d sessions and %(flows)d flows go on here for up to"
            " %(grace)s",
            process=self._succession.process,
            sessions=self._sessions(),
            flows=self._flows(),
            grace=format_duration(timeout),
        )
        deadline = time.monotonic() + timeout
        self._end_sessions(timeout)
        while self._is_needed() and time.monotonic() < deadline:
            gevent.sleep(LOOK_EVERY)
        self._succession.count()
        self._close_parts()

    def _is_needed(self) -> bool:
        """Whether flows go on here, or traffic of the process before must be passed on."""
        is_counting = self._accession is not None and self._accession.is_counting
        return is_counting or any(each.tunnel.view().flows for each in self._tunnels)

    def _end_sessions(self, timeout: float) -> None:
        """Stop every part; sessions have so many seconds. A crash in one part does not keep the others."""
        grace, parts = format_duration(timeout), self._parts[::-1]
        gevent.joinall([self._tasks.spawn("stop", part.stop, timeout) for part in parts])
        if cut := sum(tunnel.cut for tunnel in self._tunnels):
            words = "cut %(sessions)d sessions that had not finished within %(grace)s"
            self._log.warning("process.cut", words, sessions=cut, grace=grace)

    def _close_parts(self) -> None:
        gevent.joinall([self._tasks.spawn("close", part.close) for part in self._parts[::-1]])
        self._log.info("process.stopped", "stopped")

    def _fail(self, error: StartError) -> None:
        """End the process with this error."""
        self._failure = error
        self._signals.put(signal.SIGTERM)

    def _wait_for_stop(self) -> None:
        """Act on signals until one says stop, or another process has taken over."""
        while (number := self._signals.get()) not in (*STOPPING, HANDED_OVER):
            if number == signal.SIGHUP and self._terminal.has_gone():
                self._log.info("process.hangup", "SIGHUP: the terminal was closed")
                return
            if number == signal.SIGHUP:
                self._tasks.spawn("reload", self._reload)
            elif number == signal.SIGUSR2:
                self._tasks.spawn("hand over", self._hand_over)
            else:
                self._tasks.spawn("dump", self._dump)

    def _reload(self) -> None:
        with self._reloading:
            self._log.info(
                "process.reloading", "SIGHUP: reading the certificates, the keys file and the visitors' rules"
            )
            self._notifier.begin_reload()
            self._access.reopen()
            self._read_files()
            self._notifier.end_reload()

    def _read_files(self) -> None:
        self._reload_keys()
        gevent.joinall([self._tasks.spawn("reload", each.tunnel.reload) for each in self._tunnels])

    def _retry_keys(self) -> None:
        """Read a keys file that could not be used again as soon as it has changed."""
        while self._unusable_keys is not None:
            gevent.sleep(RETRY)
            with self._reloading:
                if self._unusable_keys not in (None, self._keys.file_state):
                    self._read_files()

    def _reload_keys(self) -> None:
        """Read the keys file again, in a thread, because deriving keys takes long."""
        state, is_watched = self._keys.file_state, self._unusable_keys is not None
        outcome = gevent.get_hub().threadpool.apply(self._keys.try_reload)
        if isinstance(outcome, ConfigError):
            self._log.error("keys.reload_failed", "%(error)s; the keys stay as they were", error=outcome)
            self._unusable_keys = state
            if not is_watched:
                self._tasks.spawn("watch the keys file", self._retry_keys)
            return
        self._unusable_keys = None
        if not outcome:
            return
        self._log.info("keys.reloaded", "%(place)s has changed", place=self._keys.place)
        for notice in self._keys.notices:
            self._log.warning("config.warning", "%(warning)s", reason=notice.reason, warning=notice.words)
        for tunnel, url in zip(self._tunnels, self._urls, strict=True):
            if not self._keys.of(url).secrets(url.tunnel_name):
                words = "%(place)s has no key for this tunnel any more, so it has no peer"
                tunnel.log.warning("keys.missing", words, place=self._keys.place)

    def _dump(self) -> None:
        """Write what SIGUSR1 asks for; the last line sums it up."""
        for tunnel in (each.tunnel for each in self._tunnels):
            tunnel.log.always("tunnel.report", literal(tunnel.describe()), **report_fields(tunnel.view(), tunnel.stats))
        lines = list_greenlets()
        path, lost = self._save(lines), self._stats.log_lines_lost
        words = f"bugs {self.bugs}, see the tracebacks" if self.bugs else "no bugs"
        words += ", lost %(lost)d lines of the log" if lost else ""
        words += ", %(greenlets)d greenlets, listed " + ("in %(path)s" if path else "at debug")
        greenlets = count_greenlets(lines)
        self._log.always("process.bugs", words, bugs=self.bugs, lost=lost, greenlets=greenlets, path=path)

    def _save(self, greenlets: Sequence[str]) -> str:
        """The file that has the greenlets now; empty where the log has them, at debug."""
        if self._runtime_directory:
            try:
                return save(greenlets, self._runtime_directory)
            except OSError as error:
                words = "cannot write the list of greenlets into %(directory)s: %(error)s"
                directory = self._runtime_directory
                self._log.warning("process.dump_failed", words, directory=directory, error=reason(error))
        for line in greenlets:
            self._log.debug("process.greenlets", "%(line)s", line=line)
        return ""

    def _sessions(self) -> int:
        return sum(len(each.tunnel.sessions) for each in self._tunnels)

    def _flows(self) -> int:
        return sum(each.tunnel.view().flows for each in self._tunnels)

    def _report_stray(self, context: object, kind: type[BaseException], error: BaseException, trace: Any) -> None:
        """Report what gevent would print of an uncaught exception, of a callback of the event loop for example."""
        report_bug(f"{context!r:.200}", (error or kind()).with_traceback(trace), self._log, self._stats)
