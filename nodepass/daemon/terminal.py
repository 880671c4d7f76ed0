"""The terminal that the process was started from: when it is closed, the kernel or the shell sends SIGHUP.

The same signal asks for a reload. A closed terminal is told by its absence: the kernel takes it from the process before
it signals. `daemon` asks at each SIGHUP.
"""

from __future__ import annotations

import errno
import os

_NONE = (errno.ENXIO, errno.EIO, errno.ENOENT)  # there is none, it hangs up just now, there is no /dev


class Terminal:
    """The controlling terminal of this process, if it had one when this was made."""

    def __init__(self) -> None:
        self._is_expected = _is_there()

    def has_gone(self) -> bool:
        """Whether it was closed since the last call."""
        if not self._is_expected or _is_there():
            return False
        self._is_expected = False
        return True


def _is_there() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError as error:
        return error.errno not in _NONE  # for lack of descriptors, for example: then it stays as it was
    return True
