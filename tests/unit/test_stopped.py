"""A direction whose sink is full does not read its source, and yet finds out that the source is gone."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket
from gevent.socket import SO_RCVBUF, SO_SNDBUF, SOL_SOCKET

import nodepass.net.pump
import nodepass.net.relay
from nodepass.net.pipes import CAPACITY, pipes
from nodepass.net.pump import BUSY_READ
from nodepass.net.relay import Traffic, relay
from nodepass.net.sockets import is_gone, wait_delivered
from nodepass.net.stopped import PATIENCE, stopped_directions
from nodepass.net.stream import TCPStream
from nodepass.stats import Stats
from tests.unit.controls import until
from tests.unit.streams import receive_all, reset, tcp_pair


class Session:
    """A session with a visitor and a target."""

    def __init__(self, near: TCPStream, visitor: socket.socket, far: TCPStream, target: socket.socket) -> None:
        self.near = near
        self.visitor = visitor
        self.target = target
        self.running: gevent.Greenlet[..., Traffic] = gevent.Greenlet.spawn(relay, near, far, Stats())

    def stop(self, writer: socket.socket, directions: int = 1) -> int:
        """Send until nothing more is taken, so that as many directions are stopped; the number of bytes."""
        writer.setblocking(False)
        sent = refused = 0
        with gevent.Timeout(10):
            while len(stopped_directions) < directions or refused < 20:
                try:
                    sent += writer.send(bytes(65536))
                    refused = 0
                except BlockingIOError:
                    refused += 1
                    gevent.sleep(0.002)
        writer.setblocking(True)
        return sent


@pytest.fixture
def buffers() -> int:
    """Bytes of each socket's buffers: few are full soon."""
    return 32768


@pytest.fixture
def session(buffers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(stopped_directions.timer, "period", 0.01)
    monkeypatch.setattr(stopped_directions, "patience", 0.05)
    monkeypatch.setattr(nodepass.net.relay, "DELIVERY_GRACE", 0.01)
    if buffers > BUSY_READ:  # so that a pipe keeps bytes
        monkeypatch.setattr(nodepass.net.pump, "room_to_send", lambda _sock: CAPACITY)
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        for sock, option in itertools.product((near.sock, visitor, far.sock, target), (SO_SNDBUF, SO_RCVBUF)):
            sock.setsockopt(SOL_SOCKET, option, buffers)
        session = Session(near, visitor, far, target)
        yield session
        session.running.kill()
    assert not len(stopped_directions)
    until(lambda: not stopped_directions.timer.active)


@pytest.mark.parametrize("buffers", [32768, 1 << 20], ids=["copied", "spliced"])
def test_a_reset_ends_a_session_whose_other_end_reads_nothing(session: Session, buffers: int) -> None:
    session.stop(session.visitor)
    assert (pipes.open > len(pipes._idle)) == (buffers > BUSY_READ)
    reset(session.visitor)
    traffic = session.running.get(timeout=10)
    assert (traffic.outcome, traffic.failure) == ("reset", "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        receive_all(session.target)


def test_a_reset_behind_the_end_of_a_stopped_stream_ends_its_session(session: Session) -> None:
    session.stop(session.visitor)
    session.visitor.shutdown(socket.SHUT_WR)
    reset(session.visitor)
    assert session.running.get(timeout=10).failure == "Connection reset by peer"


def test_a_reset_that_a_write_reports_first_ends_a_session_whose_other_end_reads_nothing(session: Session) -> None:
    session.stop(session.visitor)
    reset(session.visitor)
    with contextlib.suppress(OSError):  # the session may be over already
        session.target.sendall(b"an answer")
    assert session.running.get(timeout=10).outcome == "reset"


def test_a_reset_ends_a_session_that_is_stopped_both_ways(session: Session) -> None:
    session.stop(session.visitor)
    session.stop(session.target, 2)
    reset(session.visitor)
    assert session.running.get(timeout=10).outcome == "reset"


def test_a_reader_that_reads_on_gets_what_was_sent_before_the_reset(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopped_directions, "patience", PATIENCE)
    session.stop(session.visitor)
    waiting = len(session.near.sock.recv(1 << 24, socket.MSG_PEEK))
    reset(session.visitor)
    until(lambda: stopped_directions._gone)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while part := session.target.recv(65536):
            received += len(part)
    assert part  # it was a reset that ended the loop
    traffic = session.running.get(timeout=10)
    assert received == traffic.up > waiting > 0
    assert traffic.outcome == "reset"


def test_a_slow_reader_gets_all_of_a_connection_that_was_closed_in_good_order(session: Session) -> None:
    sent = 0
    while not stopped_directions:
        sent += session.visitor.send(bytes(4096))
        gevent.sleep(0.001)  # so that the relay's buffer in the kernel stays as good as empty
    wait_delivered(session.visitor, 10)  # the end follows all of it, into the kernel's buffer of the relay
    session.target.shutdown(socket.SHUT_WR)
    assert session.visitor.recv(1) == b""
    session.visitor.close()
    until(lambda: is_gone(session.near.sock))
    gevent.sleep(5 * stopped_directions.patience)  # in which nothing must happen
    received = len(receive_all(session.target))
    assert received == sent
    assert session.running.get(timeout=10).outcome == "completed"
