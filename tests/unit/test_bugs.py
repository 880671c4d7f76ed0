"""Bugs where only a callback of the event loop or a greenlet of its own would hear of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress

import gevent
import pytest
from gevent import socket

from nodepass.net.pump import _Gathering
from nodepass.net.relay import relay
from nodepass.net.stream import Data, TCPStream
from nodepass.stats import Stats
from nodepass.tunnel.udp import Lane
from tests.unit.streams import tcp_pair


class Bug(Exception):
    """What nobody expects."""


class Broken(TCPStream):
    """A stream that cannot be written to, for no reason that the program knows."""

    plain = False

    def write(self, _data: Data) -> None:
        raise Bug

    def try_rest(self, _rest: Data) -> Data:
        raise Bug


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack, gevent.Timeout(10):
        yield stack


def read_to_the_end(sock: socket.socket) -> None:
    with suppress(ConnectionError):
        while sock.recv(1 << 20):
            pass


def pour(stack: ExitStack, visitor: socket.socket) -> None:
    """Send without an end."""

    def pour() -> None:
        with suppress(ConnectionError):
            while True:
                visitor.sendall(bytes(1 << 20))

    stack.callback(gevent.spawn(pour).kill)


def test_a_bug_in_a_lanes_writer_ends_the_lane_and_is_raised_by_it(stack: ExitStack) -> None:
    stream, _ = stack.enter_context(tcp_pair())
    lane = Lane(lambda number, payload: (number, payload))
    running = gevent.spawn(lane.run, Broken(stream.sock))
    gevent.sleep(0)
    assert lane.send(1, b"hello")
    with pytest.raises(Bug):
        running.get()
    assert lane.ended


def test_a_bug_when_a_full_sink_takes_bytes_again_ends_the_session_and_is_raised_by_it(stack: ExitStack) -> None:
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    sink = Broken(far.sock)
    running = gevent.spawn(relay, near, sink, Stats())
    pour(stack, visitor)
    while not (sink._writable and sink._writable.active):
        gevent.sleep(0.01)
    read_to_the_end(target)
    with pytest.raises(Bug):
        running.get()


def test_a_bug_when_a_busy_stream_has_stalled_ends_the_session_and_is_raised_by_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _Gathering.close

    def wrong(_self: _Gathering) -> None:
        monkeypatch.setattr(_Gathering, "close", right)
        raise Bug

    monkeypatch.setattr(_Gathering, "close", wrong)
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    running = gevent.spawn(relay, near, far, Stats())
    reader = gevent.spawn(read_to_the_end, target)
    stack.callback(reader.kill)
    visitor.sendall(bytes(64 << 20))  # and then nothing: it stalls
    with pytest.raises(Bug):
        running.get()
