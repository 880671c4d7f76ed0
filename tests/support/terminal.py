"""The program on a terminal of its own: what it draws, keys for it, and another size of the window."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

from tests.support.process import PROGRAM, Environment, scrubbed
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
OPEN_TERMINAL = 'exec "$0" "$@" <"$ITS_TERMINAL" >"$ITS_TERMINAL" 2>&1'
"""The terminal that the leader of a session opens is the one whose Ctrl-C it gets."""

LEAVES = "\x1b[?1049l"
"""What brings the terminal back to what it showed before."""


class Terminal(Closes):
    """One run of the program with a pseudo-terminal as all three of its streams."""

    def __init__(self, *arguments: str, env: Environment | None = None, lines: int = 24, columns: int = 160) -> None:
        self._master, slave = pty.openpty()
        self.resize(lines, columns)
        self.echoes_before = self._echoes()
        try:
            self.process = subprocess.Popen(
                ["sh", "-c", OPEN_TERMINAL, str(PROGRAM), *arguments],
                env={**scrubbed(env), "TERM": "xterm-256color", "ITS_TERMINAL": os.ttyname(slave)},
                start_new_session=True,
            )
        finally:
            self._slave = slave  # kept, so that what was written before the end can still be read
        self.raw = ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        if self._master >= 0:
            self.hang_up()

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self._master)
        self._master = -1

    def resize(self, lines: int, columns: int) -> None:
        """Give the window another size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._master, keys.encode())

    @property
    def is_as_before(self) -> bool:
        """Whether the terminal echoes keys as it did before the program."""
        return self._echoes() == self.echoes_before

    def _echoes(self) -> bool:
        return bool(termios.tcgetattr(self._master)[3] & (termios.ECHO | termios.ICANON))

    def forget(self) -> None:
        """Look only at what is drawn from now on."""
        self._read(0)
        self.raw = ""

    def wait_for(self, pattern: str) -> str:
        """All that was drawn, without colours, once it matches."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            text = _ESCAPES.sub("", self.raw)
            if re.search(pattern, text):
                return text
            self._read(0.1)
        raise AssertionError(f"nothing drawn matches {pattern!r}: {_ESCAPES.sub('', self.raw)[-3000:]}")

    def wait(self) -> int:
        """The exit code, once it has ended and all that it wrote has been read."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        self._read(0)
        return self.process.wait(0)

    def _read(self, seconds: float) -> None:
        with contextlib.suppress(OSError):
            while select.select([self._master], [], [], seconds)[0]:
                self.raw += os.read(self._master, 1 << 16).decode(errors="replace")
                seconds = 0
