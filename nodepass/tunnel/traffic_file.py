"""The state file of TRAFFIC_LIMIT: the bytes of one tunnel by day or month, kept over restarts.

It is JSON and one file per tunnel name, in the directory that STATE_DIRECTORY names. A new one is written beside it and
renamed, so that after a crash there is the old one or the new one. A file that cannot be read, or is of another tunnel,
is set aside: counting begins at 0, because a tunnel that does not start would help less. A lock, held for as long as
the process runs, keeps two processes from overwriting each other's count; it can be passed to a process that takes
over. `traffic` counts and says when to write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping

from nodepass.errors import ConfigError, StartError, reason
from nodepass.log import Log

LARGEST = 64 * 1024  # bytes
MODE = 0o600
# Why there may be no lock: then nothing can be written either, and the count goes on in memory.
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Counts = dict[str, int]  # bytes, by day (2026-03-01) or month (2026-03)
NO_LOCKS: Mapping[str, int] = {}


class TrafficFile:
    """The file of one tunnel."""

    def __init__(self, directory: str, tunnel: str, log: Log, locks: Mapping[str, int] = NO_LOCKS) -> None:
        """`tunnel`: its role and name, which is the file's, too. Raises ConfigError, and StartError where it is locked.

        `locks`: those that the process before has passed, by the path of the file that they are for. What cannot be
        used of the file is logged.
        """
        self._tunnel = tunnel
        self._log = log
        self.path = os.path.join(directory, f"traffic-{tunnel}.json")
        self.lock = locks.get(self.path)
        if self.lock is None:
            self.lock = self._take_lock(os.path.join(directory, f"traffic-{tunnel}.lock"))

    def close(self) -> None:
        """Release the lock, as the end of the process does."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def load(self) -> Counts:
        """What was counted before."""
        try:
            with open(self.path, "rb") as file:
                content = file.read(LARGEST + 1)
            return self._parse(content)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._set_aside(reason(error))
        except ValueError as error:
            self._set_aside(str(error))
        return {}

    def save(self, counts: Mapping[str, int]) -> OSError | None:
        """Replace the file, or return why not. It may run in a thread, where gevent prints exceptions."""
        text = json.dumps({"tunnel": self._tunnel, "bytes": counts}, indent=1) + "\n"
        new = f"{self.path}.new"
        try:
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
            try:
                _write(descriptor, text.encode())
                os.fsync(descriptor)  # else the new name could have no content after a power failure
            finally:
                os.close(descriptor)
            os.rename(new, self.path)
        except OSError as error:
            return error
        return None

    def _take_lock(self, path: str) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, MODE)
        except OSError as error:
            if error.errno in _UNWRITABLE:
                words = "cannot lock %(file)s: %(error)s; no other process may count there"
                self._log.warning("traffic.unlocked", words, file=path, error=reason(error))
                return None
            allowed = "allowed: a directory in which this user may write"
            raise ConfigError(f"TRAFFIC_LIMIT: cannot write {path}: {reason(error)}; {allowed}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(f"TRAFFIC_LIMIT: cannot lock {path}: {reason(error)}") from None
            words = f"TRAFFIC_LIMIT: the traffic of {self._tunnel} is counted already in {path}, by another tunnel"
            raise StartError(
                f"{words} of this name or another process; allowed: another name= or STATE_DIRECTORY"
            ) from None
        return descriptor

    def _parse(self, content: bytes) -> Counts:
        """The counts in a file. Raises ValueError."""
        if len(content) > LARGEST:
            raise ValueError(f"longer than {LARGEST} bytes")
        try:
            state = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None
        if not isinstance(state, dict) or not isinstance(state.get("bytes"), dict):
            raise ValueError("not a state file of nodepass")
        if state.get("tunnel") != self._tunnel:
            raise ValueError(f"of another tunnel, {str(state.get('tunnel'))[:100]!r}")
        counts: Counts = state["bytes"]
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts.values()):
            raise ValueError("not numbers of bytes")
        return counts

    def _set_aside(self, why: str) -> None:
        aside = f"{self.path}.unusable"
        words = "cannot use %(file)s: %(error)s; the traffic is counted from 0, the file is kept as %(aside)s"
        with contextlib.suppress(OSError):
            os.rename(self.path, aside)
        if os.path.lexists(self.path):
            words = "cannot use %(file)s, nor rename it to %(aside)s: %(error)s; the traffic is counted from 0"
        self._log.error("traffic.unusable", words, file=self.path, aside=aside, error=why)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
