"""Visitors of TCP on the server: relayed within the limit, closed where no client serves them, drained at a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import gevent
import pytest
from gevent import socket

from nodepass.config.settings import rows
from nodepass.net import unix
from nodepass.net.sockets import reset_on_close
from nodepass.net.unix import UnixListener
from nodepass.server import visitor_listener as module
from nodepass.server.clients import Clients
from nodepass.server.visitor_listener import VisitorListener
from nodepass.tasks import WorkerPool
from nodepass.tunnel.part import Common
from nodepass.visitors.access_log import COLUMNS
from nodepass.visitors.policy import Policy
from nodepass.visitors.rules import Rules
from nodepass.wire.signals import BeatAnswer
from tests.unit.controls import V1, Ends, read_line, until
from tests.unit.servers import a_server_room, connect, fill, listen_on, make_clients, occupy, start
from tests.unit.streams import receive_all

SOON = 0.05  # seconds


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Port:
    """A target port that is served, with a limit of sessions."""

    def __init__(
        self, stack: ExitStack, limit: int = 10, access: Callable[[str], object] | None = None, **settings: object
    ) -> None:
        """`access`: gets the lines of the access log."""
        self._stack = stack
        self.common: Common
        self.clients: Clients
        common, self.clients = make_clients(stack, **settings)
        self.slot = self.clients.slots[0]
        self.common = replace(common, access=access)
        self.sock = listen_on(stack)
        reset_on_close(self.sock, True)  # as `listen_both` has it
        self.sessions = WorkerPool(self.common.log, self.common.stats, limit)
        stack.callback(self.sessions.kill)
        policy = Policy.of(self.common, Rules(self.common.settings, "server"))
        self.listener: VisitorListener = start(
            stack,
            VisitorListener(self.common, [self.sock], self.clients, self.sessions, policy),
        )

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """A visitor."""
        return connect(self._stack, self.sock, source)

    @property
    def refused(self) -> dict[str, int]:
        """Which visitors have been refused, by reason."""
        return {why: number for why, number in self.common.stats.visitors_refused.items() if number}


def parse(name: str, text: str) -> object:
    """A setting as a user writes it."""
    return rows()[name].kind.parse(text)


def assert_relayed(client: Ends, data: socket.socket, visitor: socket.socket, id: str = "00000001") -> None:
    """That a visitor reaches the client's end of a data connection, and is reached."""
    assert read_line(client.client) == f"//{id}#1\n".encode()
    visitor.sendall(b"question")
    assert data.recv(100) == b"question"
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"


def test_a_visitor_is_relayed_over_a_data_connection_and_both_are_closed(stack: ExitStack) -> None:
    port = Port(stack)
    client, _ = occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    visitor = port.connect()
    assert_relayed(client, data, visitor)
    assert len(port.sessions) == 1
    data.close()
    assert receive_all(visitor) == b""
    visitor.close()
    until(lambda: len(port.sessions) == 0)
    assert port.common.stats.tcp.ended["completed"] == 1


def test_a_visitor_waits_for_a_data_connection(stack: ExitStack) -> None:
    port = Port(stack)
    client, _ = occupy(stack, port.slot)
    visitor = port.connect()
    until(lambda: len(port.sessions) == 1)
    [data] = fill(stack, port.slot, "00000001")
    assert_relayed(client, data, visitor)


def test_a_visitor_without_a_data_connection_is_reset_and_counted(stack: ExitStack) -> None:
    """An empty stream would look like an answer."""
    port = Port(stack, pool_get_timeout=SOON)
    visitor = port.connect()
    with pytest.raises(ConnectionResetError):
        visitor.recv(1)
    until(lambda: len(port.sessions) == 0)
    assert port.common.stats.tcp.ended["unserved"] == 1


def test_a_visitor_is_reset_at_once_while_no_target_of_the_client_answers(stack: ExitStack) -> None:
    lines: list[str] = []
    port = Port(stack, access=lines.append, pool_get_timeout=60.0)
    client, _ = occupy(stack, port.slot)
    assert port.slot.control
    port.slot.control._take_answer(BeatAnswer(False))
    visitor = port.connect()
    with pytest.raises(ConnectionResetError):
        visitor.recv(1)
    assert port.common.stats.tcp.ended["unreachable"] == 1
    assert [line.split()[-1] for line in lines] == ["unreachable"]
    port.slot.control._take_answer(BeatAnswer(True))
    visitor = port.connect()
    [data] = fill(stack, port.slot, "00000001")
    assert_relayed(client, data, visitor)


def test_a_visitor_on_a_unix_socket_has_no_address_and_is_relayed_like_others(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix, "socket", socket)  # as in the patched program
    lines: list[str] = []
    path = str(tmp_path / "app.sock")
    rules = {name: parse(name, text) for name, text in (("allow", "192.0.2.1"), ("sessions_per_address", "1"))}
    port = Port(stack, access=lines.append, **rules)
    client, _ = occupy(stack, port.slot)
    listener = UnixListener(path, "target address")
    stack.callback(listener.close)
    policy = Policy.of(port.common, Rules(port.common.settings, "server"))
    assert policy
    start(stack, VisitorListener(port.common, [listener.sock], port.clients, port.sessions, policy))
    visitor = stack.enter_context(socket.socket(socket.AF_UNIX))
    visitor.connect(path)
    [data] = fill(stack, port.slot, "00000001")
    assert_relayed(client, data, visitor)
    visitor.close()
    data.close()
    until(lambda: lines)
    columns = dict(zip(("date", "time", *COLUMNS), lines[0].split(), strict=True))
    assert (columns["visitor"], columns["local"]) == ("-", f"unix:{path}")


def test_the_end_of_a_visitor_that_left_at_once_does_not_overtake_its_launch_at_a_v1_client(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would take the data connection for a dead one."""
    waits: list[float] = []
    monkeypatch.setattr(module, "HEAD_START", SOON)
    port = Port(stack)
    client, _ = occupy(stack, port.slot, V1)
    [data] = fill(stack, port.slot, "00000001")
    sleep = gevent.sleep

    def note(seconds: float = 0) -> None:
        waits.append(seconds)
        sleep(seconds)

    visitor = port.connect()
    visitor.shutdown(socket.SHUT_WR)
    monkeypatch.setattr(module.gevent, "sleep", note)
    assert read_line(client.client) == b"//00000001#1\n"
    assert data.recv(1) == b""
    assert SOON in waits


def test_at_the_limit_the_next_visitor_waits_until_a_session_has_ended(stack: ExitStack) -> None:
    port = Port(stack, limit=1)
    client, _ = occupy(stack, port.slot)
    first_data, second_data = fill(stack, port.slot, "00000001", "00000002")
    first = port.connect()
    assert_relayed(client, second_data, first, "00000002")
    second = port.connect()
    until(lambda: port.common.stats.trouble["limit_reached"])
    assert len(port.slot.pool) == 1
    first.close()
    second_data.close()
    assert_relayed(client, first_data, second)


# Rules about visitors


def test_a_refused_visitor_is_reset_and_takes_no_data_connection(stack: ExitStack) -> None:
    port = Port(stack, allow=parse("allow", "127.0.0.0/30"), deny=parse("deny", "127.0.0.2"))
    client, _ = occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    for source in ("127.0.0.2", "127.0.0.9"):
        with pytest.raises(ConnectionResetError):
            port.connect(source).recv(1)
    assert port.refused == {"denied": 1, "not_allowed": 1}
    assert len(port.slot.pool) == 1
    assert_relayed(client, data, port.connect())


def test_the_access_log_has_refused_visitors_with_the_reason_as_their_outcome(stack: ExitStack) -> None:
    lines: list[str] = []
    port = Port(stack, access=lines.append, pool_get_timeout=SOON, deny=parse("deny", "127.0.0.2"))
    for source in ("127.0.0.2", "127.0.0.1"):
        visitor = port.connect(source)
        with pytest.raises(ConnectionResetError):
            visitor.recv(1)
    until(lambda: len(lines) == 2)
    shown = [dict(zip(COLUMNS, line.split(" ")[2:], strict=True)) for line in lines]
    assert [each["outcome"] for each in shown] == ["denied", "unserved"]
    assert shown[0]["visitor"].startswith("127.0.0.2:")
    assert [shown[0][name] for name in ("session", "client", "up", "down", "first_byte")] == ["-", "-", "0", "0", "-"]
    assert port.refused == {"denied": 1}


def test_sessions_of_one_address_are_limited_until_one_ends(stack: ExitStack) -> None:
    port = Port(stack, sessions_per_address=parse("sessions_per_address", "1"))
    client, _ = occupy(stack, port.slot)
    first_data, second_data = fill(stack, port.slot, "00000001", "00000002")
    first = port.connect()
    assert_relayed(client, second_data, first, "00000002")
    with pytest.raises(ConnectionResetError):
        port.connect().recv(1)
    assert port.refused == {"address_sessions": 1}
    first.close()
    second_data.close()
    until(lambda: len(port.sessions) == 0)
    assert_relayed(client, first_data, port.connect())


def test_a_refused_visitor_leaves_the_count_of_its_address_alone(stack: ExitStack) -> None:
    port = Port(
        stack,
        pool_get_timeout=SOON,
        sessions_per_address=parse("sessions_per_address", "2"),
        new_sessions_per_address=parse("new_sessions_per_address", "1/1h"),
    )
    for _ in range(4):
        with pytest.raises(ConnectionResetError):
            port.connect().recv(1)
    until(lambda: len(port.sessions) == 0)
    assert port.refused == {"address_rate": 3}


# Stop and close


def test_a_listener_that_stops_serves_visitors_that_have_connected_and_no_others(stack: ExitStack) -> None:
    port = Port(stack)
    client, _ = occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    address = port.sock.getsockname()
    port.listener._end_loops()  # so that it waits in the kernel's queue
    waiting = port.connect()
    port.listener.stop(10)
    assert_relayed(client, data, waiting)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 10)


def test_a_stop_lets_sessions_go_on(stack: ExitStack) -> None:
    port = Port(stack)
    client, _ = occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    visitor = port.connect()
    assert_relayed(client, data, visitor)
    port.listener.stop(10)
    visitor.sendall(b"the end")
    assert data.recv(100) == b"the end"


def test_a_stop_takes_no_longer_than_its_timeout(stack: ExitStack) -> None:
    """A visitor that waits at the limit is reset then."""
    port = Port(stack, limit=1)
    port.connect()
    until(port.sessions.full)
    late = port.connect()
    port.listener.stop(SOON)
    with pytest.raises(ConnectionResetError):
        late.recv(1)


def test_a_listener_that_closes_accepts_nothing_more(stack: ExitStack) -> None:
    port = Port(stack)
    port.listener.close()
    port.connect()
    gevent.sleep(0)
    assert len(port.sessions) == 0
    assert not port.listener.find_ended()
