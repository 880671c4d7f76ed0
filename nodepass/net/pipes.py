"""Pipes for `splice`: bytes go from one socket to another and never enter this process.

A pump borrows a pipe for as long as bytes are in it, which is one call by the event loop unless its sink is full. So
few pipes serve many streams, and an idle stream has none. Pipes that have not been borrowed for a while are closed.
Without a pipe, at the limit or without file descriptors, a pump copies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from dataclasses import dataclass

from nodepass.tasks import IdleTimer

CAPACITY = 1 << 20  # bytes; the kernel may grant less, see `Pipes._open`
AT_MOST = 64  # pipes open at once, idle or not: each may hold CAPACITY of kernel memory
IDLE_SECONDS = 2.0  # without a borrower, after which the pipes are closed

_FLAGS = 3  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK, in the standard library from Python 3.12 on


@dataclass(eq=False)
class Pipe:
    """Two file descriptors, and the number of bytes between them."""

    outlet: int
    inlet: int
    held: int = 0

    def fill_from(self, fileno: int, size: int) -> int:
        """Take in at most `size` of the bytes that a socket has now; 0 at its end.

        Raises OSError, BlockingIOError where it has none.
        """
        self.held = os.splice(fileno, self.inlet, size, flags=_FLAGS)
        return self.held

    def drain_to(self, fileno: int) -> bool:
        """Pass on what the socket takes of the bytes held; whether it took all. Raises OSError."""
        try:
            while self.held:
                self.held -= os.splice(self.outlet, fileno, self.held, flags=_FLAGS)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close both ends; bytes held are lost."""
        os.close(self.outlet)
        os.close(self.inlet)


class Pipes:
    """The pipes of the process."""

    def __init__(self) -> None:
        self.open = 0
        self._idle: list[Pipe] = []
        self._used = False  # since the last look of the timer
        self._timer = IdleTimer(IDLE_SECONDS, self._close_unused)

    def borrow(self) -> Pipe | None:
        """An empty pipe, which the caller gives back; None at the limit."""
        self._used = True
        if self._idle:
            return self._idle.pop()
        return self._open() if self.open < AT_MOST else None

    def give_back(self, pipe: Pipe) -> None:
        """End a loan. A pipe that still holds bytes is closed."""
        if pipe.held:
            self._close(pipe)
            return
        self._idle.append(pipe)
        self._timer.start()

    def _open(self) -> Pipe | None:
        try:
            outlet, inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no file descriptors are left; copying needs none
            return None
        # Past the user's share of pipe memory (fs.pipe-user-pages-soft) the pipe stays at 64 KiB, and works.
        with contextlib.suppress(OSError):
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, CAPACITY)
        self.open += 1
        return Pipe(outlet, inlet)

    def _close(self, pipe: Pipe) -> None:
        pipe.close()
        self.open -= 1

    def _close_unused(self) -> bool:
        """Close the idle pipes unless one was used since the last look; whether one was."""
        used, self._used = self._used, False
        while self._idle and not used:
            self._close(self._idle.pop())
        return used


pipes = Pipes()
