"""A server behind proxies: the peer in a header is the visitor or the client, and counts in all limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.server import pending
from nodepass.tunnel.control import Agreement
from nodepass.wire.frames import FrameBuffer, encode_addresses, encode_frame
from nodepass.wire.negotiation import Offer
from nodepass.wire.proxy_protocol import Ends, encode_v1, encode_v2
from nodepass.wire.signals import Launch
from tests.unit import test_datagram_listener, test_visitor_listener
from tests.unit.controls import V1, is_closed, read_line, until
from tests.unit.secure_peers import SecurePeer
from tests.unit.servers import PATIENT, SOON, OpenPort, a_server_room, fill, occupy
from tests.unit.test_control_listener import hello, take_offer
from tests.unit.test_visitor_listener import assert_relayed, parse

PROXY, OTHER_PROXY = "127.0.0.5", "127.0.0.6"
PROXIES = parse("accept_proxy", f"{PROXY},{OTHER_PROXY}")
LOCAL = "198.51.100.1:443"
WANTS = Agreement(Offer(10102, 0, 5000), wants_addresses=True)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


def header(visitor: str, local: str = LOCAL) -> bytes:
    return encode_v1(Ends.parse(visitor, local))


def datagram(visitor: str, payload: bytes, local: str = LOCAL) -> bytes:
    return encode_v2(Ends.parse(visitor, local), "", datagram=True) + payload


def assert_reset(peer: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


# The target address


class Target(test_visitor_listener.Port):
    """A target port behind proxies."""

    def __init__(self, stack: ExitStack, **settings: object) -> None:
        self.lines: list[str] = []
        super().__init__(stack, access=self.lines.append, accept_proxy=PROXIES, **settings)

    def visit(self, said: bytes, source: str = PROXY) -> socket.socket:
        peer = self.connect(source)
        peer.sendall(said)
        return peer


def test_the_visitor_of_a_header_is_launched_logged_and_relayed(stack: ExitStack) -> None:
    port = Target(stack)
    client, _ = occupy(stack, port.slot, WANTS)
    [data] = fill(stack, port.slot, "00000001")
    visitor = port.visit(header("192.0.2.1:51000") + b"question")
    assert read_line(client.client) == Launch("00000001", 1, "192.0.2.1:51000", LOCAL).encode()
    assert data.recv(100) == b"question"
    data.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    visitor.close()
    data.close()
    until(lambda: port.lines)
    assert f" tcp 192.0.2.1:51000 {LOCAL} " in port.lines[0]
    assert " 8 6 " in port.lines[0]


def test_a_header_of_another_peer_is_data(stack: ExitStack) -> None:
    port = Target(stack, deny=parse("deny", "192.0.2.1"))
    client, _ = occupy(stack, port.slot, WANTS)
    [data] = fill(stack, port.slot, "00000001")
    spoof = header("192.0.2.1:51000")
    visitor = port.visit(spoof, "127.0.0.1")
    assert f"from=127.0.0.1:{visitor.getsockname()[1]}&".encode() in read_line(client.client)
    assert data.recv(100) == spoof
    assert port.refused == {}


@pytest.mark.parametrize("said", [b"PROXY UNKNOWN\r\n", encode_v2(None, "", datagram=False)], ids=["v1", "v2"])
def test_a_header_without_addresses_leaves_the_connections_own(stack: ExitStack, said: bytes) -> None:
    port = Target(stack)
    client, _ = occupy(stack, port.slot, WANTS)
    fill(stack, port.slot, "00000001")
    visitor = port.visit(said)
    line = read_line(client.client).decode()
    assert f"from={PROXY}:{visitor.getsockname()[1]}&to=127.0.0.1:{port.sock.getsockname()[1]}" in line


def test_rules_and_limits_count_the_visitor_and_not_the_proxy(stack: ExitStack) -> None:
    port = Target(
        stack,
        deny=parse("deny", f"192.0.2.9,{PROXY}"),
        sessions_per_address=parse("sessions_per_address", "1"),
        new_sessions_per_address=parse("new_sessions_per_address", "2/1h"),
    )
    client, _ = occupy(stack, port.slot)
    datas = fill(stack, port.slot, "00000001", "00000002", "00000003")
    assert_reset(port.visit(header("192.0.2.9:1")))
    first = port.visit(header("192.0.2.1:1"))
    assert_relayed(client, datas[2], first, "00000003")
    assert_reset(port.visit(header("192.0.2.1:2")))
    assert_relayed(client, datas[1], port.visit(header("192.0.2.2:1")), "00000002")
    first.close()
    datas[2].close()
    until(lambda: len(port.sessions) == 1)
    assert_relayed(client, datas[0], port.visit(header("192.0.2.1:3")), "00000001")
    assert port.refused == {"denied": 1, "address_sessions": 1}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n", "header_missing"),
        (b"PROXY TCP4 x\r\n", "header_malformed"),
        (b"PROXY TCP4", "header_late"),
    ],
)
def test_a_proxy_without_a_header_is_reset_and_counted(stack: ExitStack, said: bytes, reason: str) -> None:
    """It takes no data connection; its address is all that the access log can have."""
    port = Target(stack, first_byte_timeout=SOON if reason == "header_late" else PATIENT)
    occupy(stack, port.slot)
    fill(stack, port.slot, "00000001")
    peer = port.visit(said)
    assert_reset(peer)
    assert port.refused == {reason: 1}
    assert len(port.slot.pool) == 1
    assert len(port.sessions) == 0
    assert f" tcp {PROXY}:{peer.getsockname()[1]} " in port.lines[0]
    assert port.lines[0].endswith(reason)


def test_a_connection_that_waits_for_its_header_is_closed_with_the_sessions(stack: ExitStack) -> None:
    port = Target(stack)
    peer = port.visit(b"PROXY")
    until(lambda: len(port.sessions) == 1)
    gevent.sleep(0)
    port.sessions.kill()
    assert_reset(peer)


# Its datagrams


class Datagrams(test_datagram_listener.Port):
    """A target port's UDP socket behind proxies."""

    def __init__(self, stack: ExitStack, **settings: object) -> None:
        super().__init__(stack, accept_proxy=PROXIES, udp_lanes=1, **settings)

    @property
    def refused(self) -> dict[str, int]:
        return {why: number for why, number in self.common.stats.visitors_refused.items() if number}


def frames_of(data: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """So many datagrams on a lane."""
    frames, got = FrameBuffer(), list[tuple[int, bytes]]()
    while len(got) < count:
        got += frames.feed(data.recv(1000))
    return got


def test_flows_are_the_visitors_and_answers_go_to_the_socket_that_came_last(stack: ExitStack) -> None:
    port = Datagrams(stack)
    occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    one, two = port.visitor(PROXY), port.visitor(OTHER_PROXY)
    for proxy, visitor, payload in ((one, "192.0.2.1:1", b"a"), (one, "192.0.2.2:1", b"b"), (two, "192.0.2.1:1", b"")):
        proxy.send(datagram(visitor, payload))
    one.send(datagram("192.0.2.1:1", b"d", "198.51.100.1:444"))
    assert frames_of(data, 4) == [(1, b"a"), (2, b"b"), (1, b""), (3, b"d")]
    data.sendall(encode_frame(1, b"to a") + encode_frame(2, b"to b"))
    assert one.recv(100) == b"to b"
    assert two.recv(100) == b"to a"
    assert len(port.clients.flows) == 3


def test_a_flow_begins_with_the_addresses_of_the_header(stack: ExitStack) -> None:
    port = Datagrams(stack)
    occupy(stack, port.slot, WANTS)
    [data] = fill(stack, port.slot, "00000001")
    port.visitor(PROXY).send(datagram("[2001:db8::1]:1", b"hello", "[2001:db8::2]:53"))
    expected = encode_addresses(1, "[2001:db8::1]:1", "[2001:db8::2]:53") + encode_frame(1, b"hello")
    received = b""
    while len(received) < len(expected):
        received += data.recv(100)
    assert received == expected


def test_datagrams_of_other_peers_are_as_they_are(stack: ExitStack) -> None:
    port = Datagrams(stack)
    occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    spoof = datagram("192.0.2.1:1", b"hello")
    port.visitor().send(spoof)
    assert frames_of(data, 1) == [(1, spoof)]


def test_datagrams_without_a_header_are_dropped_and_rules_judge_the_others(stack: ExitStack) -> None:
    port = Datagrams(
        stack,
        deny=parse("deny", f"192.0.2.9,{PROXY}"),
        sessions_per_address=parse("sessions_per_address", "1"),
    )
    occupy(stack, port.slot)
    [data] = fill(stack, port.slot, "00000001")
    proxy = port.visitor(PROXY)
    for said in (
        b"hello",
        datagram("192.0.2.1:1", b"")[:-1],
        datagram("192.0.2.9:1", b"denied"),
        datagram("192.0.2.1:1", b"first"),
        datagram("192.0.2.1:2", b"too many"),
        datagram("192.0.2.2:1", b"last"),
    ):
        proxy.send(said)
    assert frames_of(data, 2) == [(1, b"first"), (2, b"last")]
    assert port.refused == {"header_missing": 1, "header_malformed": 1, "denied": 1, "address_sessions": 1}


def test_a_v1_client_serves_a_datagram_and_the_proxy_gets_its_answer(stack: ExitStack) -> None:
    port = Datagrams(stack)
    occupy(stack, port.slot, V1)
    [data] = fill(stack, port.slot, "00000001")
    proxy = port.visitor(PROXY)
    proxy.send(datagram("192.0.2.1:1", b"question"))
    assert data.recv(100) == b"question"
    data.sendall(b"answer")
    assert proxy.recv(100) == b"answer"


# The tunnel port and the data port


def open_port(stack: ExitStack, **settings: object) -> OpenPort:
    return OpenPort(stack, accept_proxy=PROXIES, **settings)


def test_a_client_has_the_address_of_its_header_and_so_have_its_data_connections(stack: ExitStack) -> None:
    """Without a key a data connection must come from the client's address, whichever proxy it comes through."""
    port = open_port(stack)
    take_offer(port.connect(header("192.0.2.1:51000"), hello(), source=PROXY))
    until(lambda: port.slot.client == "192.0.2.1:51000")
    assert len(port.connect_data(header("192.0.2.1:51001"), source=OTHER_PROXY).recv(8)) == 8
    until(lambda: len(port.slot.pool) == 1)
    assert port.connect_data(header("192.0.2.2:1"), source=PROXY).recv(1) == b""
    assert port.connect_data(source="127.0.0.1").recv(1) == b""
    assert port.data_failures == {"wrong_address": 2}


def test_a_header_comes_before_tls_and_before_the_hello(stack: ExitStack) -> None:
    port = open_port(stack, tls=1, mux=True)
    for said in (header("192.0.2.1:51000"), encode_v2(Ends.parse("192.0.2.1:51000", LOCAL), "", datagram=False)):
        peer = SecurePeer(stack, port.connect(said, source=PROXY))
        peer.sendall(hello())
        take_offer(peer)
        until(lambda: port.slot.client == "192.0.2.1:51000")


def test_a_header_of_another_peer_is_a_foreign_protocol_at_the_tunnel_port(stack: ExitStack) -> None:
    port = open_port(stack)
    assert is_closed(port.connect(header("192.0.2.1:51000"), hello()))
    assert port.control_failures == {"protocol": 1}


@pytest.mark.parametrize(
    ("said", "reason"),
    [(hello(), "header_missing"), (b"PROXY TCP4 x\r\n", "header_malformed"), (b"PROXY", "header_late")],
)
def test_without_a_header_a_proxy_is_reset_at_both_ports(stack: ExitStack, said: bytes, reason: str) -> None:
    port = open_port(stack, handshake_timeout=SOON if reason == "header_late" else PATIENT)
    assert_reset(port.connect(said, source=PROXY))
    assert_reset(port.connect_data(said, source=PROXY))
    assert port.control_failures == port.data_failures == {reason: 1}


def test_a_silent_proxy_costs_no_greenlet_and_is_reset_at_the_timeout(stack: ExitStack) -> None:
    port = open_port(stack, handshake_timeout=SOON)
    connections = port.control_listener._pending
    peer = port.connect(source=PROXY)
    until(lambda: len(connections) == 1)
    assert len(connections._tasks) == 0
    assert_reset(peer)
    assert port.control_failures == {"header_late": 1}


def test_pending_connections_count_for_the_network_of_their_header(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One flooding network behind a proxy drops its own connections, and none of the others that come through it."""
    monkeypatch.setattr(pending, "PER_NETWORK", 2)
    monkeypatch.setattr(pending, "AT_LEAST", 1)
    monkeypatch.setattr(pending, "pending_limit", lambda: 8)
    port = open_port(stack)
    connections = port.control_listener._pending
    other = port.connect(header("198.51.100.7:1"), source=PROXY)
    until(lambda: connections._here.count("198.51.100.0/24") == 1)
    for number in range(1, 5):
        port.connect(header(f"192.0.2.{number}:1"), source=PROXY)
    until(lambda: port.common.stats.trouble["pending_dropped"] == 2)
    until(lambda: connections._here.count("192.0.2.0/24") == 2)
    assert connections._here.count("127.0.0.0/24") == 0
    other.sendall(hello())
    take_offer(other)


def test_a_v1_client_behind_a_proxy_may_be_silent(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the server to speak, once its header has come."""
    monkeypatch.setattr("nodepass.server.control_listener.SILENCE", SOON)
    port = open_port(stack)
    client = port.connect(header("192.0.2.1:51000"), source=PROXY)
    assert read_line(client) == port.port.offer(1).encode()
    assert len(port.connect_data(header("192.0.2.1:51001"), source=PROXY).recv(8)) == 8
    until(lambda: port.slot.client == "192.0.2.1:51000")
