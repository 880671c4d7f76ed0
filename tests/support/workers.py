"""The threads of a peer that a test started, and how all of them are ended."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from tests.support.sockets import abort


class WorkerPool:
    """The threads of one peer, and the sockets that must be shut for them to end."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self.is_closed = False

    def spawn(self, work: Callable[[], None]) -> None:
        """Run it in a thread of its own; an error on a socket ends the thread and nothing else."""

        def guarded() -> None:
            with contextlib.suppress(OSError):
                work()

        thread = threading.Thread(target=guarded, daemon=True)
        with self._lock:
            self._threads = [known for known in self._threads if known.is_alive()]
            self._threads.append(thread)
            thread.start()

    def own(self, sock: socket.socket) -> socket.socket:
        """Shut the socket down when the peer closes, at the latest."""
        with self._lock:
            self._sockets = [known for known in self._sockets if known.fileno() >= 0]
            self._sockets.append(sock)
        if self.is_closed:
            abort(sock)
        return sock

    def close(self) -> None:
        """Shut every socket down and wait for every thread."""
        self.is_closed = True
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with self._lock:
                sockets, threads = self._sockets, [t for t in self._threads if t.is_alive()]
                self._sockets = []
            for sock in sockets:
                abort(sock)
            if not threads:
                return
            threads[0].join(0.1)
        raise AssertionError(f"threads of a v1 peer never ended: {self._threads}")
