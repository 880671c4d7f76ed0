"""Unix sockets to listen on: a stale file of a former run is replaced, a living one is respected, ours is removed."""

from __future__ import annotations

import contextlib
import os
import socket
import stat

from nodepass.errors import ListenError, reason

MODE = 0o660  # the user and the group of the process may connect
BACKLOG = 128


class UnixListener:
    """A listening socket at a path; `close` removes the file, unless somebody has put another there."""

    def __init__(self, path: str, what: str) -> None:
        """Raises ListenError."""
        self._path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(path)
            _bind(self.sock, path)
            self._file = _identity(path)
            self.sock.listen(BACKLOG)
        except OSError as error:
            self.sock.close()
            raise ListenError(f"cannot listen on {what} unix:{path}: {reason(error)}", error.errno) from None

    def close(self) -> None:
        """Stop listening."""
        self.sock.close()
        with contextlib.suppress(OSError):  # it is gone already
            if _identity(self._path) == self._file:
                os.unlink(self._path)


def _bind(sock: socket.socket, path: str) -> None:
    before = os.umask(0o777 & ~MODE)  # no moment with another mode; no other greenlet runs meanwhile
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _remove_stale(path: str) -> None:
    """Raises OSError where somebody listens there, or where the file is none of ours to remove."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError("there is a file that is no socket")
    if _answers(path):
        raise OSError("another process listens there")
    os.unlink(path)


def is_living(path: str) -> bool:
    """Whether somebody listens there, as far as this process may know."""
    try:
        return _answers(path)
    except OSError:
        return False


def _answers(path: str) -> bool:
    """Raises OSError where there is nothing to connect to, or no permission."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
