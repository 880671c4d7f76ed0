"""The lobby: connections that have not yet shown who they are, limited per address and in all.

Each port has its own, and all of a process share a part of its descriptors. One more than allowed, and the oldest is
dropped: who proves itself does so in milliseconds, who only takes up a place has had its time. So silence, by whomever
and however often, keeps nobody out. Who has to speak first costs no greenlet before he does, so that a crowd of silent
ones is let in and dropped as fast as they come, and holds up nobody behind them in the kernel's queue.
"""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from gevent import Greenlet, get_hub

from nodepass.log import Limit, Log
from nodepass.net.sockets import Socket, plain_host
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup

PENDING = 1024  # descriptors at most on each of a server's two ports: who has not yet shown who it is (`lobby`)
PENDING_SHARE = 8  # a part in so many of the descriptors, at most, on all ports together; where that is fewer than
PENDING_LEAST = 64  # which a client may dial at once, it is these, but no more than a quarter
PER_ADDRESS = 256
IN_ALL = PENDING
QUIET = 0.25  # seconds for which silence costs nothing; then what finds out who it is begins, and has its own patience


@dataclass(eq=False, slots=True)
class _Pending:
    """Where it came from and since when it is here, what finds out who it is, and the greenlet that does it."""

    host: str
    since: float  # time.monotonic()
    work: Callable[..., object]
    args: tuple[object, ...]
    watcher: Any = None  # gevent's io watcher, which has no type; until its first bytes
    greenlet: Greenlet[..., None] | None = None
    begun: bool = False


class PendingConnections:
    """Newcomers, each with a greenlet that finds out who it is."""

    _everywhere: ClassVar[dict[Socket, PendingConnections]] = {}  # in the whole process, the oldest first

    def __init__(self, name: str, log: Log, stats: Stats) -> None:
        self._name = name
        self._log = log
        self._stats = stats
        self._share = pending_limit()
        self._in_all = min(IN_ALL, self._share)
        self._per_address = min(PER_ADDRESS, max(PENDING_LEAST, self._share // 4))
        self._tasks = TaskGroup(log, stats)
        self._inside: dict[Socket, _Pending] = {}  # the oldest first
        self._silent: dict[Socket, _Pending] = {}  # those of them that have a watcher
        self._timer: Any = None  # gevent's; it runs while somebody is silent
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._inside)

    def receive(self, sock: Socket, work: Callable[..., object], *args: object, speaks_first: bool = False) -> None:
        """Run `work(sock, *args)`, which has to close the connection or hand it on, also where it is killed.

        With `speaks_first` it begins with the newcomer's first bytes, or after QUIET.
        """
        try:
            host = plain_host(sock.getpeername())
        except OSError:
            sock.close()  # it has gone already
            return
        self._make_room(host)
        newcomer = self._inside[sock] = _Pending(host, time.monotonic(), work, args)
        self._everywhere[sock] = self
        self._addresses[host] += 1
        if speaks_first:
            self._listen(sock, newcomer)
        else:
            self._begin(sock, newcomer)

    def left(self, sock: Socket, timeout: float) -> float:
        """Seconds that are left of a timeout which began when this one came in."""
        newcomer = self._inside.get(sock)
        return max(0.001, newcomer.since + timeout - time.monotonic()) if newcomer else timeout

    def leave(self, sock: Socket) -> None:
        """This one has shown who it is, or is gone; its greenlet may go on."""
        if newcomer := self._inside.pop(sock, None):
            del self._everywhere[sock]
            self._unwatch(sock, newcomer)
            self._addresses[newcomer.host] -= 1
            if not self._addresses[newcomer.host]:
                del self._addresses[newcomer.host]

    def kill(self) -> None:
        """End all, also those that have left the lobby and go on."""
        for sock in list(self._inside):
            self._end(sock)
        self._tasks.kill()
        self._begin_overdue()  # nobody is: the timer ends

    def _listen(self, sock: Socket, newcomer: _Pending) -> None:
        loop = get_hub().loop
        newcomer.watcher = loop.io(sock.fileno(), 1)
        newcomer.watcher.start(self._begin, sock, newcomer)
        self._silent[sock] = newcomer
        if self._timer is None:
            self._timer = loop.timer(QUIET, QUIET / 4)
            self._timer.start(self._begin_overdue)

    def _unwatch(self, sock: Socket, newcomer: _Pending) -> None:
        if newcomer.watcher is not None:
            newcomer.watcher.stop()
            newcomer.watcher.close()
            newcomer.watcher = None
            del self._silent[sock]

    def _begin_overdue(self) -> None:
        limit = time.monotonic() - QUIET
        for sock, newcomer in list(self._silent.items()):
            if newcomer.since > limit:
                break
            self._begin(sock, newcomer)
        if not self._silent and self._timer is not None:
            self._timer.close()
            self._timer = None

    def _begin(self, sock: Socket, newcomer: _Pending) -> None:
        self._unwatch(sock, newcomer)
        newcomer.greenlet = self._tasks.spawn(self._name, self._run, newcomer, sock)

    def _run(self, newcomer: _Pending, sock: Socket) -> None:
        newcomer.begun = True
        try:
            newcomer.work(sock, *newcomer.args)
        finally:
            self.leave(sock)

    def _make_room(self, host: str) -> None:
        if self._addresses[host] >= self._per_address:
            self._drop(next(each for each, inside in self._inside.items() if inside.host == host))
        elif len(self._inside) >= self._in_all:
            self._drop(next(iter(self._inside)))
        elif len(self._everywhere) >= self._share:
            oldest = next(iter(self._everywhere))
            self._everywhere[oldest]._drop(oldest)

    def _drop(self, sock: Socket) -> None:
        """Make room. Whatever it waits for, be it its own bytes or its turn, it is to hold nothing any more."""
        self._stats.trouble["pending_dropped"] += 1
        words = "too many newcomers to %(port)s that say nothing: dropped the oldest, of %(peer)s"
        self._log.warning("pending.dropped", words, Limit(burst=1), port=self._name, peer=self._inside[sock].host)
        self._end(sock)

    def _end(self, sock: Socket) -> None:
        newcomer = self._inside[sock]
        self.leave(sock)
        if newcomer.greenlet:
            newcomer.greenlet.kill(block=False)
        if not newcomer.begun:
            sock.close()


def pending_limit() -> int:
    """How many connections of all servers of the process may not yet have shown who they are.

    Without a share of their own, strangers could take the descriptors that visitors need.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, min(PENDING_LEAST, files // 4), files // PENDING_SHARE)
