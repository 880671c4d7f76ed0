"""The pool's two ends, on real sockets inside this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count

import gevent
import pytest
from gevent import socket

from nodepass.client.pool import ClientPool
from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.stream import TCPStream
from nodepass.server.pool import INSISTS_AFTER, Found, Queue, ServerPool
from nodepass.stats import Stats
from nodepass.wire.signals import TCP
from tests.unit.streams import tcp_pair


class Connections:
    """Makes data connections; `peers` has the other ends by id."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.peers: dict[str, socket.socket] = {}
        self._stack = stack
        self._numbers = count()

    def make(self) -> tuple[TCPStream, socket.socket]:
        """A stream as the program sees it, and the peer's socket."""
        return self._stack.enter_context(tcp_pair())

    def add_to(self, pool: ServerPool | ClientPool, number: int = 1) -> list[str]:
        """Put so many new connections into a pool; their ids."""
        ids = []
        for _ in range(number):
            stream, peer = self.make()
            ids.append(f"{next(self._numbers):08x}")
            self.peers[ids[-1]] = peer
            pool.add(ids[-1], stream)
        return ids


@pytest.fixture
def connections() -> Iterator[Connections]:
    with contextlib.ExitStack() as stack:
        yield Connections(stack)


@pytest.fixture
def server() -> Iterator[ServerPool]:
    pool = ServerPool(Log("test"), Stats(), 2, 64, Queue())
    yield pool
    pool.flush("the test is over")


def take(pool: ServerPool, timeout: float) -> Found:
    """A connection, which is waited for as a session does."""
    if found := pool.take(TCP):
        return found
    pool.note_empty()
    try:
        return pool._queue.wait(TCP, timeout)[1]
    except NoDataConnection:
        pool.note_unserved()
        raise


@pytest.fixture
def client() -> Iterator[ClientPool]:
    pool = ClientPool(Log("test"), Stats(), 2, 64)
    yield pool
    pool.close("the test is over")


def test_a_connection_is_handed_out_once(server: ServerPool, connections: Connections) -> None:
    ids = connections.add_to(server, 3)
    assert {take(server, 1)[0] for _ in ids} == set(ids)
    with pytest.raises(NoDataConnection):
        take(server, 0.01)


def test_the_servers_pool_lacks_connections_until_one_comes_and_after_a_wait_in_vain(
    server: ServerPool, connections: Connections
) -> None:
    lacking = [server.is_lacking(60)]
    connections.add_to(server)
    lacking.append(server.is_lacking(0))
    take(server, 1)
    lacking += [server.is_lacking(60), server.is_lacking(0)]  # empty: for a moment, or for too long
    with pytest.raises(NoDataConnection):
        take(server, 0.01)
    lacking.append(server.is_lacking(60))
    connections.add_to(server)
    lacking.append(server.is_lacking(0))
    server.flush("its client disconnected")
    lacking.append(server.is_lacking(60))
    assert lacking == [True, False, False, True, True, False, True]


def test_the_clients_pool_lacks_connections_while_it_is_empty_and_dials_fail(
    client: ClientPool, connections: Connections
) -> None:
    lacking = [client.is_lacking]
    [id] = connections.add_to(client)
    client.note_failed_dial()
    lacking.append(client.is_lacking)
    client.claim(id, 1)
    lacking.append(client.is_lacking)
    [id] = connections.add_to(client)
    client.claim(id, 1)
    lacking.append(client.is_lacking)
    assert lacking == [True, False, True, False]


def test_who_has_waited_longest_is_served_first(server: ServerPool, connections: Connections) -> None:
    waiting = [gevent.Greenlet.spawn(take, server, 10) for _ in range(3)]
    gevent.idle()
    ids = connections.add_to(server, 3)
    assert [each.get(timeout=10)[0] for each in waiting] == ids


def test_a_dead_connection_is_never_handed_out(server: ServerPool, connections: Connections) -> None:
    first, second = connections.add_to(server, 2)
    connections.peers[second].close()
    assert take(server, 1)[0] == first


def test_a_connection_that_speaks_out_of_turn_is_dead_to_the_server(
    server: ServerPool, connections: Connections
) -> None:
    [id] = connections.add_to(server)
    connections.peers[id].sendall(b"?")
    with pytest.raises(NoDataConnection):
        take(server, 0.05)
    assert not len(server)


def test_a_session_that_waits_is_given_no_connection_that_the_client_has_closed(
    server: ServerPool, connections: Connections
) -> None:
    waiting = gevent.spawn(take, server, 5)
    gevent.idle()
    stream, peer = connections.make()
    peer.close()
    stream.wait_readable()
    server.add("0000000a", stream)
    assert stream.sock.fileno() < 0
    [alive] = connections.add_to(server)
    assert waiting.get()[0] == alive


def test_a_waiter_that_is_ended_leaves_its_connection_to_the_next(server: ServerPool, connections: Connections) -> None:
    first = gevent.Greenlet.spawn(take, server, 10)
    second = gevent.Greenlet.spawn(take, server, 10)
    gevent.idle()
    first.kill()
    [id] = connections.add_to(server)
    assert second.get(timeout=10)[0] == id


def test_a_connection_handed_over_to_a_greenlet_being_ended_is_closed(
    server: ServerPool, connections: Connections
) -> None:
    [id] = connections.add_to(server)
    stream = take(server, 1)[1]
    waiter = gevent.Greenlet.spawn(take, server, 10)
    gevent.idle()
    waiter.kill(block=False)  # it is given its connection before it hears of its end
    server.add(id, stream)
    assert connections.peers[id].recv(1) == b""


def test_quiet_time_closes_what_is_beyond_the_capacity(server: ServerPool, connections: Connections) -> None:
    ids = connections.add_to(server, 20)
    for _ in range(30):
        server.end_interval()
    assert len(server) == 2
    assert ids[-1] in server
    assert connections.peers[ids[0]].recv(1) == b""


def test_a_client_that_makes_them_again_is_left_alone_after_a_while(
    server: ServerPool, connections: Connections
) -> None:
    connections.add_to(server, 20)
    for _ in range(10 * INSISTS_AFTER):
        server.end_interval()
        connections.add_to(server, 20 - len(server))
    before = set(server._idle)
    for _ in range(5):
        server.end_interval()
    assert set(server._idle) == before


def test_a_claim_finds_the_connection_of_its_id(client: ClientPool, connections: Connections) -> None:
    first, second = connections.add_to(client, 2)
    client.claim(first, 1)
    assert second in client
    with pytest.raises(NoDataConnection):
        client.claim(first, 1)


def test_a_launch_may_overtake_its_connection(client: ClientPool, connections: Connections) -> None:
    client.begin_dial()
    claim = gevent.Greenlet.spawn(client.claim, "00000000", 10)
    gevent.idle()
    connections.add_to(client)
    client.end_dial()
    assert claim.get(timeout=10)


def test_a_claim_gives_up_when_no_connection_is_being_made_any_more(client: ClientPool) -> None:
    client.begin_dial()
    claim = gevent.Greenlet.spawn(client.claim, "00000000", 10)
    gevent.idle()
    client.end_dial()
    with pytest.raises(NoDataConnection):
        claim.get(timeout=5)


@pytest.mark.parametrize("ends", [False, True])
def test_a_connection_may_have_bytes_or_its_end_before_its_launch(
    client: ClientPool, connections: Connections, ends: bool
) -> None:
    [id] = connections.add_to(client)
    connections.peers[id].sendall(b"" if ends else b"first bytes")
    if ends:
        connections.peers[id].shutdown(socket.SHUT_WR)
    gevent.wait(timeout=0.05)
    assert not len(client)  # so that another is made
    assert client.missing >= 2
    buffer = memoryview(bytearray(20))
    assert client.claim(id, 1).recv_into(buffer) == (0 if ends else 11)


def end(client: ClientPool, connections: Connections, ids: list[str]) -> None:
    """Have the server end idle connections."""
    for id in ids:
        connections.peers[id].shutdown(socket.SHUT_WR)
    gevent.wait(timeout=0.05)
    assert not any(id in client for id in ids)


def test_who_leaves_at_once_neither_shrinks_the_pool_nor_slows_its_filling(
    client: ClientPool, connections: Connections
) -> None:
    client._states.capacity.size = 4
    for _ in range(3):
        ids = connections.add_to(client, 3)
        end(client, connections, ids)
        for id in ids:
            client.claim(id, 1)
    assert client.capacity == 4
    assert not client.should_pause()


def test_a_server_that_ends_what_was_just_made_is_given_a_rest(client: ClientPool, connections: Connections) -> None:
    end(client, connections, connections.add_to(client, 1))
    assert not client.should_pause()
    end(client, connections, connections.add_to(client, 1))
    assert client.should_pause()
    assert not client.should_pause()


@pytest.mark.parametrize("place", ["idle", "early", "reserved"])
def test_a_connection_whose_id_is_anothers_is_closed(client: ClientPool, connections: Connections, place: str) -> None:
    (first, peer), (second, _) = connections.make(), connections.make()
    client.add("00000000", first)
    if place == "early":
        peer.sendall(b"first bytes")
        gevent.wait(timeout=0.05)
    if place == "reserved":
        client.reserve("00000000")
    client.add("00000000", second)
    assert second.sock.fileno() < 0
    assert client.claim("00000000", 1) is first


def test_the_filler_is_woken_for_a_visitor_that_left_before_its_launch(
    client: ClientPool, connections: Connections
) -> None:
    client._states.capacity.size = 3
    [id] = connections.add_to(client)
    end(client, connections, [id])
    client.wanted.clear()
    client.claim(id, 1)
    assert client.wanted.is_set()


def test_no_claim_outlives_its_pool(client: ClientPool) -> None:
    client.begin_dial()  # ended before it began, so `end_dial` is never called
    claim = gevent.Greenlet.spawn(client.claim, "00000000", 10)
    gevent.idle()
    client.close("the control connection ended")
    for late in (claim, gevent.Greenlet.spawn(client.claim, "00000001", 10)):
        with pytest.raises(NoDataConnection):
            late.get(timeout=5)


def test_an_empty_pool_grows_once_it_has_been_filled_once_over(client: ClientPool, connections: Connections) -> None:
    for expected in (2, 4):  # the first fill does not count
        for id in connections.add_to(client, 2):
            client.claim(id, 1)
        assert client.capacity == expected
