"""The fork server as a test has it: started once in each worker of pytest, and asked for processes.

`process` decides which runs of the program are forked; `fork_server` is what runs on the other side.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from select import POLLIN, poll
from typing import Protocol

from tests.support.fork_server import NUMBER, Request

REPOSITORY = Path(__file__).resolve().parents[2]


class Started(Protocol):
    """A process that was started: as much of a `subprocess.Popen` as the tests use."""

    @property
    def pid(self) -> int:
        """The process id."""

    def poll(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raises subprocess.TimeoutExpired."""

    def send_signal(self, sig: int, /) -> None:
        """Send a POSIX signal, if the process still runs."""

    def kill(self) -> None:
        """End it at once, if it still runs."""


class ForkServer:
    """A fork server, which ends with this process or when it is closed."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                env={**environment, "PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1"},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int]
    ) -> ForkedProcess:
        """Start `main` of the module in a process of its own; `streams`: of standard output and error."""
        request: Request = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "limit": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        reading, writing = os.pipe()
        try:
            with self._lock:
                socket.send_fds(self._control, [json.dumps(request).encode()], [*streams, writing])
        finally:
            os.close(writing)
        return ForkedProcess(reading)

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait()


class ForkedProcess:
    """A process that a fork server started; it says at the other end of the pipe what became of it."""

    def __init__(self, pipe: int) -> None:
        self._lock = threading.Lock()
        self._pipe = pipe
        self._status: int | None = None
        self.pid = self._receive()

    def __del__(self) -> None:
        if self._status is None:
            os.close(self._pipe)

    def _receive(self) -> int:
        data = os.read(self._pipe, NUMBER.size)
        if not data:
            os.close(self._pipe)
            self._status = -signal.SIGKILL
            raise ChildProcessError("the fork server has ended")
        (number,) = NUMBER.unpack(data)
        return int(number)

    def poll(self) -> int | None:
        """The exit status, or None."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        with self._lock:
            if self._status is not None:
                return self._status
            ended = poll()
            ended.register(self._pipe, POLLIN)
            if not ended.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("nodepass", timeout or 0)
            self._status = self._receive()
            os.close(self._pipe)
            return self._status

    def send_signal(self, sig: int, /) -> None:
        """Send a POSIX signal."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)
