"""The relay, on real sockets inside this process."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket

from nodepass.net import pump
from nodepass.net.pipes import CAPACITY, Pipe, pipes
from nodepass.net.pump import GATHER, GATHER_AFTER
from nodepass.net.relay import Traffic, relay
from nodepass.net.sockets import wait_delivered
from nodepass.net.stream import Data, TCPStream
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


class Hoarding(TCPStream):
    """A stream whose bytes come one a read, as TLS has read them ahead of the relay."""

    plain = False

    def __init__(self, plain: TCPStream) -> None:
        super().__init__(plain.sock)
        self.hoard = b""

    @property
    def pending(self) -> bool:  # type: ignore[override]
        return bool(self.hoard)

    def read(self, buffer: memoryview) -> int:
        self.hoard = self.hoard or self._raw.recv(100)
        buffer[:1], self.hoard = self.hoard[:1], self.hoard[1:]
        return 1


def test_bytes_that_a_stream_has_read_ahead_are_passed_on_without_waiting_for_more() -> None:
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        running = gevent.spawn(relay, Hoarding(near), far, Stats())
        visitor.sendall(b"question")
        assert target.recv(8, socket.MSG_WAITALL) == b"question"
        running.kill()


class Refusing(TCPStream):
    """A stream that cannot be written to, though its connection lives: as under TLS after a broken record."""

    plain = False

    def send(self, _data: Data) -> Data:
        raise OSError(errno.EPIPE, "Broken pipe")


def test_a_sink_that_fails_while_its_connection_lives_ends_the_session_after_what_its_peer_has_sent() -> None:
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        target.sendall(b"an answer")
        wait_delivered(target, 10)
        visitor.sendall(b"question")
        wait_delivered(visitor, 10)
        running = gevent.spawn(relay, near, Refusing(far.sock), Stats())
        assert visitor.recv(100) == b"an answer"
        with pytest.raises(ConnectionResetError):
            visitor.recv(100)
        traffic = running.get(timeout=10)
        assert (traffic.outcome, traffic.failure, traffic.up, traffic.down) == ("reset", "Broken pipe", 0, 9)


class Ending(TCPStream):
    """A stream that notes what it is told of the end."""

    __slots__ = ("ends",)

    def __init__(self, plain: TCPStream) -> None:
        super().__init__(plain.sock)
        self.ends = 0

    def end(self) -> Data:
        self.ends += 1
        return super().end()


def test_an_end_that_only_follows_from_a_failed_write_is_not_passed_on() -> None:
    with tcp_pair() as (plain, visitor), tcp_pair() as (far, _):
        near = Ending(plain)
        visitor.sendall(b"question")
        running = gevent.spawn(relay, near, Refusing(far.sock), Stats())
        assert running.get(timeout=10).outcome == "reset"
        assert near.ends == 0


class Parting(TCPStream):
    """A stream that has something left to send at its end, as TLS has when its peer does not read."""

    plain = False

    def end(self) -> Data:
        return b"farewell"


def test_what_is_left_at_the_end_of_a_stream_is_sent_before_its_direction_is_over() -> None:
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        running = gevent.spawn(relay, near, Parting(far.sock), Stats())
        visitor.close()
        assert target.recv(8, socket.MSG_WAITALL) == b"farewell"
        assert not running.ready()
        target.close()
        assert running.get(timeout=10).outcome == "completed"


def test_the_first_byte_of_the_way_back_is_timed_once() -> None:
    stats = Stats()
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        running = gevent.spawn(relay, near, far, stats, time.monotonic() - 1)
        visitor.sendall(b"question")
        assert target.recv(100) == b"question"
        assert not sum(stats.first_bytes.counts)
        for answer in (b"one", b"two"):
            target.sendall(answer)
            assert visitor.recv(100) == answer
        assert sum(stats.first_bytes.counts) == 1
        assert stats.first_bytes.total >= 1
        running.kill()


def send_until_stuck(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> gevent.Greenlet[..., bool]:
    """Have the visitor's bytes spliced, and stop reading them; returns what still sends, and whether that was reset."""
    visitor, target = ends[:2]
    drained: list[bool] = []
    drain_to = Pipe.drain_to

    def note_drain(pipe: Pipe, fileno: int) -> bool:
        drained.append(drain_to(pipe, fileno))
        return drained[-1]

    monkeypatch.setattr(Pipe, "drain_to", note_drain)
    monkeypatch.setattr(pump, "room_to_send", lambda _sock: CAPACITY)  # the kernel may take less than expected

    def send() -> bool:
        try:
            visitor.sendall(bytes(64 << 20))
        except ConnectionResetError:
            return True
        return False

    sender: gevent.Greenlet[..., bool] = gevent.Greenlet.spawn(send)
    with gevent.Timeout(10):
        while not drained:
            target.recv(1 << 20)
        while all(drained):  # the target reads no more
            gevent.sleep(0.01)
    return sender


def test_a_session_that_is_ended_while_its_sink_is_full_keeps_no_pipe(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, running, _ = ends
    sender = send_until_stuck(ends, monkeypatch)
    held = pipes.open - len(pipes._idle)
    assert held == 1
    running.kill()
    assert pipes.open == len(pipes._idle)
    assert sender.get(timeout=10)


def test_a_busy_sink_that_is_reset_while_it_is_full_resets_the_source(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, running, stats = ends[1], ends[2], ends[3]
    sender = send_until_stuck(ends, monkeypatch)
    reset(target)
    assert sender.get(timeout=10)
    assert running.get(timeout=10).outcome == "reset"
    assert pipes.open == len(pipes._idle)
    assert stats.tcp.open == 0


def test_a_busy_source_that_stalls_with_a_few_bytes_has_them_passed_on() -> None:
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        running = gevent.spawn(relay, near, far, Stats())

        def mark() -> int:
            return near.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)

        gathered = False
        with gevent.Timeout(20):
            while not gathered:  # as many busy reads in a row as it takes: how much a read brings is the kernel's
                sender = gevent.spawn(visitor.sendall, bytes(2 * GATHER_AFTER * GATHER))
                left = 2 * GATHER_AFTER * GATHER
                while left:
                    left -= len(target.recv(1 << 20))
                    gathered = gathered or mark() == GATHER
                sender.get()
            visitor.sendall(b"the rest")
            assert target.recv(100) == b"the rest"
            while mark() != 1:
                gevent.sleep(0.001)
        running.kill()
