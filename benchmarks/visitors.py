"""The loads that this process makes itself, with plain sockets and epoll: connect, hold, UDP closed loop.

Each returns raw samples; nothing here knows which system it talks to. All times are seconds.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.processes import LOOPBACK

ANSWER_TIMEOUT = 5.0  # for one echo; a connection attempt that gets none counts as an error
DATAGRAM_TIMEOUT = 1.0  # after which a datagram counts as lost and its socket goes on with the next
DATAGRAM_BYTES = 64
HOLD_TIMEOUT = 20.0  # for all visitors of the hold scene to be served


@dataclass
class Samples:
    """What a load saw: the seconds of each success, the number of failures, the seconds it all took."""

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    elapsed: float = 0.0

    def percentile(self, percent: float) -> float:
        """Return the smallest sample that at least `percent` of them do not exceed; nan without any."""
        if not self.seconds:
            return float("nan")
        ordered = sorted(self.seconds)
        rank = -(-len(ordered) * percent // 100)  # rounded up
        return ordered[max(0, int(rank) - 1)]


def connect_in_sequence(port: int, duration: float) -> Samples:
    """Connect, have one byte echoed, close; again and again for `duration` seconds."""
    samples = Samples()
    started = now = time.perf_counter()
    while now < started + duration:
        try:
            with socket.create_connection((LOOPBACK, port), timeout=ANSWER_TIMEOUT) as visitor:
                visitor.sendall(b"?")
                answered = visitor.recv(1) == b"?"
        except OSError:
            answered = False
        before, now = now, time.perf_counter()
        if answered:
            samples.seconds.append(now - before)
        else:
            samples.failed += 1
    samples.elapsed = now - started
    return samples


@contextlib.contextmanager
def hold_visitors(port: int, count: int) -> Iterator[Samples]:
    """Open `count` connections at once and have one byte echoed on each; yields while all are still open.

    A sample is the time from the very start until that visitor was served; a visitor that was not served
    within HOLD_TIMEOUT, or was refused, is a failure.
    """
    samples = Samples()
    visitors: dict[int, socket.socket] = {}
    try:
        with select.epoll() as poller:
            started = time.perf_counter()
            for _ in range(count):
                visitor = socket.socket()
                visitors[visitor.fileno()] = visitor
                visitor.setblocking(False)
                if visitor.connect_ex((LOOPBACK, port)) in (0, errno.EINPROGRESS):
                    poller.register(visitor, select.EPOLLOUT)
                else:
                    samples.failed += 1
            _serve_visitors(poller, visitors, samples, started, count)
        samples.failed = count - len(samples.seconds)
        samples.elapsed = max(samples.seconds, default=HOLD_TIMEOUT)
        yield samples
    finally:
        for visitor in visitors.values():
            visitor.close()


def _serve_visitors(
    poller: select.epoll, visitors: dict[int, socket.socket], samples: Samples, started: float, count: int
) -> None:
    """Send a byte on each connection that comes up, note when it is back, until all are served or failed."""
    deadline = started + HOLD_TIMEOUT
    while len(samples.seconds) + samples.failed < count:
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            return
        for number, events in poller.poll(remaining):
            try:
                if events & select.EPOLLOUT and not events & select.EPOLLERR:
                    visitors[number].send(b"?")
                    poller.modify(number, select.EPOLLIN)
                    continue
                answered = visitors[number].recv(1) == b"?"
            except OSError:
                answered = False
            poller.unregister(number)
            if answered:
                samples.seconds.append(time.perf_counter() - started)
            else:
                samples.failed += 1


class DatagramLoop:
    """Sockets that each send one datagram, wait for its echo, and send the next."""

    def __init__(self, port: int, sockets: int) -> None:
        self.samples = Samples()
        self._sockets: dict[int, socket.socket] = {}
        self._waiting: dict[int, tuple[bytes, float]] = {}  # what was sent last on each socket, and when
        self._sequence = 0
        for _ in range(sockets):
            visitor = socket.socket(type=socket.SOCK_DGRAM)
            visitor.connect((LOOPBACK, port))
            visitor.setblocking(False)
            self._sockets[visitor.fileno()] = visitor

    def run(self, duration: float) -> Samples:
        """Go round for `duration` seconds, then wait for what is still on its way."""
        started = time.perf_counter()
        with select.epoll() as poller:
            for number, visitor in self._sockets.items():
                poller.register(number, select.EPOLLIN)
                self._send(number, visitor)
            self._go_round(poller, started + duration)
        self.samples.elapsed = time.perf_counter() - started
        self.samples.failed += len(self._waiting)
        return self.samples

    def close(self) -> None:
        """Close the sockets."""
        for visitor in self._sockets.values():
            visitor.close()

    def _go_round(self, poller: select.epoll, end: float) -> None:
        next_look = time.perf_counter() + DATAGRAM_TIMEOUT / 4
        while (now := time.perf_counter()) < end:
            for number, _ in poller.poll(DATAGRAM_TIMEOUT / 4):
                self._receive(number)
            if now > next_look:
                self._give_up_old(now)
                next_look = now + DATAGRAM_TIMEOUT / 4
        while self._waiting and (now := time.perf_counter()) < end + DATAGRAM_TIMEOUT:
            for number, _ in poller.poll(end + DATAGRAM_TIMEOUT - now):
                self._receive(number, again=False)

    def _send(self, number: int, visitor: socket.socket) -> None:
        self._sequence += 1
        payload = self._sequence.to_bytes(8, "big").ljust(DATAGRAM_BYTES, b".")
        self._waiting[number] = (payload, time.perf_counter())
        with contextlib.suppress(OSError):  # a refused datagram is a lost one
            visitor.send(payload)

    def _receive(self, number: int, again: bool = True) -> None:
        visitor = self._sockets[number]
        try:
            answer = visitor.recv(2048)
        except OSError:
            return
        payload, sent = self._waiting.get(number, (b"", 0.0))
        if answer != payload:
            return  # late: it was given up before
        self.samples.seconds.append(time.perf_counter() - sent)
        del self._waiting[number]
        if again:
            self._send(number, visitor)

    def _give_up_old(self, now: float) -> None:
        for number, (_, sent) in list(self._waiting.items()):
            if now - sent > DATAGRAM_TIMEOUT:
                self.samples.failed += 1
                self._send(number, self._sockets[number])


def exchange_datagrams(port: int, sockets: int, duration: float) -> Samples:
    """Run a DatagramLoop for `duration` seconds; failures are lost datagrams."""
    loop = DatagramLoop(port, sockets)
    try:
        return loop.run(duration)
    finally:
        loop.close()
