"""The server's flows of UDP: which lane carries which visitor, and what becomes of them when lanes and clients end."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import pytest
from gevent import socket

from nodepass.config.kinds import parse_rate
from nodepass.net.udp import ReplyAddress
from nodepass.server import udp_flows
from nodepass.server.clients import Clients
from nodepass.server.udp_flows import LAST_NUMBER
from nodepass.tunnel import udp as lanes
from nodepass.tunnel.control import STOPPING
from nodepass.tunnel.part import Common
from nodepass.wire.frames import HEADER, encode_frame
from tests.unit.controls import V1, V2, until
from tests.unit.servers import a_server_room, fill, make_clients, occupy

SOON = 0.05  # seconds


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Flows:
    """A slot's flows, and visitors that bring datagrams."""

    def __init__(self, stack: ExitStack, **settings: object) -> None:
        self._stack = stack
        self.common: Common
        self.clients: Clients
        self.common, self.clients = make_clients(stack, **settings)
        self.slot = self.clients.slots[0]
        self.flows = self.clients.flows
        self._sock = self._udp_socket()

    def _udp_socket(self, host: str = "127.0.0.1") -> socket.socket:
        sock: socket.socket = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((host, 0))
        sock.settimeout(10)
        return sock

    def visitor(self, host: str = "127.0.0.1") -> Visitor:
        return Visitor(self, self._udp_socket(host))

    def carry(self, payload: bytes, visitor: socket.socket) -> None:
        self.flows.carry(self._sock, payload, ReplyAddress(visitor.getsockname(), ()))

    @property
    def drops(self) -> dict[str, int]:
        return {why: number for why, number in self.common.stats.udp_drops.items() if number}


class Visitor:
    """An address that sends datagrams and hears answers."""

    def __init__(self, flows: Flows, sock: socket.socket) -> None:
        self._flows = flows
        self.sock = sock

    def send(self, payload: bytes) -> None:
        self._flows.carry(payload, self.sock)


def read_frame(data: socket.socket) -> tuple[int, bytes]:
    """The flow and the payload of the next frame on a lane."""
    flow, length = HEADER.unpack(receive_exactly(data, HEADER.size))
    return flow, receive_exactly(data, length)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        received = sock.recv(size - len(data))
        assert received, f"the end after {data!r}"
        data += received
    return data


def begin_flow(stack: ExitStack, **settings: object) -> tuple[Flows, socket.socket]:
    """The flows of a slot, of which one has begun, and its lane."""
    flows = Flows(stack, **settings)
    occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    flows.visitor().send(b"hello")
    assert read_frame(data) == (1, b"hello")
    return flows, data


def test_a_visitors_datagrams_are_one_flow_and_its_answers_come_back(stack: ExitStack) -> None:
    flows = Flows(stack)
    occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    visitor = flows.visitor()
    visitor.send(b"one")
    visitor.send(b"two")
    assert [read_frame(data) for _ in range(2)] == [(1, b"one"), (1, b"two")]
    assert len(flows.flows) == 1
    data.sendall(encode_frame(1, b"answer"))
    assert visitor.sock.recv(100) == b"answer"
    udp = flows.common.stats.udp
    assert (udp.begun, udp.up.bytes, udp.down.bytes) == (1, 6, 6)


def test_visitors_share_lanes_the_least_busy_first(stack: ExitStack) -> None:
    flows = Flows(stack, udp_lanes=2)
    occupy(stack, flows.slot)
    lanes = fill(stack, flows.slot, "00000001", "00000002")
    visitors = [flows.visitor() for _ in range(4)]
    for visitor in visitors:
        visitor.send(b"hello")
    carried = [{read_frame(data)[0] for _ in range(2)} for data in lanes]
    assert sorted(carried, key=min) == [{1, 3}, {2, 4}]


def test_a_flow_ends_when_it_has_been_silent_and_its_lane_with_it(stack: ExitStack) -> None:
    flows, data = begin_flow(stack, udp_session_timeout=0.3)
    data.sendall(encode_frame(1, b"answer"))
    assert data.recv(1) == b""
    assert len(flows.flows) == 0
    assert flows.common.stats.udp.ended["completed"] == 1


def test_a_lane_without_flows_ends_in_order_so_that_the_client_sees_no_cut_stream(stack: ExitStack) -> None:
    flows, data = begin_flow(stack, udp_session_timeout=0.2)
    assert data.recv(1) == b""  # and no reset
    assert flows.common.stats.udp.ended["unanswered"] == 1


def test_a_client_that_serves_no_lanes_is_asked_again_after_a_pause_only(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp_flows, "REFUSED_PAUSE", 0.3)
    flows = Flows(stack, udp_lanes=1)
    occupy(stack, flows.slot)
    first, second = fill(stack, flows.slot, "00000001", "00000002")
    flows.visitor().send(b"one")
    assert read_frame(second) == (1, b"one")
    second.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    second.close()
    until(lambda: not len(flows.flows))
    flows.visitor().send(b"two")
    assert flows.drops == {"lane_missing": 1}
    assert len(flows.slot.pool) == 1
    until(lambda: not flows.flows._refused)
    flows.visitor().send(b"three")
    assert read_frame(first)[1] == b"three"


def test_flows_go_to_the_client_that_serves_them_and_where_none_does_datagrams_are_dropped(stack: ExitStack) -> None:
    """Without UDP=off in a hello, a client would be asked for each lane, and would cut it."""
    flows, without = Flows(stack, clients=2, udp_lanes=1), replace(V2, off="udp")
    first, second = flows.clients.slots
    occupy(stack, first, without)
    fill(stack, first, "00000001")
    for _ in range(2):
        flows.visitor().send(b"lost")
    assert (flows.drops, len(flows.flows), len(first.pool)) == ({"lane_missing": 2}, 0, 1)
    occupy(stack, second, replace(V2, client="second"))
    [data] = fill(stack, second, "00000002")
    flows.visitor().send(b"hello")
    flows.visitor().send(b"hello")
    assert [read_frame(data) for _ in range(2)] == [(1, b"hello"), (2, b"hello")]
    assert len(first.pool) == 1


def test_a_pause_of_a_client_that_serves_no_lanes_ends_with_the_flows(stack: ExitStack) -> None:
    flows = Flows(stack, udp_lanes=1)
    occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    flows.visitor().send(b"one")
    read_frame(data)
    data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    data.close()
    until(lambda: flows.flows._refused)
    [pausing] = [lane.task for lane in flows.flows._refused]
    assert pausing
    flows.flows.end_all()
    assert pausing.dead
    assert not flows.flows._refused


def test_one_network_has_at_most_a_quarter_of_the_flows(stack: ExitStack) -> None:
    flows = Flows(stack, semaphore_limit=8, udp_lanes=1)
    occupy(stack, flows.slot)
    fill(stack, flows.slot, "00000001")
    other = flows.visitor("127.0.9.1")
    other.send(b"hello")
    for _ in range(20):
        flows.visitor().send(b"flood")
    assert len(flows.flows) == 3
    assert flows.common.stats.udp.ended["evicted"] == 18
    other.send(b"still the same flow")
    assert flows.common.stats.udp.begun == 21


def test_flow_numbers_wrap_around_those_that_are_still_open(stack: ExitStack) -> None:
    flows = Flows(stack, udp_lanes=1)
    occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    staying = flows.visitor()
    staying.send(b"hello")
    flows.flows._last_number = LAST_NUMBER - 1
    late = [flows.visitor() for _ in range(2)]
    for visitor in late:
        visitor.send(b"hello")
    assert [read_frame(data)[0] for _ in range(3)] == [1, LAST_NUMBER, 2]
    data.sendall(encode_frame(1, b"yours"))
    assert staying.sock.recv(100) == b"yours"


def test_of_too_many_flows_the_longest_idle_one_makes_room(stack: ExitStack) -> None:
    flows = Flows(stack, semaphore_limit=2, udp_lanes=1)
    occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    first, second, third = (flows.visitor(f"127.0.{network}.1") for network in range(3))
    for visitor in (first, second, first, third):
        visitor.send(b"hello")
    assert [read_frame(data)[0] for _ in range(4)] == [1, 2, 1, 3]
    assert len(flows.flows) == 2
    assert flows.common.stats.udp.ended["evicted"] == 1
    data.sendall(encode_frame(2, b"for nothing") + encode_frame(1, b"answer"))
    assert first.sock.recv(100) == b"answer"
    assert flows.drops == {"flow_over": 1}


def test_an_answer_on_another_lane_than_its_flows_is_dropped(stack: ExitStack) -> None:
    """A flow's number says nothing about a visitor of another lane."""
    flows = Flows(stack, udp_lanes=2)
    occupy(stack, flows.slot)
    lanes = fill(stack, flows.slot, "00000001", "00000002")
    visitors = [flows.visitor() for _ in range(2)]
    for visitor in visitors:
        visitor.send(b"hello")
    numbers = [read_frame(data)[0] for data in lanes]
    for data, other in zip(lanes, reversed(numbers), strict=True):
        data.sendall(encode_frame(other, b"wrong"))
    until(lambda: flows.drops == {"flow_over": 2})


def test_datagrams_of_a_lane_without_a_data_connection_are_lost_and_counted(stack: ExitStack) -> None:
    flows = Flows(stack, pool_get_timeout=SOON)
    occupy(stack, flows.slot)
    flows.visitor().send(b"hello")
    until(lambda: flows.drops == {"lane_missing": 1})
    assert len(flows.flows) == 0
    assert flows.common.stats.udp.ended["lost"] == 1


def test_lanes_are_not_launched_at_a_v1_client(stack: ExitStack) -> None:
    flows = Flows(stack)
    occupy(stack, flows.slot, V1)
    fill(stack, flows.slot, "00000001")
    flows.visitor().send(b"hello")
    until(lambda: flows.drops == {"lane_missing": 1})


def test_a_reply_whose_turn_comes_while_the_socket_is_full_is_dropped_and_counted(stack: ExitStack) -> None:
    """The event loop begins turns, so that the send must not wait."""

    class FullSocket:
        def sendmsg(self, _buffers: object, _control: object, flags: int, _to: object) -> None:
            assert flags & socket.MSG_DONTWAIT
            raise BlockingIOError

    flows, data = begin_flow(stack, rate_down=parse_rate("8M"))
    [flow] = flows.flows._by_number.values()
    flow.sock = cast(Any, FullSocket())
    flows.common.stats.tcp.down.bytes += 110_000  # beyond what was saved up
    data.sendall(encode_frame(1, b"answer"))
    until(lambda: flows.drops == {"visitor_unreachable": 1})


def test_a_lane_that_is_full_drops_datagrams(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "QUEUE", 1000)
    flows = Flows(stack)
    occupy(stack, flows.slot)
    visitor = flows.visitor()
    visitor.send(bytes(900))
    visitor.send(bytes(900))
    assert flows.drops == {"lane_full": 1}
    assert flows.common.stats.udp.up.bytes == 900


def test_the_end_of_a_lane_ends_its_flows_and_the_next_datagram_begins_another(stack: ExitStack) -> None:
    flows = Flows(stack)
    occupy(stack, flows.slot)
    [first] = fill(stack, flows.slot, "00000001")
    visitor = flows.visitor()
    visitor.send(b"hello")
    assert read_frame(first) == (1, b"hello")
    first.close()
    until(lambda: len(flows.flows) == 0)
    [second] = fill(stack, flows.slot, "00000002")
    visitor.send(b"again")
    assert read_frame(second) == (2, b"again")


def test_lanes_of_a_client_that_was_replaced_go_on_and_new_flows_go_to_the_next(stack: ExitStack) -> None:
    flows = Flows(stack, udp_lanes=1)
    _, control = occupy(stack, flows.slot)
    [old] = fill(stack, flows.slot, "00000001")
    staying, coming = flows.visitor(), flows.visitor()
    staying.send(b"hello")
    assert read_frame(old) == (1, b"hello")
    flows.slot.release(control, STOPPING)
    occupy(stack, flows.slot)
    [new] = fill(stack, flows.slot, "00000002")
    staying.send(b"still here")
    assert read_frame(old) == (1, b"still here")
    coming.send(b"hello")
    assert read_frame(new) == (2, b"hello")
    old.sendall(encode_frame(1, b"answer"))
    assert staying.sock.recv(100) == b"answer"


def test_a_flow_on_a_replaced_clients_lane_that_acknowledges_nothing_begins_again(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = Flows(stack)
    _, control = occupy(stack, flows.slot)
    [old] = fill(stack, flows.slot, "00000001")
    visitor = flows.visitor()
    visitor.send(b"hello")
    assert read_frame(old) == (1, b"hello")
    flows.slot.release(control, STOPPING)
    occupy(stack, flows.slot)
    [new] = fill(stack, flows.slot, "00000002")
    monkeypatch.setattr(lanes, "stalled", lambda *_: True)
    visitor.send(b"again")
    assert read_frame(new) == (2, b"again")
    assert flows.common.stats.udp.ended["lost"] == 1


def test_lanes_of_a_client_that_has_vanished_end(stack: ExitStack) -> None:
    flows = Flows(stack)
    _, control = occupy(stack, flows.slot)
    [data] = fill(stack, flows.slot, "00000001")
    flows.visitor().send(b"hello")
    assert read_frame(data) == (1, b"hello")
    control.vanished = True
    flows.slot.release(control, STOPPING)
    with pytest.raises(ConnectionResetError):
        data.recv(1)
    assert len(flows.flows) == 0


def test_a_flow_whose_lane_was_ended_before_it_ran_does_not_stay_on_it(stack: ExitStack) -> None:
    flows = Flows(stack, udp_lanes=1)
    occupy(stack, flows.slot)
    visitor = flows.visitor()
    visitor.send(b"lost")
    flows.flows.end_all()
    assert len(flows.flows) == 0
    [data] = fill(stack, flows.slot, "00000001")
    visitor.send(b"hello")
    assert read_frame(data) == (2, b"hello")
    assert flows.common.stats.udp.ended["lost"] == 1


def test_flows_end_when_they_are_closed(stack: ExitStack) -> None:
    flows, data = begin_flow(stack)
    flows.flows.close()
    with pytest.raises(ConnectionResetError):
        data.recv(1)
    assert len(flows.flows) == 0
    assert not flows.flows.find_ended()
