"""systemd, played by a test: hears what the program says, and passes it sockets."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.process import PROGRAM, Environment, Nodepass
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE

PASS = """\
import os, sys
names, descriptors, *command = sys.argv[1:]
passed = [os.dup(int(each)) for each in descriptors.split(",")]
for number, descriptor in enumerate(passed, 3):
    os.dup2(descriptor, number)
    os.set_inheritable(number, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(passed)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""
"""A program that becomes another one, which finds its sockets where systemd puts them."""


NamedSocket = tuple[str, socket.socket]


class NotifySocket(Closes):
    """Where notifications go: below a directory, or with an abstract name."""

    def __init__(self, directory: Path | None = None) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(directory / "notify") if directory else f"\0nodepass-{os.getpid()}-{time.monotonic_ns()}")
        name = self._sock.getsockname()
        self.address = name if isinstance(name, str) else "@" + name[1:].decode()
        self.heard: list[str] = []
        self._ahead: list[str] = []

    def close(self) -> None:
        self._sock.close()

    def wait_for(self, beginning: str, timeout: float = PATIENCE) -> str:
        """The next assignment that begins so; AssertionError if there is none in time."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            self._ahead = self._ahead or self._hear(left)
            while self._ahead:
                self.heard.append(self._ahead.pop(0))
                if self.heard[-1].startswith(beginning):
                    return self.heard[-1]
        raise AssertionError(f"no {beginning!r} within {timeout:g} s; heard {self.heard}")

    def forget(self) -> None:
        """Leave out what has been said so far."""
        while self._hear(0):
            pass
        self.heard.clear()
        self._ahead.clear()

    def _hear(self, timeout: float) -> list[str]:
        self._sock.settimeout(timeout)
        try:
            return self._sock.recv(1 << 16).decode().splitlines()
        except (TimeoutError, BlockingIOError):
            return []


class Activated(Nodepass):
    """Our program, started with sockets by their names; entering does not wait for anything."""

    def __init__(self, sockets: Sequence[NamedSocket], *urls: str, env: Environment | None = None) -> None:
        super().__init__(*urls, env=env)
        self.descriptors = tuple(sock.fileno() for _, sock in sockets)
        self._names = ":".join(name for name, _ in sockets)

    def command(self) -> list[str]:
        numbers = ",".join(map(str, self.descriptors))
        return [sys.executable, "-c", PASS, self._names, numbers, str(PROGRAM), *self.arguments]
