"""Unix stream sockets: connecting to one, and listening on a path.

A listener has its path, its mode and owner, and deals with the files that earlier runs left behind. A stale socket is
replaced; a socket with a listener, and any other file, is an error. `close` removes the file, unless another process
has put its own there. The metrics endpoint and a server whose target address is a path listen with this, and `check`
tries it; a client connects to targets.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import socket
import stat
import time

import gevent

from nodepass.config.kinds import Owner
from nodepass.errors import ListenError, reason, with_words
from nodepass.net.sockets import Socket

PROCESS = Owner()
MODE = 0o660  # the user and the group of the process may connect
BACKLOG = 128  # connections
FULL_PAUSE = 0.01  # seconds until a listener whose queue is full is tried again: the kernel has no event for that


def dial_unix(path: str, timeout: float) -> Socket:
    """Connect to the listener at a path, within `timeout` seconds where its queue is full. Raises OSError."""
    deadline = time.monotonic() + timeout
    sock = Socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while error := sock.connect_ex(path):
            if error != errno.EAGAIN:
                raise with_words(OSError(error, ""), f"unix:{path}: {os.strerror(error)}")
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"unix:{path}: no answer within {timeout:.3g}s")
            gevent.sleep(FULL_PAUSE)
    except BaseException:
        sock.close()
        raise
    return sock


class UnixListener:
    """A listening socket at a path."""

    def __init__(
        self,
        path: str,
        what: str,
        mode: int = MODE,
        owner: Owner = PROCESS,
        backlog: int = BACKLOG,
        passed: socket.socket | None = None,
    ) -> None:
        """Listen at `path`, with the listener that was passed for it if there is one. Raises ListenError.

        `what` names it in the error. Where the file of the passed one is gone, nothing could connect to it.
        """
        self._path = path
        self._is_kept = True  # the file is this process's
        self._file = _identity_or_none(path) if passed else None
        if passed and self._file:
            self.sock = passed
            return
        if passed:
            passed.close()
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            user, group = _find_user(owner.user), _find_group(owner.group)
            _remove_stale(path)
            _bind(self.sock, path, mode)
            self._file = _identity(path)
            if (user, group) != (-1, -1):
                self._give_to(user, group)
            self.sock.listen(backlog)  # only now can a process connect
        except OSError as error:
            self.sock.close()
            raise ListenError(f"cannot listen on {what} unix:{path}: {reason(error)}", error.errno) from None

    def _give_to(self, user: int, group: int) -> None:
        """Change the owner of the file. Raises OSError, and leaves no file."""
        try:
            os.chown(self._path, user, group)
        except OSError as error:
            os.unlink(self._path)
            raise with_words(error, f"cannot change its owner: {reason(error)}") from None

    def hand_over(self) -> None:
        """Stop listening: another process does so with the same socket, and has the file."""
        self._is_kept = False
        self.sock.close()

    def close(self) -> None:
        """Stop listening, and remove the file."""
        self.sock.close()
        if self._is_kept and self._file and _identity_or_none(self._path) == self._file:
            with contextlib.suppress(OSError):  # it is gone
                os.unlink(self._path)


def _bind(sock: socket.socket, path: str, mode: int) -> None:
    before = os.umask(0o777 & ~mode)  # never another mode, not even for a moment; no other greenlet runs meanwhile
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
    with contextlib.closing(Socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as probe:
        error = probe.connect_ex(path)
    if error in (0, errno.EAGAIN):  # its queue may be full
        return True
    if error == errno.ECONNREFUSED:
        return False
    raise OSError(error, os.strerror(error))


def _find_user(name: str) -> int:
    """The number of a user, -1 for "". Raises OSError."""
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise OSError(f"there is no user {name!r}") from None


def _find_group(name: str) -> int:
    """The number of a group, -1 for "". Raises OSError."""
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OSError(f"there is no group {name!r}") from None


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _identity_or_none(path: str) -> tuple[int, int] | None:
    try:
        return _identity(path)
    except OSError:
        return None
