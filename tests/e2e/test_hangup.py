"""SIGHUP has two meanings: a reload, and a terminal that was closed."""

from __future__ import annotations

import signal

import pytest

from tests.support.process import Nodepass
from tests.support.sockets import PATIENCE
from tests.support.terminal import Terminal

URL = "server://127.0.0.1:0/127.0.0.1:0?tls=0"


class WithNohup(Nodepass):
    """A run that is told to outlive its terminal."""

    prefix = ("nohup",)


def test_a_hangup_is_a_reload_while_there_is_a_terminal_and_the_end_once_it_was_closed() -> None:
    with Terminal(URL, env={"LOG_FORMAT": "text"}) as terminal:
        terminal.wait_for("listening")
        terminal.process.send_signal(signal.SIGHUP)
        terminal.wait_for("SIGHUP: reading")
        assert terminal.process.poll() is None
        terminal.hang_up()
        assert terminal.process.wait(PATIENCE) == 0


@pytest.mark.programs
def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    with WithNohup(URL) as server:
        server.wait_for("server.listening")
        server.send(signal.SIGHUP)
        server.send(signal.SIGUSR1)
        server.wait_for("process.bugs")
        assert not server.find("process.reloading")
        assert server.stop() == 0
