"""The relay, on real sockets inside this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket

from nodepass.net.relay import Traffic, relay
from nodepass.net.sockets import wait_delivered
from nodepass.stats import Stats
from tests.unit.streams import receive_all, reset, tcp_pair

Ends = tuple[socket.socket, socket.socket, "gevent.Greenlet[..., Traffic]", Stats]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Visitor, target, the relay between them, and its counters."""
    stats = Stats()
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        running: gevent.Greenlet[..., Traffic] = gevent.Greenlet.spawn(relay, near, far, stats)
        yield visitor, target, running, stats
        running.kill()


def test_each_direction_ends_by_itself(ends: Ends) -> None:
    visitor, target, running, stats = ends
    visitor.sendall(b"question")
    visitor.shutdown(socket.SHUT_WR)
    assert receive_all(target) == b"question"
    target.sendall(b"a longer answer")
    target.close()
    assert receive_all(visitor) == b"a longer answer"
    traffic = running.get(timeout=10)
    assert (traffic.up, traffic.down, traffic.failure) == (8, 15, "")
    assert (stats.bytes_up, stats.bytes_down) == (8, 15)


@pytest.mark.parametrize(("end", "outcome"), [("close", "completed"), ("reset", "reset"), ("kill", "cut")])
def test_a_session_is_counted_by_how_it_ended(ends: Ends, end: str, outcome: str) -> None:
    visitor, target, running, stats = ends
    visitor.sendall(b"?")
    assert target.recv(1) == b"?"
    assert (stats.tcp.begun, stats.tcp.open) == (1, 1)
    if end == "kill":
        running.kill()
    elif end == "reset":
        reset(visitor)
    else:
        visitor.close()
        target.close()
    running.join(10)
    assert stats.tcp.open == 0
    assert {name: count for name, count in stats.tcp.ended.items() if count} == {outcome: 1}


@pytest.mark.parametrize("side", [0, 1])
def test_a_reset_is_passed_on_as_a_reset(ends: Ends, side: int) -> None:
    *both, running, _ = ends[0], ends[1], ends[2], ends[3]
    reset(both[side])
    with pytest.raises(ConnectionResetError):
        both[1 - side].recv(1)
    assert running.get(timeout=10).failure


def test_what_was_said_before_a_reset_still_arrives(ends: Ends) -> None:
    visitor, target, running, _ = ends
    answer = b"x" * 200_000
    target.sendall(answer)
    wait_delivered(target, 10)  # a reset takes away what the sender's own kernel still holds
    reset(target)
    received = b""
    while len(received) < len(answer):
        received += visitor.recv(65536)
    with pytest.raises(ConnectionResetError):
        visitor.recv(1)
    assert received == answer
    assert running.get(timeout=10).failure


def test_an_answer_arrives_from_a_target_that_does_not_want_the_rest_of_the_question(ends: Ends) -> None:
    visitor, target, _, _ = ends
    visitor.sendall(b"x" * 1000)
    target.recv(10)
    target.sendall(b"no, thank you")
    target.close()  # with bytes unread: its kernel resets the connection
    assert visitor.recv(100) == b"no, thank you"


def test_a_relay_that_is_ended_cuts_both_ends(ends: Ends) -> None:
    visitor, target, running, _ = ends
    visitor.sendall(b"1")
    assert target.recv(1) == b"1"
    running.kill()
    for sock in (visitor, target):
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_a_slow_reader_holds_back_the_writer(ends: Ends) -> None:
    visitor, target, _, stats = ends
    visitor.setblocking(False)
    sent = 0
    quiet = 0
    while quiet < 20:
        try:
            sent += visitor.send(b"x" * 65536)
            quiet = 0
        except BlockingIOError:
            quiet += 1
        gevent.sleep(0.005)
    assert stats.bytes_up <= sent < 64 << 20
    visitor.setblocking(True)
    closer = gevent.spawn(visitor.shutdown, socket.SHUT_WR)
    assert len(receive_all(target)) == sent
    closer.get(timeout=10)


def test_a_busy_stream_lets_others_run(ends: Ends) -> None:
    """Counted in turns, not in time: each turn of the loop moves a bounded number of bytes."""
    visitor, target, _, _ = ends
    total = 20 << 20
    turns = 0

    def send() -> None:
        visitor.sendall(bytes(total))
        visitor.shutdown(socket.SHUT_WR)

    def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            gevent.sleep(0)

    gevent.spawn(send)
    counter = gevent.spawn(count_turns)
    assert len(receive_all(target)) == total
    counter.kill()
    assert turns >= 20


@pytest.mark.parametrize("cutter", [0, 1])
def test_a_reset_that_a_write_hears_of_first_is_still_a_reset_to_the_other_end(ends: Ends, cutter: int) -> None:
    cut, other = (ends[0], ends[1]) if cutter == 0 else (ends[1], ends[0])
    other.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            other.send(bytes(65536))  # the relay is left writing to the one that cuts
    gevent.wait(timeout=0.1)
    other.setblocking(True)
    cut.sendall(b"a beginning")
    reset(cut)
    received = b""
    with pytest.raises(ConnectionResetError):
        received = receive_all(other)
    assert received == b""
