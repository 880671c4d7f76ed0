"""The lanes of UDP and their bounded queue, and the client's flows: its sockets at the target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.client.target import Target
from nodepass.client.udp_flows import TargetFlows
from nodepass.config import Settings
from nodepass.log import Log
from nodepass.net import udp
from nodepass.net.sockets import reset_on_close
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel import udp as lanes
from nodepass.tunnel.part import Common
from nodepass.tunnel.udp import Lane
from nodepass.urls import Address
from nodepass.wire.frames import FrameBuffer, encode_frame
from tests.unit.controls import run, until
from tests.unit.streams import tcp_pair


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setattr(udp, "socket", socket)
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


def test_a_full_lane_takes_no_more_until_what_it_has_is_written(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "QUEUE", 1000)
    lane = Lane()
    assert lane.send(1, bytes(900))
    assert not lane.send(1, bytes(900))
    stream, peer = stack.enter_context(tcp_pair())
    run(stack, lane.run, stream, print)
    assert list(FrameBuffer().feed(peer.recv(2000))) == [(1, bytes(900))]
    until(lambda: lane.send(1, bytes(900)))


def test_a_lane_that_ended_before_its_connection_came_closes_it(stack: ExitStack) -> None:
    lane = Lane()
    lane.close()
    stream, peer = stack.enter_context(tcp_pair())
    assert lane.run(stream, print) == ""
    assert peer.recv(1) == b""
    assert not lane.send(1, b"late")


def test_the_frames_of_one_read_do_not_hold_up_the_event_loop(stack: ExitStack) -> None:
    """One read can bring 40,000 frames, each of which may begin a flow."""
    count, in_a_row, longest = 0, 0, 0
    stream, peer = stack.enter_context(tcp_pair())

    def deliver(flow: int, payload: bytes) -> None:  # noqa: ARG001
        nonlocal count, in_a_row
        count, in_a_row = count + 1, in_a_row + 1

    def tick() -> None:  # the event loop's turn
        nonlocal in_a_row, longest
        in_a_row, longest = 0, max(longest, in_a_row)

    timer = gevent.get_hub().loop.prepare()
    timer.start(tick)
    stack.callback(timer.close)
    run(stack, Lane().run, stream, deliver)
    peer.sendall(encode_frame(1, b"") * 5000)
    until(lambda: count == 5000)
    tick()
    assert longest <= 2 * lanes.FRAMES_PER_TURN


class Client:
    """The client's flows with one lane, and a target."""

    def __init__(self, stack: ExitStack, limit: int = 8) -> None:
        self.stats = Stats()
        log = Log("test")
        self.target = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.target.bind(("127.0.0.1", 0))
        common = Common(Settings(semaphore_limit=limit), log, self.stats, TaskGroup(log, self.stats))
        self.flows = TargetFlows(common, Target(Address(*self.target.getsockname())))
        stack.callback(self.flows.close)
        stream, self.server = stack.enter_context(tcp_pair())
        run(stack, self.flows.run_lane, stream, log)

    def ask(self, flow: int) -> tuple[str, int]:
        """Have a flow send a datagram; the address at which the target sees it."""
        self.server.sendall(encode_frame(flow, b"question"))
        payload, address = self.target.recvfrom(100)
        assert payload == b"question"
        return address  # type: ignore[no-any-return]


def test_each_flow_has_a_socket_of_its_own_and_its_answers_come_back(stack: ExitStack) -> None:
    client = Client(stack)
    first, second = client.ask(1), client.ask(2)
    assert first != second
    assert client.ask(1) == first
    client.target.sendto(b"answer", second)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(2, b"answer")]
    assert (client.stats.udp.up.bytes, client.stats.udp.down.bytes) == (24, 6)


def test_a_flow_beyond_the_limit_evicts_the_longest_idle_one(stack: ExitStack) -> None:
    client = Client(stack, limit=1)
    first = client.ask(1)
    client.ask(2)
    assert len(client.flows) == 1
    assert client.stats.udp.ended["evicted"] == 1
    assert client.ask(1) != first


def test_flows_of_a_lane_that_ends_in_order_have_timed_out_at_the_server_and_are_not_lost(stack: ExitStack) -> None:
    client = Client(stack)
    client.ask(1)
    client.server.close()
    until(lambda: not len(client.flows))
    assert client.stats.udp.ended["completed"] == 1


def test_flows_of_a_lane_that_is_cut_are_lost(stack: ExitStack) -> None:
    client = Client(stack)
    client.ask(1)
    reset_on_close(client.server, True)
    client.server.close()
    until(lambda: not len(client.flows))
    assert client.stats.udp.ended["lost"] == 1


def test_a_conversation_outlives_a_flood_of_other_flows(stack: ExitStack) -> None:
    client = Client(stack, limit=4)
    speaker = client.ask(1)
    client.target.sendto(b"answer", speaker)
    assert client.server.recv(100)
    client.ask(1)
    for flow in range(2, 20):
        client.target.sendto(b"answer", client.ask(flow))
        assert client.server.recv(100)
    assert client.ask(1) == speaker


def test_a_target_that_refuses_datagrams_is_counted_and_its_flow_stays(stack: ExitStack) -> None:
    client = Client(stack)
    client.ask(1)
    client.target.close()
    client.server.sendall(encode_frame(1, b"nothing listens"))
    until(lambda: client.stats.udp_drops["target_refused"])
    assert len(client.flows) == 1


def test_an_answer_that_a_full_lane_cannot_take_is_dropped_and_counted(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(stack)
    address = client.ask(1)
    monkeypatch.setattr(lanes, "QUEUE", 0)
    client.target.sendto(b"answer", address)
    until(lambda: client.stats.udp_drops["lane_full"] == 1)


def test_a_bug_at_one_flow_ends_that_flow_only_and_is_reported(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(stack)
    broken, healthy = client.ask(1), client.ask(2)
    right = TargetFlows._pass_back
    with monkeypatch.context() as patch:
        patch.setattr(TargetFlows, "_pass_back", lambda *_: 1 // 0)
        client.target.sendto(b"answer", broken)
        until(lambda: client.stats.trouble["bugs"] == 1)
    assert TargetFlows._pass_back is right
    assert len(client.flows) == 1
    client.target.sendto(b"answer", healthy)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(2, b"answer")]
