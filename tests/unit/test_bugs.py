"""Bugs where only a callback of the event loop or a greenlet of its own would hear of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial

import gevent
import pytest
from gevent import socket

from nodepass.client.pool import ClientPool
from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.pump import _Gathering
from nodepass.net.relay import relay
from nodepass.net.stream import Data, TCPStream
from nodepass.server.pool import Queue, ServerPool
from nodepass.stats import Stats
from nodepass.tunnel.udp import Lane
from tests.unit.streams import tcp_pair


class Bug(Exception):
    """What nobody expects."""


class Broken(TCPStream):
    """A stream that takes nothing at once and cannot be written to later, for no reason that the program knows."""

    plain = False

    def send(self, data: Data) -> Data:
        return bytes(data)

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


class Unreadable(TCPStream):
    """A stream that cannot be looked at, for no reason that the program knows."""

    def peek(self) -> bool | None:
        raise Bug


@pytest.mark.parametrize("kind", [ClientPool, partial(ServerPool, queue=Queue())], ids=["client", "server"])
def test_a_bug_in_watching_an_idle_connection_ends_that_connection_only_and_is_reported(
    stack: ExitStack, kind: Callable[..., ClientPool | ServerPool]
) -> None:
    stats = Stats()
    pool = kind(Log("test"), stats, 2, 64)
    healthy, _ = stack.enter_context(tcp_pair())
    stream, peer = stack.enter_context(tcp_pair())
    broken = Unreadable(stream.sock)
    pool.add("00000001", healthy)
    pool.add("00000002", broken)
    peer.sendall(b"!")
    while "00000002" in pool:
        gevent.sleep(0.001)
    assert broken.sock.fileno() < 0
    assert "00000001" in pool
    assert stats.trouble["bugs"] == 1
    healthy.unwatch()


def test_a_bug_after_the_first_bytes_of_an_idle_connection_leaves_nothing_to_claim(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ClientPool._become_early

    def wrong(pool: ClientPool, id: str, has_bytes: bool, added: float) -> None:
        right(pool, id, has_bytes, added)
        raise Bug

    monkeypatch.setattr(ClientPool, "_become_early", wrong)
    pool = ClientPool(Log("test"), Stats(), 2, 64)
    stream, peer = stack.enter_context(tcp_pair())
    pool.add("00000001", stream)
    peer.sendall(b"!")
    while stream.sock.fileno() >= 0:
        gevent.sleep(0.001)
    with pytest.raises(NoDataConnection):
        pool.claim("00000001", 1)


def test_a_bug_in_a_lanes_writer_ends_the_lane_and_is_raised_by_it(stack: ExitStack) -> None:
    stream, _ = stack.enter_context(tcp_pair())
    lane = Lane()
    running = gevent.spawn(lane.run, Broken(stream.sock), lambda number, payload: (number, payload))
    gevent.sleep(0)
    assert lane.send(1, b"hello")
    with pytest.raises(Bug):
        running.get()
    assert lane.ended


def test_a_bug_when_a_full_sink_takes_bytes_again_ends_the_session_and_is_raised_by_it(stack: ExitStack) -> None:
    near, visitor = stack.enter_context(tcp_pair())
    far, _ = stack.enter_context(tcp_pair())
    running = gevent.spawn(relay, near, Broken(far.sock), Stats())
    visitor.sendall(b"question")
    with pytest.raises(Bug):
        running.get()


def test_a_bug_when_a_busy_stream_has_stalled_ends_the_session_and_is_raised_by_it(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = _Gathering.close

    def wrong(gathering: _Gathering) -> None:
        monkeypatch.setattr(_Gathering, "close", right)
        right(gathering)  # its timer would outlive the test
        raise Bug

    monkeypatch.setattr(_Gathering, "close", wrong)
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    running = gevent.spawn(relay, near, far, Stats())
    reader = gevent.spawn(read_to_the_end, target)
    stack.callback(reader.kill)
    while not running.ready():  # beside a busy process, a stream is not always busy
        with suppress(ConnectionError):
            visitor.sendall(bytes(16 << 20))
        running.join(0.1)  # nothing more comes: it stalls
    with pytest.raises(Bug):
        running.get()
