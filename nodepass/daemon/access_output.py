"""Where access logs go: files, Unix datagram sockets and standard output, each opened once for all tunnels.

Nothing here waits, as in `log_output`, whose queue each place has: what a place does not take is queued, and beyond the
queue lines are lost, counted in `Stats` and reported in the log. The lines of one turn of the event loop are written
together; only to a datagram socket each goes alone, at once. A file is opened again at SIGHUP, so that it can be
rotated. A datagram socket is connected again once its reader is back. What a line says is the business of
`visitors.access_log`. `cli` makes the one `AccessOutputs`; `daemon` gives tunnels their writers, and reopens it.
`check` asks `find_trouble`.
"""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from gevent.monkey import get_original

from nodepass.config.kinds import AccessPlace
from nodepass.daemon.log_output import LineQueue, open_without_waiting
from nodepass.errors import ConfigError, reason
from nodepass.log import Limit, Log, journald_reads
from nodepass.stats import Stats

MODE = 0o640  # of a new file: its group may read it
REPEAT = 60.0  # seconds between two log lines about a place that cannot be written to
PRIORITY = "<6>"  # info, for journald

_socket = get_original("socket", "socket")
_log = Log("nodepass")


class AccessOutputs:
    """The places of all tunnels."""

    def __init__(self, stats: Stats, environ: Mapping[str, str]) -> None:
        """`environ`: says whether journald reads standard output."""
        self._stats = stats
        self._environ = environ
        self._outputs: dict[AccessPlace, _Output] = {}

    def writer(self, place: AccessPlace | None) -> Callable[[str], object] | None:
        """What writes a line to a place, which is opened now; None without one. Raises ConfigError."""
        if place is None:
            return None
        if place not in self._outputs:
            try:
                self._outputs[place] = output = self._open(place)
            except OSError as error:
                allowed = "allowed: off, or what this user may write to"
                raise ConfigError(f"ACCESS_LOG={place}: cannot be opened: {reason(error)}; {allowed}") from None
            atexit.register(output.finish)
        return self._outputs[place].write

    def reopen(self) -> None:
        """Open the files again."""
        for output in self._outputs.values():
            output.reopen()

    def close(self) -> None:
        """Write nothing more."""
        for output in self._outputs.values():
            atexit.unregister(output.finish)
            output.close()

    def _open(self, place: AccessPlace) -> _Output:
        if place.is_socket:
            return _DatagramOutput(place, self._stats)
        return _FileOutput(place, self._stats) if place.path else _StandardOutput(place, self._stats, self._environ)


class _Output:
    """One place and its queue; a kind of place has its own `_send`."""

    batches = True  # whether it takes several lines in one write

    def __init__(self, place: AccessPlace, stats: Stats, descriptor: int) -> None:
        self._place = place
        self._stats = stats
        self._descriptor = descriptor
        self._queue = LineQueue(descriptor, self._try_to_send, self._report_lost, self.batches)
        self.finish = self._queue.finish

    def write(self, line: str) -> None:
        """Write or queue a line, or count it as lost."""
        if not self._queue.put(f"{line}\n".encode()):
            self._stats.access_lines_lost += 1

    def reopen(self) -> None:
        """Follow a rotation."""

    def close(self) -> None:
        self._queue.close()

    def _send(self, data: bytes) -> int:
        raise NotImplementedError

    def _try_to_send(self, data: bytes) -> int:
        """As `log_output.Write`; the log has what fails."""
        try:
            return self._send(data)
        except BlockingIOError:
            raise
        except OSError as error:
            words = "cannot write to the access log %(place)s, lines wait: %(error)s"
            limit = Limit(self._place, seconds=REPEAT, burst=1)
            _log.warning("access.write_failed", words, limit, place=str(self._place), error=reason(error))
            raise

    def _report_lost(self, lost: int) -> None:
        words = "lost %(lines)d lines of the access log %(place)s: it was not read, or could not be written"
        _log.error("access.lost", words, lines=lost, place=str(self._place))


class _FileOutput(_Output):
    """A file, which is appended to."""

    def __init__(self, place: AccessPlace, stats: Stats) -> None:
        super().__init__(place, stats, _open_file(place.path))

    def _send(self, data: bytes) -> int:
        return os.write(self._descriptor, data)

    def reopen(self) -> None:
        try:
            descriptor = _open_file(self._place.path)
        except OSError as error:
            words = "cannot open the access log %(place)s again: %(error)s; lines go to the file that is open"
            _log.error("access.reopen_failed", words, place=str(self._place), error=reason(error))
            return
        self._queue.flush()
        old, self._descriptor = self._descriptor, descriptor
        self._queue.move(descriptor)
        os.close(old)

    def close(self) -> None:
        super().close()
        os.close(self._descriptor)


class _DatagramOutput(_Output):
    """A Unix datagram socket: a line is a datagram. Its reader may come later, go away and come back."""

    batches = False

    def __init__(self, place: AccessPlace, stats: Stats) -> None:
        self._sock = _socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        super().__init__(place, stats, self._sock.fileno())

    def _send(self, data: bytes) -> int:
        try:
            return int(self._sock.send(data, socket.MSG_DONTWAIT))
        except BlockingIOError:
            raise
        except OSError:  # not connected, or to a reader that has gone
            self._sock.connect(self._place.path)
            return int(self._sock.send(data, socket.MSG_DONTWAIT))

    def close(self) -> None:
        super().close()
        self._sock.close()


class _StandardOutput(_Output):
    """Standard output; for journald each line has a priority, because lines without are errors in some units."""

    def __init__(self, place: AccessPlace, stats: Stats, environ: Mapping[str, str]) -> None:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        descriptor = sys.stdout.fileno()
        self._opened = ExitStack()
        self._write = open_without_waiting(descriptor, self._opened)
        self._priority = PRIORITY if journald_reads(sys.stdout, environ) else ""
        super().__init__(place, stats, descriptor)

    def write(self, line: str) -> None:
        super().write(self._priority + line)

    def _send(self, data: bytes) -> int:
        return self._write(data)

    def close(self) -> None:
        super().close()
        self._opened.close()


def find_trouble(place: AccessPlace) -> str:
    """Why this user cannot write to a place now, or "", for `check`.

    Nothing is opened: a new file would belong to this user, and the reader of a FIFO would find its end.
    """
    directory = os.path.dirname(place.path)
    if not place.path:
        return ""
    if not os.path.isdir(directory):
        return f"there is no directory {directory}"
    if os.path.isdir(place.path):
        return "it is a directory"
    if os.path.exists(place.path):
        return "" if os.access(place.path, os.W_OK) else "this user cannot write to it"
    if place.is_socket:
        return "there is no reader"
    return "" if os.access(directory, os.W_OK | os.X_OK) else f"this user cannot make files in {directory}"


def _open_file(path: str) -> int:
    """A descriptor to append to a file, whose mode is MODE where it is new. Raises OSError."""
    before = os.umask(0o777 & ~MODE)  # no other greenlet runs meanwhile
    try:
        # Without waiting, where it is a FIFO or a terminal; a directory is refused.
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, MODE)
    finally:
        os.umask(before)
