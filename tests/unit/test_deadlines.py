"""Sessions that no socket says are over end in time, and those that live go on: on the kernel's own clock."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import time
from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent import socket
from gevent.socket import SO_RCVBUF, SO_SNDBUF, SOL_SOCKET

import nodepass.net.relay
from nodepass.net import deadlines as module
from nodepass.net.deadlines import Bounds, Deadlines
from nodepass.net.relay import Traffic, relay
from nodepass.net.sockets import Socket, TCPInfo, read_tcp_info, wait_delivered
from nodepass.stats import Stats
from tests.unit.controls import until
from tests.unit.streams import receive_all, reset, tcp_pair

LONG = 60.0  # seconds, which do not pass in a test
SHORT = 0.2  # seconds, which do
SO_ATTACH_FILTER = 26


def vanish(sock: socket.socket) -> None:
    """From now on a socket's kernel takes nothing and acknowledges nothing, as if its machine was gone."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF: return 0
    sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, ctypes.addressof(drop_all)))


class Ends:
    """A session under deadlines: its visitor and its target, with buffers that are full soon."""

    def __init__(self, stack: contextlib.ExitStack, deadlines: Deadlines) -> None:
        near, self.visitor = stack.enter_context(tcp_pair())
        far, self.target = stack.enter_context(tcp_pair())
        for sock in (near.sock, self.visitor, far.sock, self.target):
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, 32768)
            sock.setsockopt(SOL_SOCKET, SO_RCVBUF, 32768)
        self.near, self.far = near.sock, far.sock
        self.stats = Stats()
        self.running: gevent.Greenlet[..., Traffic] = gevent.Greenlet.spawn(
            relay, near, far, self.stats, deadlines=deadlines
        )
        stack.callback(self.running.kill)

    def outcome(self) -> str:
        """How the session ends."""
        outcome = self.running.get(timeout=10).outcome
        assert self.stats.tcp.ended[outcome] == 1
        return outcome

    def speak(self) -> None:
        """One byte each way, which arrives."""
        for sender, receiver in ((self.visitor, self.target), (self.target, self.visitor)):
            sender.sendall(b"!")
            assert receiver.recv(1) == b"!"

    def fill(self) -> int:
        """Have the visitor send until the target's window is shut; the number of bytes."""
        sent = 0
        self.visitor.setblocking(False)
        with gevent.Timeout(10):
            while not (info := read_tcp_info(self.far)).waits or not info.window_is_shut:
                with contextlib.suppress(BlockingIOError):
                    sent += self.visitor.send(bytes(4096))
                gevent.sleep(0.001)
        self.visitor.setblocking(True)
        return sent


Begin = Callable[..., tuple[Deadlines, Ends]]


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """What begins a session; its deadlines are looked at all the time."""
    monkeypatch.setattr(nodepass.net.relay, "DELIVERY_GRACE", 0.01)
    monkeypatch.setattr(module, "ROUND", 0.03)
    monkeypatch.setattr(module, "SHORTEST_ROUND", 0.03)
    with contextlib.ExitStack() as stack:
        made: list[Deadlines] = []

        def begin(
            idle: float = 0.0, first_byte: float = 0.0, data_is_near: bool = False, **bounds: float
        ) -> tuple[Deadlines, Ends]:
            limits = Bounds(**{"in_flight": LONG, "window_shut": LONG, "suspected": LONG, **bounds})
            made.append(Deadlines(idle, first_byte, data_is_near, limits))
            return made[-1], Ends(stack, made[-1])

        yield begin
    assert not any(each._watched or each._urgent for each in made)
    until(lambda: not any(each._timer.active for each in made))  # nothing to look at


def pass_time(seconds: float) -> None:
    """Let a deadline pass, and the looks after it."""
    gevent.sleep(seconds + SHORT)


@pytest.mark.parametrize("end", ["visitor", "target"])
def test_a_peer_that_has_vanished_with_bytes_in_flight_ends_its_session(begin: Begin, end: str) -> None:
    _, ends = begin(in_flight=SHORT)
    ends.speak()
    gone, other = (ends.visitor, ends.target) if end == "visitor" else (ends.target, ends.visitor)
    vanish(gone)
    other.sendall(b"are you there?")
    with pytest.raises(ConnectionResetError):
        receive_all(other)
    assert ends.outcome() == "vanished"


def test_a_peer_that_has_vanished_ends_its_session_although_the_other_one_goes_on_sending(begin: Begin) -> None:
    _, ends = begin(in_flight=SHORT)
    vanish(ends.target)

    def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                ends.visitor.sendall(b"a line of the log\n")
                gevent.sleep(0.01)

    sender = gevent.spawn(send)
    assert ends.outcome() == "vanished"
    sender.get(timeout=10)


def test_a_reader_that_lives_and_reads_nothing_keeps_its_session(begin: Begin) -> None:
    """Its kernel acknowledges the probes of the window, which are further apart than SHORT by then."""
    _, ends = begin(in_flight=SHORT / 2)
    sent = ends.fill()
    until(lambda: read_tcp_info(ends.far).silent > SHORT)
    ends.visitor.shutdown(socket.SHUT_WR)
    assert len(receive_all(ends.target)) == sent
    ends.target.close()
    assert ends.outcome() == "completed"


def test_a_reader_that_vanishes_behind_its_shut_window_ends_its_session(begin: Begin) -> None:
    _, ends = begin(window_shut=SHORT)
    ends.fill()
    vanish(ends.target)
    assert ends.outcome() == "vanished"


@pytest.mark.parametrize("data_is_near", [False, True], ids=["server", "client"])
def test_when_the_other_end_of_the_tunnel_has_vanished_its_sessions_have_less_time(
    begin: Begin, data_is_near: bool
) -> None:
    deadlines, ends = begin(data_is_near=data_is_near, suspected=SHORT)
    data, other = (ends.visitor, ends.target) if data_is_near else (ends.target, ends.visitor)
    ends.speak()
    vanish(data)
    other.sendall(b"are you there?")
    pass_time(SHORT)
    assert not ends.running.ready()
    deadlines.suspect_data_connections()
    assert ends.outcome() == "vanished"


def test_sessions_whose_data_connection_lives_go_on_after_the_control_connection(begin: Begin) -> None:
    deadlines, ends = begin(suspected=SHORT)
    ends.speak()
    deadlines.suspect_data_connections()
    pass_time(SHORT)  # no bytes wait
    ends.visitor.sendall(b"a line of the log\n")  # and the target never answers
    assert ends.target.recv(100)
    vanish(ends.target)
    ends.visitor.sendall(b"another")  # its peer has shown life since
    pass_time(SHORT)
    assert not ends.running.ready()


def test_a_visitor_that_does_not_acknowledge_is_no_data_connection(begin: Begin) -> None:
    deadlines, ends = begin(suspected=SHORT)
    vanish(ends.visitor)
    ends.target.sendall(b"an answer")
    deadlines.suspect_data_connections()
    pass_time(SHORT)
    assert not ends.running.ready()


def test_a_visitor_that_resets_behind_the_end_of_its_stream_ends_the_session(begin: Begin) -> None:
    """Its direction is over, so that nothing reads from it, and a target that thinks writes nothing to it."""
    _, ends = begin()
    ends.visitor.sendall(b"question")
    ends.visitor.shutdown(socket.SHUT_WR)
    assert receive_all(ends.target) == b"question"
    reset(ends.visitor)
    assert ends.outcome() == "reset"


class Clock:
    """What the deadlines take for the time."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def look(deadlines: Deadlines) -> None:
    """Look at every session, and let those that have missed a deadline end."""
    for _ in range(2 * module.SHARES):
        deadlines._look()
    gevent.sleep(0)


def let_pass(seconds: float, deadlines: Deadlines, clock: Clock) -> None:
    """Look now, and again so many seconds later."""
    look(deadlines)
    clock.now += seconds
    look(deadlines)


def test_a_session_without_a_byte_either_way_ends(begin: Begin, clock: Clock) -> None:
    deadlines, ends = begin(idle=60)
    ends.speak()
    let_pass(59, deadlines, clock)
    assert not ends.running.ready()
    clock.now += 1
    for each in (ends.visitor, ends.target):
        with pytest.raises(ConnectionResetError):
            each.recv(1)
    assert ends.outcome() == "idle"
    assert ends.running.value
    assert ends.running.value.failure == "no byte for 1m (IDLE_TIMEOUT)"


def test_a_session_in_which_one_end_speaks_now_and_then_is_not_idle(begin: Begin, clock: Clock) -> None:
    deadlines, ends = begin(idle=60)
    for _ in range(3):
        ends.target.sendall(b"!")
        assert ends.visitor.recv(1) == b"!"
        let_pass(59, deadlines, clock)
    assert not ends.running.ready()


def test_a_session_is_not_idle_while_a_slow_reader_takes_what_the_kernel_holds(begin: Begin, clock: Clock) -> None:
    """The relay has moved all of it, and moves nothing any more."""
    deadlines, ends = begin(idle=60)
    ends.speak()
    for _ in range(3):
        ends.far.send(b"held")  # past the relay
        assert ends.target.recv(4) == b"held"
        wait_delivered(ends.far, 10)
        let_pass(59, deadlines, clock)
    assert not ends.running.ready()


def test_a_visitor_that_sends_nothing_is_ended_also_where_the_server_speaks_first(begin: Begin, clock: Clock) -> None:
    deadlines, ends = begin(first_byte=60)
    ends.target.sendall(b"220 ready\r\n")
    assert ends.visitor.recv(100)
    clock.now += 59
    look(deadlines)
    assert not ends.running.ready()
    clock.now += 2  # its session is a little younger than the clock
    with pytest.raises(ConnectionResetError):
        ends.visitor.recv(1)
    assert ends.outcome() == "silent"


@pytest.mark.parametrize("end", [False, True], ids=["a byte", "the end of its stream"])
def test_a_visitor_that_has_sent_something_may_be_silent(begin: Begin, clock: Clock, end: bool) -> None:
    deadlines, ends = begin(first_byte=60)
    if end:
        ends.visitor.shutdown(socket.SHUT_WR)
        assert receive_all(ends.target) == b""
    else:
        ends.speak()
    clock.now += 1000
    look(deadlines)
    assert not ends.running.ready()


def test_a_session_that_moves_bytes_both_ways_costs_no_system_call(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, ends = begin()
    ends.speak()
    deadlines._timer.stop()
    looks: list[object] = []

    def note_look(sock: Socket) -> TCPInfo:
        looks.append(sock)
        return read_tcp_info(sock)

    monkeypatch.setattr(module, "read_tcp_info", note_look)
    deadlines._look()
    assert not looks
    deadlines._look()
    assert len(looks) == 2
