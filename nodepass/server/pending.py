"""Pending connections: accepted, but not yet authenticated; limited per address, per port and in the whole process.

Each of a server's own ports has a `PendingConnections`. For each connection it runs its listener's work, which finds
out what the peer is and calls `release` once the peer has authenticated; what that means is not known here.

Where one more would exceed a limit, the oldest is dropped: legitimate peers authenticate in milliseconds, so the oldest
is the least likely to be one. Silent connections, however many, cannot block others. A peer that may be silent
costs no greenlet while it is: a generator waits for its first bytes, driven by the event loop. So a crowd of silent
peers is accepted and dropped as fast as it comes, and holds up nothing behind it in the kernel's queue.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from gevent import Greenlet, get_hub

from nodepass.log import Limit, Log
from nodepass.net.sockets import Socket, plain_host
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer, TaskGroup, report_bug

PER_PORT = 1024  # pending connections
PER_ADDRESS = 256  # of them, from one host
SHARE = 8  # in the whole process they take at most one in so many descriptors,
AT_LEAST = 64  # but may be so many, as a client dials at once, where a quarter of the descriptors allows that
QUIET = 0.25  # seconds for which a peer that must speak first may be silent; then its handshake's timeout counts
LOOK_EVERY = 1 / 16  # seconds between two looks for silences that are over
READABLE = 1  # the event loop's flag

Work = Callable[..., object]
Steps = Generator[None, None, None]


@dataclass(eq=False, slots=True)
class _Pending:
    """One pending connection, and what it holds beside its socket."""

    sock: Socket
    host: str
    since: float  # time.monotonic()
    silence: float  # seconds for which it may say nothing before its work begins
    port: PendingConnections
    steps: Steps = field(init=False)  # until its work begins
    greenlet: Greenlet[..., None] | None = None  # does its work
    owned: bool = False  # the work has begun, and closes the socket


class PendingConnections:
    """The pending connections of one port."""

    _all: ClassVar[dict[Socket, _Pending]] = {}  # in the whole process, the oldest first

    def __init__(self, port: str, log: Log, stats: Stats) -> None:
        """`port`: its name in the log."""
        self._port = port
        self._log = log
        self._stats = stats
        self._in_all = pending_limit()
        self._per_port = min(PER_PORT, self._in_all)
        self._per_address = min(PER_ADDRESS, max(AT_LEAST, self._in_all // 4))
        self._tasks = TaskGroup(log, stats)
        self._here: dict[Socket, _Pending] = {}  # the oldest first
        # Those of them that wait for their first bytes, by how long they may, the oldest first.
        self._silent: dict[float, dict[Socket, _Pending]] = {}
        self._timer = IdleTimer(LOOK_EVERY, self._end_silences)
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._here)

    def __repr__(self) -> str:
        silent = sum(map(len, self._silent.values()))
        return f"<{type(self).__name__} at the {self._port} port: {len(self)}, {silent} of them silent>"

    def accept(self, sock: Socket, work: Work, *args: object, silence: float = 0.0) -> None:
        """Run `work(sock, *args)` in a greenlet; it must close the connection or hand it on, also where it is killed.

        It begins at the peer's first bytes, or after `silence` seconds. The values of `silence` should be few.
        """
        try:
            host = plain_host(sock.getpeername())
        except OSError:
            sock.close()  # it has left already
            return
        self._make_room(host)
        pending = self._all[sock] = self._here[sock] = _Pending(sock, host, time.monotonic(), silence, self)
        self._addresses[host] += 1
        pending.steps = self._steps(pending, work, args)
        next(pending.steps)

    def time_left(self, sock: Socket, timeout: float) -> float:
        """Seconds that are left of a timeout which began when this connection was accepted."""
        pending = self._here.get(sock)
        return max(0.001, pending.since + timeout - time.monotonic()) if pending else timeout

    def release(self, sock: Socket) -> None:
        """This connection has authenticated, or is over, and is not pending any more; its work may go on."""
        if pending := self._here.pop(sock, None):
            del self._all[sock]
            self._addresses[pending.host] -= 1
            if not self._addresses[pending.host]:
                del self._addresses[pending.host]

    def close(self) -> None:
        """End all, also those whose work has gone on after `release`."""
        for pending in list(self._here.values()):
            self._end(pending)
        self._tasks.kill()
        self._timer.stop()

    def _steps(self, pending: _Pending, work: Work, args: tuple[object, ...]) -> Steps:
        """Wait for the first bytes while there may be none, then begin the work. The event loop calls each step."""
        try:
            if pending.silence > 0:
                with self._watching(pending):
                    yield
            pending.greenlet = self._tasks.spawn(f"the {self._port} port", self._run, pending, work, args)
        except Exception as error:  # noqa: BLE001  # a bug; an exception would be lost in the event loop
            report_bug(f"a pending connection to the {self._port} port", error, self._log, self._stats)
            self.release(pending.sock)
            pending.sock.close()
        yield

    @contextmanager
    def _watching(self, pending: _Pending) -> Iterator[None]:
        """Have its next step called at its first bytes, or by `_end_silences`."""
        watcher = get_hub().loop.io(pending.sock.fileno(), READABLE)
        watcher.start(pending.steps.__next__)
        silent = self._silent.setdefault(pending.silence, {})
        silent[pending.sock] = pending
        self._timer.start()
        try:
            yield
        finally:
            del silent[pending.sock]
            if not silent:
                del self._silent[pending.silence]
            watcher.stop()
            watcher.close()

    def _end_silences(self) -> bool:
        """Begin the work of those that have been silent for long enough; whether others are silent still."""
        now = time.monotonic()
        for silence, silent in list(self._silent.items()):
            while silent and (oldest := next(iter(silent.values()))).since + silence <= now:
                next(oldest.steps)
        return bool(self._silent)

    def _run(self, pending: _Pending, work: Work, args: tuple[object, ...]) -> None:
        pending.owned = True
        try:
            work(pending.sock, *args)
        finally:
            self.release(pending.sock)
            # Each refers to the pending connection, and it to them: a flood would fill memory until a collection.
            pending.steps.close()
            pending.greenlet = None

    def _make_room(self, host: str) -> None:
        """Drop the oldest where a limit is reached: of this address, of this port, or of the process."""
        if self._addresses[host] >= self._per_address:
            self._drop(next(pending for pending in self._here.values() if pending.host == host))
        elif len(self._here) >= self._per_port:
            self._drop(next(iter(self._here.values())))
        elif len(self._all) >= self._in_all:
            oldest = next(iter(self._all.values()))
            oldest.port._drop(oldest)

    def _drop(self, pending: _Pending) -> None:
        self._stats.trouble["pending_dropped"] += 1
        words = "too many pending connections on the %(port)s port; dropped the oldest (%(peer)s)"
        self._log.warning("pending.dropped", words, Limit(burst=1), port=self._port, peer=pending.host)
        self._end(pending)

    def _end(self, pending: _Pending) -> None:
        """Release everything that it holds, whether it waits for bytes or to be scheduled."""
        self.release(pending.sock)
        pending.steps.close()
        if pending.greenlet:
            pending.greenlet.kill(block=False)
        if not pending.owned:
            pending.sock.close()


def pending_limit() -> int:
    """How many pending connections all servers of the process may have.

    Without a share of their own, unauthenticated peers could take the descriptors that visitors need.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(AT_LEAST, files // 4), files // SHARE)
