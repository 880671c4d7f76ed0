"""The log's reader stands still: a stuck log driver, Ctrl-S on a terminal, a paused pager."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading
from typing import Any

import pytest

from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel

SMALLEST_PIPE = 4096  # bytes
REPORTS = {"debug": 20, "info": 8}  # each is 30 KB or more at debug, with the greenlets, and 1 KB at info


class ReadInTurns(OurServer):
    """A server whose log is read only while the test says so."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._may_read = threading.Event()
        self._may_read.set()
        self._descriptor = -1

    def _read(self, descriptor: int) -> bytes:  # type: ignore[override]
        self._descriptor = descriptor
        self._may_read.wait()
        return super()._read(descriptor)

    def stop_reading(self) -> None:
        """Read one more piece at most, and then nothing."""
        self._may_read.clear()
        fcntl.fcntl(self._descriptor, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)

    def read_again(self) -> None:
        self._may_read.set()

    def kill(self) -> None:
        self.read_again()
        super().kill()


@pytest.mark.parametrize("log", ["debug", pytest.param("info", marks=pytest.mark.programs)])
def test_visitors_are_served_while_the_log_is_not_read(stack: contextlib.ExitStack, log: str) -> None:
    target = stack.enter_context(Target())
    server = stack.enter_context(ReadInTurns(log=log))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, log="info"))
    client.wait_until_connected()
    server.wait_for_client()
    tunnel = Tunnel(server, client, target)
    server.stop_reading()
    for _ in range(REPORTS[log]):
        server.send(signal.SIGUSR1)
        tunnel.assert_works()
    server.read_again()
    if log == "debug":
        assert server.wait_for("log.lost")["lines"] > 0
    assert server.stop() == 0
    assert server.find("process.stopped")
    assert log == "debug" or not server.find("log.lost")


def test_a_stop_does_not_wait_for_the_log_s_reader(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(ReadInTurns())
    server.stop_reading()
    for _ in range(REPORTS["info"]):
        server.send(signal.SIGUSR1)
    server.send(signal.SIGTERM)
    assert server.process.wait(20) == 0
