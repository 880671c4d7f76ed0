"""Visitors' datagrams on the server: a session each with a v1 client, flows with a v2 client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import cast

import pytest
from gevent import Greenlet, socket

from nodepass.config.kinds import parse_rate
from nodepass.config.settings import rows
from nodepass.config.urls import Address
from nodepass.net.listen import close_all, listen_udp
from nodepass.server import datagram_listener as module
from nodepass.server.clients import Clients
from nodepass.server.datagram_listener import DatagramListener
from nodepass.tasks import WorkerPool
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.part import Common
from nodepass.visitors.policy import Policy
from nodepass.visitors.rules import Rules
from nodepass.wire.frames import FrameBuffer, encode_addresses, encode_frame
from nodepass.wire.negotiation import Offer
from tests.unit.controls import V1, V2, read_line, until
from tests.unit.servers import PATIENT, a_server_room, fill, make_clients, occupy, start

SOON = 0.05  # seconds
LARGEST = 100
"""UDP_DATA_BUF_SIZE."""


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Port:
    """A target port's UDP socket that is received on, with a limit of sessions."""

    def __init__(self, stack: ExitStack, limit: int = 10, **settings: object) -> None:
        self._stack = stack
        self.common: Common
        self.clients: Clients
        settings = {"udp_data_buf_size": LARGEST, "udp_read_timeout": PATIENT, **settings}
        self.common, self.clients = make_clients(stack, **settings)
        self.slot = self.clients.slots[0]
        self.sessions = WorkerPool(self.common.log, self.common.stats, limit)
        sockets = listen_udp(Address("127.0.0.1", 0), "target")
        stack.callback(close_all, sockets)
        stack.callback(self.sessions.kill)
        self.sock = sockets[0]
        policy = self.clients.flows.policy = Policy.of(self.common, Rules(self.common.settings, "server"))
        self.listener: DatagramListener = start(
            stack,
            DatagramListener(self.common, self.sock, self.clients, self.sessions, policy),
        )

    def visitor(self, source: str = "127.0.0.1") -> socket.socket:
        """A visitor that speaks UDP."""
        sock = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.settimeout(10)
        sock.bind((source, 0))
        sock.connect(self.sock.getsockname())
        return cast(socket.socket, sock)

    @property
    def drops(self) -> dict[str, int]:
        """What has been dropped, by reason."""
        return {why: number for why, number in self.common.stats.udp_drops.items() if number}


# With a v1 client


def test_with_a_v1_client_a_data_connection_carries_a_datagram_and_its_answer(stack: ExitStack) -> None:
    port = Port(stack)
    client, _ = occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    visitor = port.visitor()
    visitor.send(b"question")
    assert read_line(client.client) == b"//00000001#2\n"
    assert data.recv(100) == b"question"
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    assert data.recv(1) == b"", "it is used once"
    until(lambda: len(port.sessions) == 0)
    udp = port.common.stats.udp
    assert (udp.up.bytes, udp.down.bytes, udp.ended["completed"]) == (8, 6, 1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_with_a_v1_client_a_datagram_does_not_wait_for_good_under_a_rate(stack: ExitStack, direction: str) -> None:
    port = Port(stack, **{f"rate_{direction}": parse_rate("8k")}, udp_read_timeout=SOON)
    getattr(port.common.stats.tcp, direction).bytes += 10**6  # a quarter of an hour
    occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    port.visitor().send(b"question")
    if direction == "down":
        assert data.recv(100) == b"question"
        data.sendall(b"answer")
    until(lambda: port.drops == {"rate": 1})
    until(lambda: len(port.sessions) == 0)
    assert port.common.stats.udp.ended["unanswered"] == 1
    with suppress(ConnectionResetError):
        assert data.recv(1) == b"", "its data connection is closed"


def test_a_v1_client_that_closes_without_an_answer_leaves_the_visitor_without_one(stack: ExitStack) -> None:
    port = Port(stack)
    occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    port.visitor().send(b"question")
    assert data.recv(100) == b"question"
    data.close()
    until(lambda: port.common.stats.udp.ended["unanswered"])
    assert not port.drops


@pytest.mark.parametrize(
    ("answer", "ended"), [(b"x" * (LARGEST + 1), False), (b"", True)], ids=["too large", "a reset"]
)
def test_an_answer_that_cannot_be_read_is_counted(stack: ExitStack, answer: bytes, ended: bool) -> None:
    port = Port(stack)
    occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    port.visitor().send(b"question")
    assert data.recv(100) == b"question"
    if ended:
        data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        data.close()
    else:
        data.sendall(answer)
    until(lambda: port.drops == {"answer": 1})
    assert port.common.stats.udp.ended["unanswered"] == 1


@pytest.mark.parametrize(
    ("payload", "reason"), [(b"", "empty"), (b"x" * (LARGEST + 1), "too_large")], ids=["empty", "too large"]
)
def test_a_datagram_that_wire_v1_cannot_carry_is_dropped(stack: ExitStack, payload: bytes, reason: str) -> None:
    port = Port(stack)
    occupy(stack, port.clients, V1)
    port.visitor().send(payload)
    until(lambda: port.drops == {reason: 1})


def test_at_the_limit_a_datagram_is_dropped_and_not_waited_with(stack: ExitStack) -> None:
    port = Port(stack, limit=1)
    occupy(stack, port.clients, V1)
    visitor = port.visitor()
    visitor.send(b"waits for a data connection")
    until(port.sessions.full)
    visitor.send(b"finds no place")
    until(lambda: port.drops == {"limit": 1})


def test_without_a_data_connection_a_datagram_is_dropped(stack: ExitStack) -> None:
    port = Port(stack, pool_get_timeout=SOON)
    occupy(stack, port.clients, V1)
    port.visitor().send(b"question")
    until(lambda: port.drops == {"unserved": 1})
    assert port.common.stats.udp.ended["unserved"] == 1


# Without a client


def test_without_a_client_a_datagram_is_dropped_after_the_timeout(stack: ExitStack) -> None:
    port = Port(stack, pool_get_timeout=SOON)
    port.visitor().send(b"question")
    until(lambda: port.drops == {"unserved": 1})


@pytest.mark.parametrize("agreement", [V1, V2], ids=["v1", "v2"])
def test_a_datagram_waits_for_a_client_of_either_version(stack: ExitStack, agreement: object) -> None:
    port = Port(stack)
    port.visitor().send(b"question")
    until(lambda: len(port.sessions) == 1)
    occupy(stack, port.clients, agreement)  # type: ignore[arg-type]
    [data] = fill(stack, port.clients.slots[0], "00000001")
    received = data.recv(100)
    assert received == (b"question" if agreement is V1 else encode_frame(1, b"question"))


# With a v2 client


def test_with_a_v2_client_datagrams_go_on_a_lane_and_take_no_session(stack: ExitStack) -> None:
    port = Port(stack, udp_lanes=1)
    client, _ = occupy(stack, port.clients)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    visitors = [port.visitor() for _ in range(3)]
    for visitor in visitors:
        visitor.send(b"question")
    assert read_line(client.client) == b"//00000001#3\n"
    frames, got = FrameBuffer(), []
    while len(got) < 3:
        got += frames.feed(data.recv(1000))
    assert [payload for _, payload in got] == [b"question"] * 3
    assert len(port.sessions) == 0
    for flow, _ in got:
        data.sendall(encode_frame(flow, b"answer %d" % flow))
    assert {visitor.recv(100) for visitor in visitors} == {b"answer %d" % flow for flow, _ in got}


@pytest.mark.parametrize("wants", [True, False])
def test_a_flow_begins_with_its_addresses_where_the_client_wants_them(stack: ExitStack, wants: bool) -> None:
    port = Port(stack)
    occupy(stack, port.clients, Agreement(Offer(10102, 0, 5000), wants_addresses=wants))
    [data] = fill(stack, port.clients.slots[0], "00000001")
    visitor = port.visitor()
    source, target = (f"127.0.0.1:{name[1]}" for name in (visitor.getsockname(), visitor.getpeername()))
    expected = encode_addresses(1, source, target) if wants else b""
    for payload in (b"one", b"two"):
        visitor.send(payload)
        expected += encode_frame(1, payload)
    received = b""
    while len(received) < len(expected):
        received += data.recv(1000)
    assert received == expected


# Rules about visitors


@pytest.mark.parametrize("agreement", [V1, V2, None], ids=["v1", "v2", "no client"])
def test_a_refused_datagram_is_dropped_and_takes_nothing(stack: ExitStack, agreement: Agreement | None) -> None:
    port = Port(stack, deny=rows()["deny"].kind.parse("127.0.0.2"))
    if agreement:
        occupy(stack, port.clients, agreement)
        fill(stack, port.clients.slots[0], "00000001")
    port.visitor("127.0.0.2").send(b"question")
    refused = port.common.stats.visitors_refused
    until(lambda: refused["denied"] == 1)
    assert (len(port.sessions), len(port.clients.flows), len(port.clients.slots[0].pool)) == (0, 0, bool(agreement))
    port.visitor().send(b"question")
    until(lambda: len(port.sessions) + len(port.clients.flows) == 1)
    assert refused.total() == 1


def test_flows_of_one_address_are_limited_until_they_end(stack: ExitStack) -> None:
    port = Port(stack, sessions_per_address=rows()["sessions_per_address"].kind.parse("2"))
    occupy(stack, port.clients)
    fill(stack, port.clients.slots[0], "00000001")
    refused, visitors = port.common.stats.visitors_refused, [port.visitor() for _ in range(3)]
    for visitor in visitors:
        visitor.send(b"question")
    until(lambda: refused["address_sessions"] == 1)
    visitors[0].send(b"a flow that runs goes on")
    port.visitor("127.0.0.2").send(b"another address")
    until(lambda: len(port.clients.flows) == 3)
    port.clients.flows.end_all()
    until(lambda: len(port.clients.flows) == 0)
    visitors[2].send(b"question")
    until(lambda: len(port.clients.flows) == 1)
    assert refused.total() == 1


def test_with_a_v1_client_datagrams_of_one_address_are_limited_while_they_are_served(stack: ExitStack) -> None:
    port = Port(stack, sessions_per_address=rows()["sessions_per_address"].kind.parse("1"))
    occupy(stack, port.clients, V1)
    one, other = fill(stack, port.clients.slots[0], "00000001", "00000002")
    visitor = port.visitor()
    visitor.send(b"question")
    assert other.recv(100) == b"question"
    visitor.send(b"question")
    until(lambda: port.common.stats.visitors_refused["address_sessions"] == 1)
    other.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    until(lambda: len(port.sessions) == 0)
    visitor.send(b"question")
    assert one.recv(100) == b"question"


# Stop


def test_a_listener_that_stops_receives_nothing_more_and_answers_what_it_has_received(stack: ExitStack) -> None:
    port = Port(stack)
    occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    visitor = port.visitor()
    visitor.send(b"question")
    assert data.recv(100) == b"question"
    port.listener.stop(0)
    assert not port.listener.find_ended()
    visitor.send(b"too late")
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    until(lambda: len(port.sessions) == 0)
    assert not port.drops


def test_a_receive_error_does_not_end_the_loop(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([OSError(12, "no memory")])
    receive = module.receive_datagram

    def fail_first(sock: socket.socket) -> object:
        for error in errors:
            raise error
        return receive(sock)

    monkeypatch.setattr(module, "receive_datagram", fail_first)
    port = Port(stack)
    occupy(stack, port.clients, V1)
    [data] = fill(stack, port.clients.slots[0], "00000001")
    port.visitor().send(b"question")
    assert data.recv(100) == b"question"
    [loop] = port.listener._loops
    assert isinstance(loop, Greenlet)
    assert not loop.dead
