"""Lanes seen from the other end: which frames are where, what happens when one is stuck, and broken frames."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.support.log import Entry
from tests.support.process import Nodepass
from tests.support.sockets import datagram_socket, format_address, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.lane import LANE, LARGEST, Lane, make_announcement, make_frame
from tests.support.wire2.server import V2Server
from tests.support.wire2.talk import Talk

VISITORS = 12
BURST = 40
"""Large datagrams sent in a row before it is looked whether one was dropped."""


class LedLanes:
    """A v2 client led by the test: which lane each launch has opened."""

    def __init__(self, client: ClientSide, connections: int) -> None:
        self._client = client
        self._talks: dict[str, Talk] = dict(client.open_data() for _ in range(connections))

    def next(self, timeout: float | None = None) -> Lane:
        launch = self._client.hear_launch(timeout)
        assert launch.raw == f"//{launch.host}#{LANE}".encode()
        return Lane(self._talks.pop(launch.host))


@pytest.fixture(scope="module")
def shared() -> Iterator[OurServer]:
    """The server of all tests, whose clients come one after the other."""
    with OurServer(env={**CALM, "UDP_LANES": "3"}) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture
def server(shared: OurServer) -> OurServer:
    """The same, once it has noticed that the client before has gone: its flows and lanes have gone too."""
    until(lambda: len(shared.find("client.disconnected")) == len(shared.find("client.connected")))
    return shared


@pytest.fixture
def client(server: OurServer) -> Iterator[ClientSide]:
    with ClientSide(server.tunnel_address) as led:
        led.connect()
        yield led


def test_lanes_are_opened_as_flows_come_and_shared_when_there_are_enough(
    server: OurServer, client: ClientSide, stack: contextlib.ExitStack
) -> None:
    ready = LedLanes(client, 8)
    visitors = [stack.enter_context(datagram_socket()) for _ in range(VISITORS)]
    visitors[0].sendto(b"0", server.visitor_address)
    lanes = [ready.next()]
    for number, visitor in enumerate(visitors[1:], 1):
        visitor.sendto(b"%d" % number, server.visitor_address)
    lanes += [ready.next() for _ in range(2)]
    for lane in lanes:
        lane.stream.sock.settimeout(0.5)  # type: ignore[attr-defined]
    heard = {}
    for lane in lanes:
        with contextlib.suppress(TimeoutError):
            while True:
                flow, payload = lane.receive()
                assert flow not in heard, "two visitors have the same flow"
                heard[flow] = payload
                lane.send(flow, b"answer " + payload)
    assert sorted(heard.values()) == sorted(b"%d" % number for number in range(VISITORS))
    for number, visitor in enumerate(visitors):
        assert visitor.recv(100) == b"answer %d" % number


def test_a_flow_stays_on_its_lane(server: OurServer, client: ClientSide, stack: contextlib.ExitStack) -> None:
    ready = LedLanes(client, 8)
    visitors = [stack.enter_context(datagram_socket()) for _ in range(2)]
    lanes, flows = [], []
    for visitor in visitors:
        visitor.sendto(b"first", server.visitor_address)
        lanes.append(ready.next())
        flows.append(lanes[-1].receive()[0])
    for _ in range(5):
        for visitor, lane, flow in zip(visitors, lanes, flows, strict=True):
            visitor.sendto(b"again", server.visitor_address)
            assert lane.receive() == (flow, b"again")


@pytest.mark.programs
def test_frames_for_flows_that_nobody_has_are_dropped_and_harm_nobody(server: OurServer, client: ClientSide) -> None:
    ready, mark = LedLanes(client, 4), server.mark()
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        flow, _ = lane.receive()
        for stranger in (0, flow + 1000, 0xFFFFFFFF):
            lane.send(stranger, b"for nobody")
        lane.send(flow, b"for you")
        assert visitor.recv(100) == b"for you"
    assert not server.find("client.disconnected", after=mark)


@pytest.mark.programs
def test_frames_may_come_in_any_pieces(server: OurServer, client: ClientSide) -> None:
    ready = LedLanes(client, 4)
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        flow, _ = lane.receive()
        frames = make_frame(flow, b"one") + make_frame(flow, b"") + make_frame(flow, b"x" * 3000)
        for start in range(40):
            lane.stream.send(frames[start : start + 1])
        lane.stream.send(frames[40:])
        assert [visitor.recv(LARGEST) for _ in range(3)] == [b"one", b"", b"x" * 3000]


@pytest.mark.programs
def test_a_lane_that_ends_in_the_middle_of_a_frame_is_replaced(server: OurServer, client: ClientSide) -> None:
    ready = LedLanes(client, 8)
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        flow, _ = lane.receive()
        lane.stream.send(make_frame(flow, b"whole") + make_frame(flow, b"broken off")[:9])
        assert visitor.recv(100) == b"whole"
        lane.stream.abort()

        def lane_again() -> Lane | None:
            visitor.sendto(b"again", server.visitor_address)
            with contextlib.suppress(TimeoutError):
                return ready.next(0.1)
            return None

        replaced = until(lane_again)
        assert replaced
        flow, payload = replaced.receive()
        assert payload == b"again"
        replaced.send(flow, b"here I am")
        assert visitor.recv(100) == b"here I am"


def test_after_a_takeover_new_flows_go_to_the_new_client_and_old_ones_stay_while_their_lane_lives(
    server: OurServer, stack: contextlib.ExitStack
) -> None:
    visitors = [stack.enter_context(datagram_socket()) for _ in range(2)]
    clients = [ClientSide(server.tunnel_address, identity="0" * 16) for _ in range(2)]
    lanes = []
    for visitor, client in zip(visitors, clients, strict=True):
        stack.enter_context(client)
        client.connect()
        ready = LedLanes(client, 4)
        visitor.sendto(b"hello", server.visitor_address)
        lanes.append(ready.next())
        assert lanes[-1].receive()[1] == b"hello"
    for visitor, lane in zip(visitors, lanes, strict=True):
        visitor.sendto(b"again", server.visitor_address)
        flow, payload = lane.receive()
        assert payload == b"again"
        lane.send(flow, b"answer")
        assert visitor.recv(100) == b"answer"


def read_in_order(lane: Lane, last: bytes) -> int:
    """Read a lane up to that datagram: all frames whole and in order; how many there were."""
    numbers = []
    while True:
        _, payload = lane.receive()
        if payload == last:
            break
        assert len(payload) == LARGEST
        numbers.append(int.from_bytes(payload[:4], "big"))
    assert numbers == sorted(set(numbers))
    return len(numbers)


def numbered(number: int) -> bytes:
    return number.to_bytes(4, "big").ljust(LARGEST, b".")


def test_what_a_stuck_lane_cannot_take_is_dropped_counted_and_logged_by_our_server(
    server: OurServer, client: ClientSide
) -> None:
    ready, mark = LedLanes(client, 4), server.mark()
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        lane.receive()
        sent = 0
        while not server.find("datagram.dropped", after=mark, level="warn", reason="lane_full"):
            for sent in range(sent, sent + BURST):  # noqa: B020
                visitor.sendto(numbered(sent), server.visitor_address)
            assert sent < 5000, "no datagram was dropped: they are queued without bound"
        assert_counted(server)
        with datagram_socket() as other:  # another lane is not stuck
            other.sendto(b"other", server.visitor_address)
            assert ready.next().receive()[1] == b"other"
        assert drain(visitor, server, lane) < sent


def drain(visitor: socket.socket, server: OurServer, lane: Lane) -> int:
    """Read what is on the lane while the visitor says goodbye until that gets through."""
    lane.stream.sock.settimeout(0.2)  # type: ignore[attr-defined]
    count = 0
    while True:
        visitor.sendto(b"bye", server.visitor_address)
        with contextlib.suppress(TimeoutError):
            return count + read_in_order(lane, b"bye")


@pytest.mark.programs
def test_what_a_stuck_lane_cannot_take_is_dropped_counted_and_logged_by_our_client(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(V2Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    lane, _ = server.open_lane()
    lane.send(7, b"hello")
    _, source = target.udp.recvfrom(100)
    sent = 0
    while not client.find("datagram.dropped", level="warn", reason="lane_full"):
        for sent in range(sent, sent + BURST):  # noqa: B020
            target.udp.sendto(numbered(sent), source)
        assert sent < 5000, "no datagram was dropped: they are queued without bound"
    assert_counted(client)
    other, _ = server.open_lane()
    other.send(8, b"other")
    assert target.udp.recvfrom(100)[0] == b"other"
    assert ask_for_report(client)["flows"] == 2


def assert_counted(run: Nodepass) -> None:
    """Check that the statistics count what a full lane did not take."""
    assert ask_for_report(run)["counters"]["udp_drops"]["lane_full"] > 0


def ask_for_report(run: Nodepass) -> Entry:
    """The statistics of now."""
    mark = run.mark()
    run.send(signal.SIGUSR1)
    return run.wait_for("tunnel.report", after=mark)


def test_our_client_keeps_one_socket_for_each_flow(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    lanes = [server.open_lane()[0] for _ in range(2)]
    sources = {}
    for flow in (0, 1, 5, 0xFFFFFFFF):
        for _ in range(2):
            lanes[flow % 2].send(flow, b"%d" % flow)
            data, sources[flow] = target.udp.recvfrom(100)
            assert data == b"%d" % flow
    assert len(set(sources.values())) == len(sources)
    for flow, source in sources.items():
        target.udp.sendto(b"to %d" % flow, source)
        assert lanes[flow % 2].receive() == (flow, b"to %d" % flow)


def test_a_client_that_wants_addresses_is_told_those_of_each_flow(server: OurServer) -> None:
    """Before the flow's first datagram, and once."""
    with ClientSide(server.tunnel_address, wants=True) as client, datagram_socket() as visitor:
        client.connect()
        ready = LedLanes(client, 4)
        visitor.sendto(b"one", server.visitor_address)
        lane = ready.next()
        flow, payload = lane.receive()
        assert payload == b"one"
        source, target = (format_address(each) for each in (visitor.getsockname(), server.visitor_address))
        assert lane.announced == {flow: f"from={source}&to={target}"}
        visitor.sendto(b"two", server.visitor_address)
        assert lane.receive() == (flow, b"two")


@pytest.mark.programs
def test_a_client_that_does_not_want_addresses_is_told_none(server: OurServer, client: ClientSide) -> None:
    ready = LedLanes(client, 4)
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        assert lane.receive()[1] == b"hello"
        assert not lane.announced


@pytest.mark.programs
def test_addresses_of_a_flow_are_no_datagram_for_our_client(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V2Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    lane, _ = server.open_lane()
    lane.write(make_announcement(7, "from=192.0.2.7:1&to=192.0.2.1:2") + make_frame(7, b"hello"))
    assert target.udp.recvfrom(100)[0] == b"hello"
    lane.write(make_announcement(8, "rubbish") + make_announcement(9, "") + make_frame(8, b"world"))
    assert target.udp.recvfrom(100)[0] == b"world"


@pytest.mark.programs
def test_an_announcement_of_a_client_is_no_datagram_for_our_server(server: OurServer, client: ClientSide) -> None:
    ready = LedLanes(client, 4)
    with datagram_socket() as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        lane = ready.next()
        flow, _ = lane.receive()
        lane.write(make_announcement(flow, "from=192.0.2.7:1&to=192.0.2.1:2") + make_frame(flow, b"for you"))
        assert visitor.recv(100) == b"for you"
