"""Listening on a Unix socket: its path, its mode, and the files that earlier runs left behind.

A stale socket is replaced; a socket with a listener, and any other file, is an error. `close` removes the file, unless
another process has put its own there. The metrics endpoint uses this, and `check` tries it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from nodepass.errors import ListenError, reason

MODE = 0o660  # the user and the group of the process may connect
BACKLOG = 128  # connections
PROBE_TIMEOUT = 1.0  # seconds for the listener of an existing socket to answer


class UnixListener:
    """A listening socket at a path."""

    def __init__(self, path: str, what: str) -> None:
        """Listen at `path`; `what` names it in the error. Raises ListenError."""
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
        """Stop listening, and remove the file."""
        self.sock.close()
        with contextlib.suppress(OSError):  # it is gone
            if _identity(self._path) == self._file:
                os.unlink(self._path)


def _bind(sock: socket.socket, path: str) -> None:
    before = os.umask(0o777 & ~MODE)  # never another mode, not even for a moment; no other greenlet runs meanwhile
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def _remove_stale(path: str) -> None:
    """Remove a socket without a listener. Raises OSError where it has one, or where the file is not a socket."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise OSError(errno.ENOTSOCK, "the file exists and is not a socket")
    if _answers(path):
        raise OSError(errno.EADDRINUSE, "another process listens there")
    os.unlink(path)


def is_living(path: str) -> bool:
    """Whether a process listens there, as far as this one is permitted to connect."""
    try:
        return _answers(path)
    except OSError:
        return False


def _answers(path: str) -> bool:
    """Whether a process listens there. Raises OSError where there is no socket, or no permission."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
