"""Where the log goes: stderr, which must never stop the process, however slowly it is read.

A pipe or terminal that is not read makes a plain write wait, and with it every tunnel. Here a write takes what stderr
accepts at once. The rest is queued until the event loop finds room. When the queue is full, lines are lost: they are
counted in `Stats`, and the log says how many once there is room again. Lines keep their order. That is a `LineQueue`,
which `access_output` has, too.

`cli` puts a LogOutput in place of `sys.stderr`, so that tracebacks of the interpreter and the reason of a failed start
follow the lines that are queued, and cannot make the process wait either. `finish` runs when the interpreter exits.

Only regular files are written without this care: no system call tells that a disk is slow.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import stat
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from socket import MSG_DONTWAIT
from typing import Any, TextIO, cast

from gevent import get_hub
from gevent.monkey import get_original

from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer

QUEUED = 256 << 10  # bytes that wait for room at most: some 2,000 lines, beside the 64 KiB of a pipe
BATCH = select.PIPE_BUF  # bytes that are written together at most: a pipe takes as many without cutting a line
RETRY = 1.0  # seconds between two attempts after an error, such as a full disk
LAST_CHANCE = 1.0  # seconds at the exit for the lines that wait

WRITE = 2  # libev's event

_poll = get_original("select", "poll")
_socket = get_original("socket", "socket")

# Returns how many bytes were taken. Raises OSError: BlockingIOError where there is no room.
Write = Callable[[bytes], int]


class LineQueue:
    """Lines on their way to a descriptor. `put` never waits; beyond QUEUED bytes, lines are lost.

    `on_lost` is called with the number of lines that are missing at this place, once there is room again.
    """

    def __init__(
        self, descriptor: int, write: Write, on_lost: Callable[[int], object], is_batching: bool = False
    ) -> None:
        """`is_batching`: the lines of one turn of the event loop are written together, at its end."""
        self._descriptor = descriptor
        self._is_batching = is_batching
        self._batch: Any = None  # gevent's callback at the end of this turn, which has no type
        self._write = write
        self._on_lost = on_lost
        self._lines: deque[bytes] = deque()  # with `is_batching` each is as many as are written together
        self._size = 0  # bytes of them
        self._lost = 0  # lines since `on_lost` was last called
        self._broken = False  # the last write failed, and not for lack of room
        self._room: Any = get_hub().loop.io(descriptor, WRITE)  # gevent's, which has no type
        self._timer = IdleTimer(RETRY, self._retry)

    def put(self, line: bytes) -> bool:
        """Write or queue one line; False where it is lost.

        Once one is lost, all are until half of the queue is written: there are few gaps, and each is reported.
        """
        if self._is_batching and self._size + len(line) > BATCH:
            self.flush()
        is_taken = not self._lost and self._size < QUEUED
        if is_taken:
            self._append(line)
        else:
            self._lost += 1
        if not self._is_batching:
            self._go_on()
        elif self._batch is None:
            self._batch = get_hub().loop.run_callback(self.flush)
        return is_taken

    def flush(self) -> None:
        """Write what is taken now, without waiting for the end of the turn."""
        if self._batch is not None:
            self._batch.stop()
            self._batch = None
        self._go_on()

    def move(self, descriptor: int) -> None:
        """Go on at another descriptor, to which `write` writes from now on."""
        self._room.close()
        self._descriptor, self._room = descriptor, get_hub().loop.io(descriptor, WRITE)
        self._go_on()

    def finish(self) -> None:
        """Write what waits, for at most LAST_CHANCE seconds. What is not taken by then is given up."""
        deadline = time.monotonic() + LAST_CHANCE
        room = _poll()
        room.register(self._descriptor, select.POLLOUT)
        while self._drain() and not self._broken and (left := deadline - time.monotonic()) > 0:
            room.poll(1000 * left)

    def close(self) -> None:
        """Write what is taken now, and nothing more; the descriptor itself stays open."""
        self.flush()
        self._timer.stop()
        self._room.close()

    def _append(self, line: bytes) -> None:
        self._size += len(line)
        if self._is_batching and self._lines and len(self._lines[-1]) + len(line) <= BATCH:
            self._lines[-1] += line
        else:
            self._lines.append(line)

    def _go_on(self) -> None:
        """Write what is taken now. The rest follows when there is room, or after RETRY where there is an error."""
        if not self._drain():
            self._room.stop()
        elif self._broken:
            self._room.stop()
            self._timer.start()
        elif not self._room.active:
            self._room.start(self._go_on)

    def _retry(self) -> bool:
        """The timer's: whether to try again after RETRY."""
        self._go_on()
        return self._broken

    def _drain(self) -> bool:
        """Write what is taken now; whether lines are still waiting."""
        self._broken = False
        try:
            while self._lines:
                line = self._lines[0]
                taken = self._write(line)
                if not taken:
                    break
                self._size -= taken
                if taken == len(line):
                    self._lines.popleft()
                else:
                    self._lines[0] = line[taken:]
        except OSError as error:
            self._broken = not isinstance(error, BlockingIOError)
        if self._lost and self._size <= QUEUED // 2:
            lost, self._lost = self._lost, 0
            self._on_lost(lost)
        return bool(self._lines)


class LogOutput(io.TextIOBase):
    """A text stream on a descriptor; `write` never waits."""

    def __init__(self, descriptor: int, encoding: str, stats: Stats) -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._stats = stats
        self._opened = ExitStack()
        self.lines = LineQueue(descriptor, open_without_waiting(descriptor, self._opened), _report_lost)

    @classmethod
    def replace_stderr(cls, stats: Stats) -> None:
        """Put one in place of sys.stderr until the process ends, unless that is no file."""
        try:
            descriptor = sys.stderr.fileno()
        except (AttributeError, OSError):  # it was closed when the process started, or is a program's own object
            return
        output = cls(descriptor, sys.stderr.encoding, stats)
        sys.stderr = cast(TextIO, output)
        atexit.register(output.lines.finish)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Write or queue one line, or count it as lost."""
        if text and not self.lines.put(text.encode(self._encoding, "backslashreplace")):
            self._stats.log_lines_lost += 1
        return len(text)

    def close(self) -> None:
        """Write nothing more; the descriptor itself stays open."""
        self.lines.close()
        self._opened.close()
        super().close()


def _report_lost(lost: int) -> None:
    words = "lost %(lines)d lines of the log: stderr was not read, or could not be written"
    Log("nodepass").error("log.lost", words, lines=lost)


def open_without_waiting(descriptor: int, opened: ExitStack) -> Write:
    """How to write to a descriptor without waiting; `opened` closes what this takes.

    O_NONBLOCK belongs to the open file description, which other processes share, so it must not be set there. A pipe or
    a terminal is opened once more. A socket cannot be, but each send can say that it must not wait.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        sock = opened.enter_context(_socket(fileno=os.dup(descriptor)))
        return lambda data: int(sock.send(data, MSG_DONTWAIT))
    if stat.S_ISREG(mode):
        return partial(os.write, descriptor)
    try:
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # it belongs to another user, or is a pipe without a reader
        return partial(_write_where_room, descriptor)
    opened.callback(os.close, own)
    return partial(os.write, own)


def _write_where_room(descriptor: int, data: bytes) -> int:
    """Write what fits at once into what may be a blocking pipe: where poll finds room, it is PIPE_BUF bytes or more.

    Another process that writes to the same pipe may take that room in between; then this waits for the reader.
    """
    room = _poll()
    room.register(descriptor, select.POLLOUT)
    if not room.poll(0):
        raise BlockingIOError
    return os.write(descriptor, data[: select.PIPE_BUF])
