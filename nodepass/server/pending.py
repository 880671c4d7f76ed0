"""Pending connections: accepted, but not yet authenticated; limited per network, per port and in the whole process.

Each of a server's own ports has a `PendingConnections`. For each connection it runs its listener's work, which finds
out what the peer is and calls `release` once the peer has authenticated; what that means is not known here.

Where one more would exceed a limit, one is dropped, which `networks` chooses: of the network that has most, one that
has said nothing, if there is one. Silent connections, however many, cannot block others. A peer that may be silent
costs no greenlet while it is: a generator waits for its first bytes, driven by the event loop. So a crowd of silent
peers is accepted and dropped as fast as it comes, and holds up nothing behind it in the kernel's queue.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gevent import Greenlet, get_hub

from nodepass.log import Limit, Log
from nodepass.net.networks import Networks
from nodepass.net.sockets import Endpoint, Socket, count_waiting, network_of, since_last_bytes
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer, TaskGroup, report_bug

PER_PORT = 1024  # pending connections
PER_NETWORK = 256  # of them, from one network: a quarter, so that three more can flood the port and leave room
SHARE = 8  # in the whole process they take at most one in so many descriptors,
AT_LEAST = 64  # but may be so many, as a client dials at once, where a quarter of the descriptors allows that
WAITED = 0.5  # of a handshake's timeout: it is too late for one that has waited so long,
LONG_QUEUE = 64  # where so many more wait; fewer are served in time
LOOK_EVERY = 1 / 16  # seconds between two looks for silences that are over
READABLE = 1  # the event loop's flag

Work = Callable[..., object]
Shortcut = Callable[[Socket, Endpoint], bool]
Steps = Generator[None, bool, None]  # resumed with whether the peer has spoken


@dataclass(eq=False, slots=True)
class _Pending:
    """One pending connection, and what it holds beside its socket."""

    sock: Socket
    host: str
    network: str
    since: float  # time.monotonic()
    steps: Steps = field(init=False)  # until its first bytes
    spoken: bool = False
    greenlet: Greenlet[..., None] | None = None  # does its work
    owned: bool = False  # the work has begun, and closes the socket


class PendingConnections:
    """The pending connections of one port."""

    _total: ClassVar[int] = 0  # in the whole process
    _ports: ClassVar[dict[PendingConnections, None]] = {}  # that have some

    def __init__(self, port: str, log: Log, stats: Stats) -> None:
        """`port`: its name in the log."""
        self._port = port
        self._log = log
        self._stats = stats
        self._in_all = pending_limit()
        self._per_port = min(PER_PORT, self._in_all)
        self._per_network = min(PER_NETWORK, max(AT_LEAST, self._in_all // 4))
        self._tasks = TaskGroup(log, stats)
        self._by_socket: dict[Socket, _Pending] = {}
        self._here: Networks[_Pending] = Networks()
        # Those whose work has not begun, by how many seconds they may be silent, the oldest first.
        self._waiting: dict[float, dict[_Pending, None]] = {}
        self._timer = IdleTimer(LOOK_EVERY, self._end_silences)

    def __len__(self) -> int:
        return len(self._here)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at the {self._port} port: {len(self)}, {self._here.silent} of them silent>"

    def accept(
        self,
        sock: Socket,
        peer: Endpoint,
        work: Work,
        *args: object,
        silence: float = 0.0,
        shortcut: Shortcut | None = None,
    ) -> None:
        """Run `work(sock, peer, *args)` in a greenlet; it must close the connection or hand it on, also when killed.

        It begins at the peer's first bytes, or after `silence` seconds. The values of `silence` should be few. The work
        may `release` the connection and have it accepted again, as that of another peer, with other work. `shortcut` is
        called before, at the first bytes, by the event loop: where it returns True, the connection is its own.
        """
        try:
            sock.getpeername()
        except OSError:
            sock.close()  # it has left already
            return
        network = network_of(peer.sockaddr)
        self._make_room(network)
        pending = _Pending(sock, peer.host, network, time.monotonic())
        self._by_socket[sock] = pending
        self._here.add(network, pending)
        self._ports[self] = None
        PendingConnections._total += 1
        pending.steps = self._steps(pending, work, (peer, *args), silence, shortcut)
        next(pending.steps)

    def turn_away(self, sock: Socket, listeners: Sequence[Any], timeout: float) -> bool:
        """Whether a connection was closed because it has waited too long in a long queue for a handshake of `timeout`.

        Its peer has given up, or will have before the handshake is over: a thousand clients that come back at once need
        more time than they wait for. Taken in turn, each would be too late, and make those behind it so; none came in.
        """
        try:
            if since_last_bytes(sock) < timeout * WAITED or sum(map(count_waiting, listeners)) < LONG_QUEUE:
                return False
        except OSError:
            return False  # it has left, which `accept` finds out
        self._stats.trouble["pending_late"] += 1
        words = "more clients come to the %(port)s port than it can serve in time; closed one that has waited too long"
        self._log.warning("pending.late", words, Limit(burst=1), port=self._port)
        sock.close()
        return True

    def began(self, sock: Socket) -> float:
        """When a pending connection was accepted, in time.monotonic()."""
        return self._by_socket[sock].since

    def time_left(self, sock: Socket, timeout: float) -> float:
        """Seconds that are left of a timeout which began when this connection was accepted."""
        pending = self._by_socket.get(sock)
        return max(0.001, pending.since + timeout - time.monotonic()) if pending else timeout

    def release(self, sock: Socket) -> None:
        """Called by the work: its connection has authenticated, or is over, and is not pending any more."""
        if pending := self._forget(sock):
            pending.steps.close()

    def close(self) -> None:
        """End all, also those whose work has gone on after `release`."""
        for pending in list(self._by_socket.values()):
            self._end(pending)
        self._tasks.kill()
        self._timer.stop()

    def _steps(
        self, pending: _Pending, work: Work, args: tuple[Any, ...], silence: float, shortcut: Shortcut | None
    ) -> Steps:
        """Begin the work at the first bytes or after the silence, and note the first bytes. The event loop resumes it.

        Where the work begins before them, it and this wait for the same bytes. All in one generator: a flood has many.
        """
        try:
            watcher = get_hub().loop.io(pending.sock.fileno(), READABLE)
            watcher.start(pending.steps.send, True)
            try:
                if silence > 0:
                    waiting = self._waiting.setdefault(silence, {})
                    waiting[pending] = None
                    self._timer.start()
                    try:
                        self._note_spoken(pending, (yield))
                    finally:
                        del waiting[pending]
                        if not waiting:
                            del self._waiting[silence]
                if pending.spoken and shortcut and shortcut(pending.sock, args[0]):
                    self._forget(pending.sock)
                else:
                    pending.greenlet = self._tasks.spawn(f"the {self._port} port", self._run, pending, work, args)
                if pending.greenlet and not pending.spoken:
                    self._note_spoken(pending, (yield))
            finally:
                watcher.stop()
                watcher.close()
        except Exception as error:  # noqa: BLE001  # a bug; an exception would be lost in the event loop
            report_bug(f"a pending connection to the {self._port} port", error, self._log, self._stats)
            self._forget(pending.sock)
            pending.sock.close()
        yield

    def _note_spoken(self, pending: _Pending, spoken: bool) -> None:
        if spoken:
            pending.spoken = True
            self._here.note_spoken(pending.network, pending)

    def _end_silences(self) -> bool:
        """Begin the work of those that have been silent for long enough; whether others are silent still."""
        now = time.monotonic()
        for silence, waiting in list(self._waiting.items()):
            while waiting and (oldest := next(iter(waiting))).since + silence <= now:
                oldest.steps.send(False)
        return bool(self._waiting)

    def _forget(self, sock: Socket) -> _Pending | None:
        """It is not pending any more; what it was, if it was."""
        if pending := self._by_socket.pop(sock, None):
            self._here.remove(pending.network, pending, pending.spoken)
            PendingConnections._total -= 1
            if not self._by_socket:
                del self._ports[self]
        return pending

    def _run(self, pending: _Pending, work: Work, args: tuple[object, ...]) -> None:
        pending.owned = True
        try:
            work(pending.sock, *args)
        finally:
            if self._by_socket.get(pending.sock) is pending:  # else it may have been accepted again
                self.release(pending.sock)
            pending.greenlet = None  # which refers to this: a flood would fill memory until a collection

    def _make_room(self, network: str) -> None:
        """Drop one where a limit is reached: of this network, of this port, or of the process."""
        if self._here.count(network) >= self._per_network:
            self._drop(self._here.choose_of(network))
        elif len(self._here) >= self._per_port:
            self._drop(self._here.choose())
        elif self._total >= self._in_all:
            port = max(self._ports, key=lambda port: port._here.most)
            port._drop(port._here.choose())

    def _drop(self, pending: _Pending) -> None:
        self._stats.trouble["pending_dropped"] += 1
        words = "too many pending connections on the %(port)s port; dropped one from %(network)s (%(peer)s)"
        network, peer = pending.network, pending.host
        self._log.warning("pending.dropped", words, Limit(burst=1), port=self._port, network=network, peer=peer)
        self._end(pending)

    def _end(self, pending: _Pending) -> None:
        """Release everything that it holds, whether it waits for bytes or to be scheduled."""
        self.release(pending.sock)
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
