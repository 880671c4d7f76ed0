"""The old process's end of a handover: starts the new process, passes what it has, and says when that one begins.

Until then the handover can fail, and this process goes on. `receiver` is the other end; what stops in this process,
and when, is decided by `daemon`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence

import gevent

from nodepass.errors import ClosedError, StartError, reason
from nodepass.handover.channel import MALFORMED, MOST_DESCRIPTORS, OTHER_VERSION, make_pair
from nodepass.handover.program import start_again
from nodepass.net.activation import PassedSocket
from nodepass.tunnel.traffic_file import Counts

BEGIN_WITHIN = 10.0  # seconds for the new process, which could serve, to take what it begins with
ADD_WITHIN = 1.0  # seconds for the new process to take a message about traffic
REAP_EVERY = 0.02  # seconds between two looks at the process that the new one has detached itself from


class Handover:
    """One attempt: `start`, `connect`, `begin`, or `abandon` after any of them. Each raises StartError."""

    def __init__(self) -> None:
        """Raises StartError, too."""
        self.process = 0  # the new one's id, once it is known
        self._started = 0  # that of the process that is started, until the new one has detached itself from it
        with _deadline():
            self._channel, self._its = make_pair()

    def start(
        self,
        sockets: Sequence[PassedSocket],
        locks: Mapping[str, int],
        clients: Sequence[str],
        timeout: float,
    ) -> None:
        """Start the new process, and return when it lacks only its clients' connections, within `timeout` seconds.

        `sockets`: listeners by their role; `locks`: descriptors by path; `clients`: what each tunnel's client calls
        itself, in the order of the URLs.
        """
        try:
            with _deadline(timeout):
                self._started = start_again(self._its.fileno())
                self._its.close()
                self._reap()
                self.process = self._receive("process")
                self._pass_on(sockets, locks)
                self._channel.send({"legacy": {"process": os.getpid(), "clients": list(clients)}})
                self._receive("prepared")
        finally:
            self._its.close()

    def connect(self, peers: Sequence[int], timeout: float) -> None:
        """Have the clients of the new process connect, and return when it could serve, within `timeout` seconds.

        `peers`: how many servers each tunnel's client is connected to, in the order of the URLs.
        """
        with _deadline(timeout):
            self._channel.send({"connect": list(peers)})
            self._receive("ready")

    def begin(self, counts: Mapping[str, Counts]) -> None:
        """Have the new process serve. `counts`: of traffic, by the file that has them."""
        with _deadline(BEGIN_WITHIN):
            for path, count in counts.items():  # each in a message of its own: all would be too large for one
                self._channel.send({"counts": {path: count}})
            self._channel.send({"begin": True})

    def add(self, traffic: Mapping[str, int]) -> None:
        """Tell the new process how many bytes have been moved since it began, by the file that counts them."""
        # It may have ended, or stand still, which must not keep this process from its end: then nothing counts.
        with contextlib.suppress(OSError), gevent.Timeout(ADD_WITHIN, TimeoutError()):
            self._channel.send({"traffic": dict(traffic)})

    def abandon(self) -> None:
        """End the new process; this one goes on."""
        self._channel.close()
        for process in filter(None, (self._started, self.process)):
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        self._reap()

    def _reap(self) -> None:
        """Wait for the end of the process that was started, which is this one's child."""
        while self._started:
            if os.waitpid(self._started, os.WNOHANG) == (0, 0):
                gevent.sleep(REAP_EVERY)
            else:
                self._started = 0

    def _receive(self, key: str) -> int:
        message, _ = self._channel.receive()
        if "failed" in message:
            raise ClosedError(str(message["failed"]))
        if key not in message:
            raise ClosedError(f"it said something else than {key}")
        return int(message[key])

    def _pass_on(self, sockets: Sequence[PassedSocket], locks: Mapping[str, int]) -> None:
        items: list[tuple[dict[str, str], int]] = [({"role": each.name}, each.sock.fileno()) for each in sockets]
        items += [({"lock": path}, descriptor) for path, descriptor in locks.items()]
        for first in range(0, len(items), MOST_DESCRIPTORS):
            several = items[first : first + MOST_DESCRIPTORS]
            self._channel.send({"items": [item for item, _ in several]}, [descriptor for _, descriptor in several])


@contextlib.contextmanager
def _deadline(timeout: float | None = None) -> Iterator[None]:
    """Raise StartError where a step fails or, if a timeout is given, takes longer."""
    try:
        with gevent.Timeout(timeout, TimeoutError(f"not ready within {timeout}s")):
            yield
    except OSError as error:
        raise StartError(f"the new process does not take over: {reason(error)}") from None
    except MALFORMED:
        raise StartError(f"the new process does not take over: {OTHER_VERSION}") from None
