"""A whole server inside this process: how it starts, drains and closes, and what its health depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import cast

import gevent
import pytest
from gevent import Greenlet, socket

from nodepass.config import Settings
from nodepass.errors import ListenError
from nodepass.log import Log
from nodepass.net.activation import NOTHING
from nodepass.server.pool import ServerPool
from nodepass.server.server import Server
from nodepass.server.visitor_listener import VisitorListener
from nodepass.stats import Stats
from nodepass.urls import ServerURL, parse_url
from nodepass.wire.signals import ID_LENGTH, Hello, Offer, parse_opening
from tests.unit.controls import is_closed, read_line
from tests.unit.servers import PATIENT, a_server_room

HELLO = Hello("0" * 32).encode()
SOON = 0.05  # seconds
SETTINGS = Settings(report_interval=PATIENT, pool_get_timeout=PATIENT)  # no heartbeat is due in any test


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Running:
    """A server that runs, and what connects to it."""

    def __init__(self, stack: ExitStack, settings: Settings = SETTINGS) -> None:
        self._stack = stack
        url = cast(ServerURL, parse_url("server://127.0.0.1:0/127.0.0.1:0?tls=0"))
        self.server = Server(url, settings, None, Log("server"), Stats(), NOTHING)
        self.server.start()
        self.greenlet: Greenlet[..., object] = gevent.spawn(self.server.run)
        stack.callback(self.greenlet.join, 10)
        stack.callback(self.server.close)
        assert self.server._listeners
        self.listeners = self.server._listeners
        gevent.sleep(0)

    def connect(self, listener: socket.socket, *lines: bytes) -> socket.socket:
        peer: socket.socket = self._stack.enter_context(socket.create_connection(listener.getsockname(), PATIENT))
        for line in lines:
            peer.sendall(line)
        return peer

    def connect_client(self, connections: int = 1) -> tuple[socket.socket, dict[str, socket.socket]]:
        """A client's control connection, and its data connections by id."""
        client = self.connect(self.listeners.tunnel[0], HELLO)
        offer = parse_opening(read_line(client))
        assert isinstance(offer, Offer)
        peers = [self.connect(self.listeners.data[0]) for _ in range(connections)]
        return client, {peer.recv(ID_LENGTH).decode(): peer for peer in peers}

    def visit(
        self, client: socket.socket, connections: dict[str, socket.socket]
    ) -> tuple[socket.socket, socket.socket]:
        """A visitor that is served, and the data connection that it is served by."""
        visitor = self.connect(self.listeners.visitors[0], b"hello")
        data = connections[read_line(client)[2:10].decode()]
        assert data.recv(100) == b"hello"
        return visitor, data


def test_a_server_names_its_ports_to_a_client_and_serves_a_visitor(stack: ExitStack) -> None:
    running = Running(stack)
    assert running.server.ready.is_set()
    client, connections = running.connect_client()
    visitor, data = running.visit(client, connections)
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    view = running.server.view()
    assert (view.unready, view.peer, view.wire, view.slots_used) == ("", "127.0.0.1", 2, 1)
    assert "client 127.0.0.1" in running.server.status()


def test_a_server_that_cannot_listen_on_one_address_leaves_none_open(stack: ExitStack) -> None:
    taken = stack.enter_context(closing(socket.socket()))
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    free = stack.enter_context(closing(socket.socket()))
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    url = cast(ServerURL, parse_url(f"server://127.0.0.1:{port}/127.0.0.1:{taken.getsockname()[1]}?tls=0"))
    server = Server(url, SETTINGS, None, Log("server"), Stats(), NOTHING)
    with pytest.raises(ListenError, match="target address"):
        server.start()
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENT)
    assert not server.ready.is_set()


# Stop


def test_a_stop_drains_sessions_and_keeps_the_client_until_they_have_ended(stack: ExitStack) -> None:
    """Clients are told why they are refused meanwhile, and visitors are refused by the kernel."""
    running = Running(stack)
    client, connections = running.connect_client()
    visitor, data = running.visit(client, connections)
    address = running.listeners.visitors[0].getsockname()
    stopping = gevent.spawn(running.server.stop, PATIENT)
    gevent.sleep(0)
    late = running.connect(running.listeners.tunnel[0], HELLO)
    assert read_line(late) == b"//error?reason=shutdown\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENT)
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    assert not stopping.ready()
    data.close()
    visitor.close()
    assert stopping.get() == 0
    assert running.server.control
    running.server.close()
    assert is_closed(client)


def test_a_visitor_that_has_connected_before_a_stop_is_served(stack: ExitStack) -> None:
    running = Running(stack)
    client, connections = running.connect_client()
    [accepting] = [part for part in running.server._parts if isinstance(part, VisitorListener)]
    accepting._end_loops()  # so that it waits in the kernel's queue
    visitor = running.connect(running.listeners.visitors[0], b"hello")
    stopping = gevent.spawn(running.server.stop, PATIENT)
    data = connections[read_line(client)[2:10].decode()]
    assert data.recv(100) == b"hello"
    data.close()
    visitor.close()
    assert stopping.get() == 0


def test_a_stop_cuts_what_does_not_end_in_time_and_says_how_many(stack: ExitStack) -> None:
    running = Running(stack)
    client, connections = running.connect_client(2)
    sessions = [running.visit(client, connections) for _ in range(2)]
    assert running.server.stop(SOON) == 2
    assert all(is_closed(end) for session in sessions for end in session)


def test_a_visitor_is_answered_by_udp_while_sessions_drain(stack: ExitStack) -> None:
    running = Running(stack)
    client, connections = running.connect_client(2)
    visitor, data = running.visit(client, connections)
    asking = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    asking.settimeout(PATIENT)
    asking.sendto(b"question", running.listeners.datagrams[0].getsockname())
    line = read_line(client)
    assert line.endswith(b"#3\n")
    lane = connections[line[2:10].decode()]
    frame = lane.recv(100)
    stopping = gevent.spawn(running.server.stop, PATIENT)
    gevent.sleep(0)
    lane.sendall(frame)
    assert asking.recv(100) == b"question"
    data.close()
    visitor.close()
    assert stopping.get() == 0


# Close


def test_a_close_ends_everything_and_the_run_with_it(stack: ExitStack) -> None:
    running = Running(stack)
    client, connections = running.connect_client(2)
    session = running.visit(client, connections)
    running.server.close()
    assert all(is_closed(end) for end in (client, *session))
    for listener in (*running.listeners.tunnel, *running.listeners.data, *running.listeners.visitors):
        assert listener.fileno() < 0
    running.greenlet.get(timeout=10)
    running.server.close()


def test_a_server_may_be_closed_before_it_runs(stack: ExitStack) -> None:
    running = Running(stack)
    url = replace(running.server.url)
    never_run = Server(url, SETTINGS, None, Log("server"), Stats(), NOTHING)
    never_run.close()
    assert never_run.view().unready == "no client is connected"


# Health


def test_a_loop_that_crashes_ends_the_run_with_its_exception(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    running = Running(stack, replace(SETTINGS, report_interval=SOON))
    assert not running.server.unhealthy_reason()
    monkeypatch.setattr(ServerPool, "end_interval", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        running.greenlet.get(timeout=10)
    assert running.server.stats.trouble["bugs"] == 1


def test_a_loop_that_has_ended_is_unhealthy_until_the_server_is_closed(stack: ExitStack) -> None:
    running = Running(stack)
    loop = next(loop for part in running.server._parts for loop in part._loops)
    loop.kill()
    assert loop.name in running.server.unhealthy_reason()
    running.server.close()
    assert not running.server.unhealthy_reason()


def test_no_loop_of_a_running_server_is_without_a_watch(stack: ExitStack) -> None:
    running = Running(stack)
    watched = sorted(loop.name for part in running.server._parts for loop in part._loops)
    assert len(running.server._common.loops) == len(watched)
    assert watched == [
        "accept clients",
        "accept data connections",
        "accept visitors",
        "receive datagrams",
        "report",
        "sweep flows",
    ]
