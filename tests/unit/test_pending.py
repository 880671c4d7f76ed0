"""Newcomers: when what finds out who they are begins, and what they cost before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from nodepass.log import Log
from nodepass.net.sockets import Socket, as_plain
from nodepass.server.pending import QUIET, PendingConnections
from nodepass.stats import Stats
from tests.unit.streams import tcp_pair


class Visit:
    """A newcomer, and when its work has begun."""

    def __init__(self, stack: ExitStack) -> None:
        stream, self.peer = stack.enter_context(tcp_pair())
        assert isinstance(stream.sock, socket.socket)
        self.sock = as_plain(stream.sock)
        stack.callback(self.sock.close)
        self.begun = Event()

    def work(self, sock: Socket) -> None:
        assert sock is self.sock
        self.begun.set()
        gevent.sleep(60)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def lobby(stack: ExitStack) -> PendingConnections:
    lobby = PendingConnections("a port", Log("test"), Stats())
    stack.callback(lobby.kill)
    return lobby


def test_who_has_to_speak_first_costs_no_greenlet_before(stack: ExitStack, lobby: PendingConnections) -> None:
    visits = [Visit(stack) for _ in range(10)]
    for visit in visits:
        lobby.receive(visit.sock, visit.work, speaks_first=True)
    gevent.sleep(0)
    assert len(lobby) == 10
    assert len(lobby._tasks) == 0
    visits[3].peer.sendall(b"x")
    assert visits[3].begun.wait(10)
    assert len(lobby._tasks) == 1
    assert [visit.begun.is_set() for visit in visits].count(True) == 1


def test_silence_has_an_end(stack: ExitStack, lobby: PendingConnections) -> None:
    """The rest of its time is what is left since it came in."""
    visit = Visit(stack)
    lobby.receive(visit.sock, visit.work, speaks_first=True)
    assert visit.begun.wait(10)
    assert lobby.left(visit.sock, 60) <= 60 - QUIET
    assert lobby.left(visit.sock, QUIET / 2) == pytest.approx(0, abs=0.01)


def test_who_need_not_speak_first_is_spoken_to_at_once(stack: ExitStack, lobby: PendingConnections) -> None:
    visit = Visit(stack)
    lobby.receive(visit.sock, visit.work)
    gevent.sleep(0)
    assert visit.begun.is_set()


def test_the_silent_are_closed_when_all_end(stack: ExitStack, lobby: PendingConnections) -> None:
    visit = Visit(stack)
    lobby.receive(visit.sock, visit.work, speaks_first=True)
    lobby.kill()
    assert len(lobby) == 0
    assert visit.sock.fileno() < 0
    assert visit.peer.recv(1) == b""
