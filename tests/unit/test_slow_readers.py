"""What a direction keeps while the peer of its sink does not read, on real sockets inside this process."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest

from nodepass.net import pump
from nodepass.net.pipes import pipes
from nodepass.net.pump import MESSAGE, rests
from nodepass.net.relay import relay
from nodepass.net.sockets import room_to_send
from nodepass.net.stream import Stream, TCPStream
from nodepass.stats import Stats
from tests.unit.controls import connect_ends, run_tls
from tests.unit.streams import tcp_pair

SENT = bytes(range(256)) * (48 << 12)
"""48 MiB: far more than all buffers of the kernel take."""

BOTH = pytest.mark.parametrize("to_tls", [False, True], ids=["to plain", "to tls"])
KINDS = pytest.mark.parametrize("from_tls", [False, True], ids=["from plain", "from tls"])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack, gevent.Timeout(30):
        yield stack


def open_stream(stack: ExitStack, secured: bool) -> tuple[Stream, Stream]:
    """A stream and its peer's."""
    if secured:
        return run_tls(stack, connect_ends(stack))
    stream, peer = stack.enter_context(tcp_pair())
    return stream, TCPStream(peer._sock)


class Session:
    """A relay, and the two peers of its streams; the first one sends all the time."""

    def __init__(self, stack: ExitStack, from_tls: bool, to_tls: bool) -> None:
        near, self.writer = open_stream(stack, from_tls)
        far, self.reader = open_stream(stack, to_tls)
        self.stats = Stats()
        self._sending = gevent.spawn(self._send)
        stack.callback(self._sending.kill)
        self.relaying = gevent.spawn(relay, near, far, self.stats)
        stack.callback(self.relaying.kill)

    def _send(self) -> None:
        self.writer.write(SENT)
        self.writer.half_close()

    def wait_until_stuck(self) -> None:
        """Until nothing has moved for a while."""
        moved = -1
        while moved != self.stats.bytes_up or not moved:
            moved = self.stats.bytes_up
            gevent.sleep(0.2)
        assert moved < len(SENT)

    def assert_all_arrives(self) -> None:
        buffer, expected, received = memoryview(bytearray(1 << 20)), memoryview(SENT), 0
        while size := self.reader.recv_into(buffer):
            assert buffer[:size] == expected[received : received + size]
            received += size
        assert received == len(SENT)


@KINDS
@BOTH
def test_a_direction_whose_sink_is_full_keeps_a_message_at_most(stack: ExitStack, from_tls: bool, to_tls: bool) -> None:
    session = Session(stack, from_tls, to_tls)
    session.wait_until_stuck()
    assert rests.bytes <= MESSAGE
    assert pipes.open == len(pipes._idle)
    session.assert_all_arrives()
    assert rests.bytes == 0


def test_what_a_full_sink_is_owed_is_forgotten_when_the_session_is_killed(stack: ExitStack) -> None:
    stream, _ = stack.enter_context(tcp_pair())
    source, peer = stack.enter_context(tcp_pair())

    class Full(TCPStream):
        def send(self, data: bytes | memoryview) -> bytes:
            return bytes(data)

        def try_rest(self, rest: bytes | memoryview) -> bytes | memoryview:
            return rest

    running = gevent.spawn(relay, source, Full(stream.sock), Stats())
    peer.sendall(b"question")
    while not rests.bytes:
        gevent.sleep(0.001)
    assert rests.bytes == len(b"question")
    running.kill()
    assert rests.bytes == 0


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["no room", "more room than there is"])
def test_where_all_rests_together_are_many_a_read_is_of_a_message_at_most(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(rests, "many", True)
    monkeypatch.setattr(pump, "RESTS_AT_MOST", 0)
    monkeypatch.setattr(pump, "room_to_send", lambda _sock: room)
    read: list[int] = []

    class Noting(TCPStream):
        plain = False

        def read(self, buffer: memoryview) -> int:
            read.append(len(buffer))
            return int(self._raw.recv_into(buffer))

    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    stack.callback(gevent.spawn(relay, Noting(near.sock), far, Stats()).kill)
    stack.callback(gevent.spawn(visitor.sendall, SENT[: 1 << 20]).kill)
    received = b""
    while len(received) < 1 << 20:
        received += target.recv(1 << 20)
    assert received == SENT[: 1 << 20]
    assert set(read) == {min(max(room, pump.LEAST_READ), MESSAGE)}


def test_the_kernel_takes_what_it_was_said_to_have_room_for(stack: ExitStack) -> None:
    stream, peer = stack.enter_context(tcp_pair())
    room = room_to_send(stream.sock)
    assert room > MESSAGE
    while (room := room_to_send(stream.sock)) > MESSAGE:
        assert not stream.send(bytes(room))
    assert stream.send(bytes(64 << 20))
    while room_to_send(stream.sock) < MESSAGE:
        peer.recv(1 << 20)


def test_a_connection_that_is_closed_has_no_room() -> None:
    with tcp_pair() as (stream, _):
        sock = stream.sock
    assert room_to_send(sock) == 0
    near, far = socket.socketpair()
    with near, far:
        assert room_to_send(near) >= 0
