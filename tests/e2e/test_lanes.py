"""UDP as applications use it: flows on lanes, with every size, many answers, unasked ones, and an end."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.process import Environment
from tests.support.sockets import PATIENCE, Address, datagram_socket, is_silent
from tests.support.target import Target
from tests.support.tunnel import STEADY, OurClient, OurServer, Tunnel
from tests.support.v2_echo import ROOM, DatagramEcho
from tests.support.v2_tunnel import V2Pair, V2Side, open_v2_tunnel, open_v2_tunnels
from tests.support.wire2.lane import LARGEST

SIZES = (0, 1, 1472, 1473, 9000, LARGEST)
SIDES: tuple[tuple[V2Side, V2Side], ...] = (("ours", "ours"), ("ours", "v2"), ("v2", "ours"))
PAIRS = [V2Pair(*sides, tls=1, is_keyed=True) for sides in SIDES]

FLOWS = 200
OUTSTANDING = 50
"""Datagrams on their way at once in the larger tests: as many as any receive buffer takes."""


@pytest.fixture(scope="module")
def kinds(authority: Authority) -> Iterator[dict[str, Tunnel]]:
    """UDP_DATA_BUF_SIZE is for v1 alone and must not matter."""
    with open_v2_tunnels(PAIRS, authority, {"UDP_DATA_BUF_SIZE": "100"}) as tunnels:
        yield tunnels


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def any_lanes(request: pytest.FixtureRequest, kinds: dict[str, Tunnel]) -> Tunnel:
    return kinds[str(request.param)]


@pytest.fixture
def lanes(stack: contextlib.ExitStack, authority: Authority) -> Callable[[Environment], Tunnel]:
    """Start a tunnel of ours with these settings on both ends."""
    return lambda env: stack.enter_context(open_v2_tunnel(V2Pair("ours", "ours"), authority, env))


def ask(tunnel: Tunnel, visitor: socket.socket, question: bytes) -> Address:
    """Send a datagram in; the address from which it came out at the target."""
    visitor.sendto(question, tunnel.visitor_address)
    received, source = tunnel.target.udp.recvfrom(LARGEST + 1)
    assert received == question
    return (source[0], source[1])


def answer(tunnel: Tunnel, source: Address, visitor: socket.socket, data: bytes) -> None:
    """Send a datagram back and see it arrive."""
    tunnel.target.udp.sendto(data, source)
    assert visitor.recv(LARGEST + 1) == data


def test_a_datagram_of_every_size_passes_exactly(any_lanes: Tunnel) -> None:
    for size in SIZES:
        question, reply = random.Random(size).randbytes(size), random.Random(-1 - size).randbytes(size)
        for _ in range(3):
            assert any_lanes.exchange(question, reply) == (question, reply)


def test_boundaries_and_order_are_kept(any_lanes: Tunnel) -> None:
    sizes = [0, 1, 5000, 0, 0, 3, 1473, 20000, 2, 0]
    with datagram_socket() as visitor:
        for number, size in enumerate(sizes):
            visitor.sendto(bytes([number]) * size, any_lanes.visitor_address)
        received = [any_lanes.target.udp.recvfrom(LARGEST) for _ in sizes]
        assert [data for data, _ in received] == [bytes([number]) * size for number, size in enumerate(sizes)]
        assert len({source for _, source in received}) == 1


def test_one_question_may_have_many_answers(any_lanes: Tunnel) -> None:
    with datagram_socket() as visitor:
        source = ask(any_lanes, visitor, b"how many?")
        for number in range(OUTSTANDING):
            any_lanes.target.udp.sendto(b"%d" % number, source)
        assert [visitor.recv(100) for _ in range(OUTSTANDING)] == [b"%d" % number for number in range(OUTSTANDING)]


def test_unasked_datagrams_of_the_target_reach_the_visitor(any_lanes: Tunnel) -> None:
    with datagram_socket() as visitor:
        source = ask(any_lanes, visitor, b"hello")
        for number in range(10):
            answer(any_lanes, source, visitor, b"news %d" % number)


def test_a_visitor_keeps_its_address_at_the_target_and_two_visitors_differ(any_lanes: Tunnel) -> None:
    with datagram_socket() as one, datagram_socket() as other:
        sources = [ask(any_lanes, visitor, b"it is me") for visitor in (one, other, one, other)]
        assert sources[:2] == sources[2:]
        assert sources[0] != sources[1]
        answer(any_lanes, sources[1], other, b"for the other")
        answer(any_lanes, sources[0], one, b"for the one")


def test_two_hundred_flows_at_once_keep_their_order(any_lanes: Tunnel, stack: contextlib.ExitStack) -> None:
    visitors = [stack.enter_context(datagram_socket()) for _ in range(FLOWS)]
    any_lanes.target.udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ROOM)
    each = 5
    for _ in range(2):
        for start in range(0, FLOWS, OUTSTANDING // each):
            group = visitors[start : start + OUTSTANDING // each]
            for number in range(each):
                for visitor in group:
                    visitor.sendto(b"%d" % number, any_lanes.visitor_address)
            for _ in range(each * len(group)):
                question, source = any_lanes.target.udp.recvfrom(100)
                any_lanes.target.udp.sendto(question, source)
            for visitor in group:
                assert [visitor.recv(100) for _ in range(each)] == [b"%d" % number for number in range(each)]


@pytest.mark.programs
def test_a_flow_ends_and_its_socket_is_released(
    lanes: Callable[[Environment], Tunnel], stack: contextlib.ExitStack
) -> None:
    # Long enough for all flows to begin before the first one ends, on a busy machine too.
    tunnel = lanes({"UDP_SESSION_TIMEOUT": "5s", "UDP_LANES": "1"})
    client, server = tunnel.our_client, tunnel.our_server
    before = client.settled_descriptors(), server.settled_descriptors()
    visitors = [stack.enter_context(datagram_socket()) for _ in range(FLOWS)]
    sources = [ask(tunnel, visitor, b"hello") for visitor in visitors]
    assert client.count_descriptors() >= before[0] + FLOWS
    client.wait_for_descriptors(before[0])
    server.wait_for_descriptors(before[1])
    again = ask(tunnel, visitors[0], b"a new flow")
    answer(tunnel, again, visitors[0], b"from a new socket")
    assert len(set(sources)) == FLOWS


@pytest.mark.programs
def test_traffic_in_either_direction_keeps_a_flow(lanes: Callable[[Environment], Tunnel]) -> None:
    tunnel = lanes({"UDP_SESSION_TIMEOUT": "3s"})
    with datagram_socket() as speaker, datagram_socket() as listener, datagram_socket() as clock:
        spoken, heard = ask(tunnel, speaker, b"hello"), ask(tunnel, listener, b"hello")
        for _ in range(5):
            assert is_silent(clock, 0.7)
            assert ask(tunnel, speaker, b"still here") == spoken
            answer(tunnel, heard, listener, b"still there")
        assert ask(tunnel, listener, b"the same flow") == heard
        answer(tunnel, spoken, speaker, b"the same flow")


@pytest.mark.programs
def test_over_semaphore_limit_the_flow_that_was_idle_longest_goes_first(
    lanes: Callable[[Environment], Tunnel], stack: contextlib.ExitStack
) -> None:
    limit = 8
    tunnel = lanes({"SEMAPHORE_LIMIT": str(limit)})
    visitors = [stack.enter_context(datagram_socket(f"127.0.{network}.1")) for network in range(limit + 1)]
    sources = [ask(tunnel, visitor, b"hello") for visitor in visitors[:limit]]
    assert ask(tunnel, visitors[0], b"not idle any more") == sources[0]
    newest = ask(tunnel, visitors[limit], b"one too many")
    for number in (0, *range(2, limit)):
        answer(tunnel, sources[number], visitors[number], b"still a flow")
    answer(tunnel, newest, visitors[limit], b"a flow now")
    tunnel.target.udp.sendto(b"too late", sources[1])
    assert is_silent(visitors[1], 0.3)
    assert ask(tunnel, visitors[1], b"back again") != sources[1]


@pytest.mark.programs
def test_flows_beyond_the_limit_are_counted_and_logged(
    lanes: Callable[[Environment], Tunnel], stack: contextlib.ExitStack
) -> None:
    tunnel = lanes({**STEADY, "SEMAPHORE_LIMIT": "8"})
    for network in range(20):
        ask(tunnel, stack.enter_context(datagram_socket(f"127.0.{network}.1")), b"hello")
    tunnel.our_server.wait_for("flow.evicted", level="warn")
    tunnel.our_server.wait_for("tunnel.report", counters=lambda counters: counters["udp_ended"].get("evicted") == 12)


@pytest.mark.programs
def test_a_target_that_refuses_datagrams_harms_nobody(stack: contextlib.ExitStack) -> None:
    with DatagramEcho() as echo:
        absent = echo.address
    server = stack.enter_context(OurServer())
    client = stack.enter_context(OurClient(server.tunnel_address, absent))
    client.wait_until_connected()
    with datagram_socket() as visitor:
        for _ in range(5):
            visitor.sendto(b"anybody?", server.visitor_address)
        assert is_silent(visitor, 0.2)
    assert not client.find_crashes()


@pytest.mark.programs
def test_a_flow_outlives_a_target_that_is_restarted(stack: contextlib.ExitStack) -> None:
    with Target() as target:
        address = target.address
    server = stack.enter_context(OurServer())
    client = stack.enter_context(OurClient(server.tunnel_address, address))
    client.wait_until_connected()
    visitor = stack.enter_context(datagram_socket())
    visitor.sendto(b"too early", server.visitor_address)
    assert is_silent(visitor, 0.2)
    again = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    again.settimeout(PATIENCE)
    again.bind(address)
    visitor.sendto(b"hello", server.visitor_address)
    assert again.recv(100) == b"hello"


def test_datagrams_go_on_over_a_new_control_connection(stack: contextlib.ExitStack, authority: Authority) -> None:
    tunnel = stack.enter_context(open_v2_tunnel(V2Pair("v2", "ours"), authority))
    visitor = stack.enter_context(datagram_socket())
    ask(tunnel, visitor, b"before")
    mark = tunnel.our_client.mark()
    tunnel.v1_server.drop_client()
    tunnel.our_client.wait_until_connected(after=mark)
    source = ask(tunnel, visitor, b"after")
    answer(tunnel, source, visitor, b"and back")


def test_the_statistics_line_counts_flows(lanes: Callable[[Environment], Tunnel]) -> None:
    tunnel = lanes(STEADY)
    tunnel.exchange(b"question", b"answer")
    for process in (tunnel.our_server, tunnel.our_client):
        process.wait_for("tunnel.report", level="debug", flows=1)
