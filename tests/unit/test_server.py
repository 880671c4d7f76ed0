"""A whole server inside this process: how it starts, drains and closes, and what its health depends on."""

from __future__ import annotations

import socket as plain_socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import gevent
import pytest
from gevent import Greenlet, socket
from gevent.event import Event

from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ServerURL
from nodepass.daemon.supervisor import Supervisor
from nodepass.errors import ListenError
from nodepass.log import Log
from nodepass.net.activation import NOTHING
from nodepass.server import server as module
from nodepass.server.clients import Clients
from nodepass.server.pool import ServerPool
from nodepass.server.server import Server
from nodepass.server.tunnel_port import TunnelPort
from nodepass.server.visitor_listener import VisitorListener
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.part import Records
from nodepass.visitors.rules import Rules
from nodepass.wire.auth import Key
from nodepass.wire.negotiation import DataHello, Hello, Offer, parse_opening
from nodepass.wire.signals import ID_LENGTH
from tests.unit.controls import is_closed, read_line, until
from tests.unit.servers import PATIENT, SOON, a_server_room, server_url
from tests.unit.streams import tcp_pair

SETTINGS = Settings(report_interval=PATIENT, pool_get_timeout=PATIENT)  # no heartbeat is due in any test


def hello(name: str = "") -> bytes:
    return Hello("0" * 32, "1" * 16, name).encode()


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


def make_server(
    url: ServerURL, port: TunnelPort | None = None, settings: Settings = SETTINGS, keys: Sequence[Key] = ()
) -> Server:
    log, stats = Log("server"), Stats()
    port = port or TunnelPort([url], settings, log, stats, NOTHING)
    return Server(url, port, settings, lambda: keys, Records(log, stats), NOTHING, Rules(settings, url.name))


class Running:
    """A server that runs, and what connects to it."""

    def __init__(self, stack: ExitStack, settings: Settings = SETTINGS) -> None:
        self._stack = stack
        self.server = make_server(server_url(), settings=settings)
        self.server.start()
        self.greenlet: Greenlet[..., object] = gevent.spawn(self.server.run)
        stack.callback(self.greenlet.join, 10)
        stack.callback(self.server.close)
        gevent.sleep(0)

    def connect(self, listener: plain_socket.socket, *lines: bytes) -> socket.socket:
        return connect_to(self._stack, listener.getsockname(), *lines)

    def connect_client(self, connections: int = 1) -> tuple[socket.socket, dict[str, socket.socket]]:
        """A client's control connection, and its data connections by id."""
        port = self.server._port
        client = self.connect(port.tunnel[0], hello())
        assert isinstance(parse_opening(read_line(client)[:-1]), Offer)
        peers = [self.connect(port.data[0]) for _ in range(connections)]
        return client, {peer.recv(ID_LENGTH).decode(): peer for peer in peers}

    def visit(
        self, client: socket.socket, connections: dict[str, socket.socket]
    ) -> tuple[socket.socket, socket.socket]:
        """A visitor that is served, and the data connection that it is served by."""
        visitor = self.connect(self.server._visitors[0], b"hello")
        data = connections[read_line(client)[2:10].decode()]
        assert data.recv(100) == b"hello"
        return visitor, data


def connect_to(stack: ExitStack, address: tuple[str, int], *lines: bytes) -> socket.socket:
    """A peer that has said something."""
    peer: socket.socket = stack.enter_context(socket.create_connection(address, PATIENT))
    for line in lines:
        peer.sendall(line)
    return peer


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


def test_a_server_probes_its_client_visitors_and_data_connections_as_its_setting_says(stack: ExitStack) -> None:
    running = Running(stack, replace(SETTINGS, keepalive=7.0))
    client, connections = running.connect_client()
    running.visit(client, connections)
    session = next(iter(running.server._clients.slots[0].deadlines._watched))
    assert running.server._clients.newest
    for stream in (session.up.source, session.up.sink, running.server._clients.newest.stream):
        assert stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 7


def test_a_server_that_cannot_listen_on_one_address_leaves_none_open(stack: ExitStack) -> None:
    taken = stack.enter_context(closing(socket.socket()))
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    free = stack.enter_context(closing(socket.socket()))
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    server = make_server(replace(server_url(port=port), target=Address("127.0.0.1", taken.getsockname()[1])))
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
    address = running.server._visitors[0].getsockname()
    stopping = gevent.spawn(running.server.stop, PATIENT)
    gevent.sleep(0)
    late = running.connect(running.server._port.tunnel[0], hello())
    assert read_line(late) == b"//error?reason=shutdown\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENT)
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    assert not stopping.ready()
    data.close()
    visitor.close()
    assert is_closed_after_a_bye(client)
    client.close()
    assert stopping.get() == 0
    assert not running.server._clients.newest


def test_a_visitor_that_has_connected_before_a_stop_is_served(stack: ExitStack) -> None:
    running = Running(stack)
    client, connections = running.connect_client()
    [accepting] = [part for part in running.server._parts if isinstance(part, VisitorListener)]
    accepting._end_loops()  # so that it waits in the kernel's queue
    visitor = running.connect(running.server._visitors[0], b"hello")
    stopping = gevent.spawn(running.server.stop, PATIENT)
    data = connections[read_line(client)[2:10].decode()]
    assert data.recv(100) == b"hello"
    data.close()
    visitor.close()
    assert stopping.get() == 0


def test_visitors_and_clients_are_served_for_the_delay_of_a_stop(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balancer learns meanwhile that the server is not ready."""
    delay, is_over, sleep = 4711.0, Event(), gevent.sleep
    monkeypatch.setattr(gevent, "sleep", lambda seconds=0.0: is_over.wait() if seconds == delay else sleep(seconds))
    running = Running(stack, replace(SETTINGS, shutdown_delay=delay))
    client, connections = running.connect_client()
    stopping = gevent.spawn(running.server.stop, PATIENT)
    gevent.sleep(0)
    visitor, data = running.visit(client, connections)
    data.close()
    visitor.close()
    assert not stopping.ready()
    is_over.set()
    assert is_closed_after_a_bye(client)
    client.close()
    assert stopping.get() == 0


def test_a_server_that_hands_over_waits_for_the_data_connections_of_visitors_that_it_has_accepted(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEGIN_WITHIN", PATIENT)
    running = Running(stack)
    client, _ = running.connect_client(0)
    running.connect(running.server._visitors[0], b"hello")
    until(lambda: len(running.server.sessions) == 1)
    ending = gevent.spawn(running.server.end_accepting)
    until(lambda: not running.server._visitors[0].fileno() >= 0)
    gevent.sleep(0)
    assert not ending.ready()
    stream, data = stack.enter_context(tcp_pair())
    running.server._clients.slots[0].pool.add("00000001", stream)
    assert data.recv(100) == b"hello"
    assert read_line(client) == b"//00000001#1\n"
    ending.join(10)
    assert ending.ready()


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
    asking.sendto(b"question", running.server._datagrams[0].getsockname())
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
    port = running.server._port
    running.server.close()
    assert is_closed_after_a_bye(client)
    assert all(is_closed(end) for end in session)
    for listener in (*port.tunnel, *port.data, *running.server._visitors):
        assert listener.fileno() < 0
    running.greenlet.get(timeout=10)
    running.server.close()


def test_a_server_may_be_closed_before_it_runs(stack: ExitStack) -> None:
    running = Running(stack)
    never_run = make_server(running.server.url)
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


def test_a_loop_of_the_port_that_has_ended_is_unhealthy_as_well(stack: ExitStack) -> None:
    running = Running(stack)
    loop = next(loop for part in running.server._port._parts for loop in part._loops)
    loop.kill()
    assert loop.name in running.server.unhealthy_reason()


def test_no_loop_of_a_running_server_is_without_a_watch(stack: ExitStack) -> None:
    server = Running(stack).server
    watched = [[loop.name for part in parts for loop in part._loops] for parts in (server._parts, server._port._parts)]
    assert len(server._common.loops) == len(watched[0])
    assert sorted(watched[0]) == [
        "accept visitors",
        "receive datagrams",
        "report",
        "sweep flows",
        "watch data connections",
    ]
    assert sorted(watched[1]) == ["accept clients", "accept data connections"]


# Keys


def test_a_reload_takes_the_keys_that_there_are_then_and_cuts_the_sessions_of_one_that_is_gone(
    stack: ExitStack,
) -> None:
    keys: list[Key] = []
    running = Running(stack)
    running.server._keys = lambda: keys
    client, connections = running.connect_client()
    session = running.visit(client, connections)
    running.server.reload()
    assert running.server._clients.newest
    keys.append(Key("correct horse battery staple"))
    running.server.reload()
    assert not running.server._clients.newest
    assert read_line(client) == b"//bye?reason=reload\n"
    assert all(is_closed(end) for end in session)
    late = running.connect(running.server._port.tunnel[0], hello())
    assert read_line(late).startswith(b"//challenge")


# Several tunnels at one port


def is_closed_after_a_bye(client: socket.socket) -> bool:
    """Whether the server has ended a connection and said why."""
    return read_line(client) == b"//bye?reason=shutdown\n" and is_closed(client)


class Shared:
    """Two tunnels of one port under their supervisors."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.address: tuple[str, int] = free.getsockname()
        urls = [server_url(name, port=self.address[1]) for name in ("", "web")]
        self.port = TunnelPort(urls, SETTINGS, Log("port"), Stats(), NOTHING)
        tasks = TaskGroup(Log("test"), Stats())
        self.web, self.first = (
            Supervisor(lambda url=url: make_server(url, self.port), SOON, tasks)  # type: ignore[misc]
            for url in reversed(urls)
        )
        self.all = [self.first, self.web]
        for supervisor in self.all:
            stack.callback(supervisor.close)
            supervisor.start()
            tasks.spawn("supervise", supervisor.run)
        stack.callback(tasks.kill)
        gevent.sleep(0)

    def connect_client(self, name: str = "") -> tuple[socket.socket, socket.socket]:
        """A client's control connection and one data connection."""
        client = connect_to(self._stack, self.address, hello(name))
        offer = parse_opening(read_line(client)[:-1])
        assert isinstance(offer, Offer)
        data = connect_to(self._stack, ("127.0.0.1", offer.data_port), DataHello(offer.sid).encode())
        assert data.recv(ID_LENGTH)
        return client, data

    def visit(self, supervisor: Supervisor, data: socket.socket) -> None:
        """Be served as a visitor by a data connection."""
        tunnel = supervisor.tunnel
        assert isinstance(tunnel, Server)
        visitor = connect_to(self._stack, tunnel._visitors[0].getsockname(), b"hello")
        assert data.recv(100) == b"hello"
        data.sendall(b"answer")
        assert visitor.recv(100) == b"answer"

    def crash(self, tunnel: object) -> None:
        """Fail one of a tunnel's own loops."""
        assert isinstance(tunnel, Server)
        tunnel._failed.set_exception(ZeroDivisionError())


def test_tunnels_of_one_port_serve_their_own_visitors(stack: ExitStack) -> None:
    shared = Shared(stack)
    _, first = shared.connect_client()
    _, web = shared.connect_client("web")
    shared.visit(shared.web, web)
    shared.visit(shared.first, first)


def test_a_client_that_is_refused_counts_for_the_tunnel_that_it_asked_for(stack: ExitStack) -> None:
    shared = Shared(stack)
    shared.web.tunnel.stop(0)
    late = connect_to(stack, shared.address, hello("web"))
    assert read_line(late) == b"//error?reason=shutdown\n"
    everywhere = (shared.port._stats, *(each.stats for each in shared.all))
    assert [stats.control_failures["shutdown"] for stats in everywhere] == [0, 0, 1]


def test_a_tunnels_crash_leaves_the_others_of_its_port_alone(stack: ExitStack) -> None:
    shared = Shared(stack)
    client, _ = shared.connect_client()
    web_client, web = shared.connect_client("web")
    crashed, untouched, listener = shared.first.tunnel, shared.web.tunnel, shared.port.tunnel[0]
    shared.crash(crashed)
    assert read_line(client) == b"//bye?reason=shutdown\n"
    until(lambda: shared.first.tunnel is not crashed)
    assert shared.port.tunnel[0] is listener
    shared.visit(shared.web, web)
    assert web_client.fileno() >= 0
    _, data = shared.connect_client()
    shared.visit(shared.first, data)
    assert shared.web.tunnel is untouched


def test_a_crash_of_the_port_fails_all_of_its_tunnels_and_they_come_back(stack: ExitStack) -> None:
    shared = Shared(stack)
    clients = [shared.connect_client(name)[0] for name in ("", "web")]
    crashed, listener = [each.tunnel for each in shared.all], shared.port.tunnel[0]

    def crash() -> None:
        raise ZeroDivisionError

    shared.port._parts[0]._start_loop("crash", crash)
    until(lambda: all(each.tunnel not in crashed for each in shared.all))
    assert all(is_closed_after_a_bye(client) for client in clients)
    assert listener.fileno() < 0
    assert not any(each.unhealthy_reason() for each in shared.all)
    for supervisor, name in zip(shared.all, ("", "web"), strict=True):
        shared.visit(supervisor, shared.connect_client(name)[1])


def test_a_tunnel_whose_close_crashes_leaves_its_port_all_the_same(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its clients would be told for ever that it is shutting down."""
    shared = Shared(stack)
    crashed = shared.first.tunnel
    with monkeypatch.context() as patched:
        patched.setattr(Clients, "close", lambda _: 1 / 0)
        shared.crash(crashed)
        until(lambda: shared.first.tunnel is not crashed)
    assert len(shared.port.slots) == 2
    shared.visit(shared.first, shared.connect_client()[1])
