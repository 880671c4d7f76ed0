"""The lanes of UDP and their bounded queue, and the client's flows: its sockets at the target."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import gevent
import pytest
from gevent import socket

from nodepass.client import udp_flows as flows_module
from nodepass.client.target import HostTarget
from nodepass.client.targets import Targets
from nodepass.client.udp_flows import TargetFlows
from nodepass.config.kinds import parse_rate
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, Place
from nodepass.log import Log
from nodepass.net import udp
from nodepass.net.sockets import Endpoint, reset_on_close
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel import udp as lanes
from nodepass.tunnel.part import Common
from nodepass.tunnel.rates import Rates
from nodepass.tunnel.udp import Lane
from nodepass.wire.frames import FrameBuffer, encode_addresses, encode_frame
from tests.unit.controls import run, until
from tests.unit.resolver import Resolver
from tests.unit.streams import tcp_pair


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> ExitStack:
    """Sockets are gevent's, as in the patched program, until all has been left."""
    monkeypatch.setattr(udp, "socket", socket)
    return stack


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

    def __init__(self, stack: ExitStack, limit: int = 8, others: Sequence[Place] = (), **settings: Any) -> None:
        self.stats = Stats()
        log = Log("test")
        self.target = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.target.bind(("127.0.0.1", 0))
        own = Settings(semaphore_limit=limit, **settings)
        loops, rates = TaskGroup(log, self.stats), Rates.of(own, self.stats)
        common = Common(own, log, self.stats, loops, rates=rates)
        places = [Address(*self.target.getsockname()), *others]
        self.targets = Targets(places, common.settings, log, self.stats)
        self.known = self.targets.all[0]
        assert isinstance(self.known, HostTarget)
        self.flows = TargetFlows(common, self.targets)
        stack.callback(self.flows.close)
        stream, self.server = stack.enter_context(tcp_pair())
        run(stack, self.flows.run_lane, stream, "0123abcd")

    def move(self, *sockets: Any) -> None:
        """Have the target's name resolve to the addresses of these sockets from now on."""
        self.known.name._endpoints = [Endpoint(each.family, each.getsockname()) for each in sockets]
        self.known.name.version += 1

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


def test_a_flow_follows_the_target_to_the_port_that_answers_where_that_is_allowed(stack: ExitStack) -> None:
    client = Client(stack, udp_answers="any")
    visitor = client.ask(1)
    worker = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    worker.sendto(b"answer", visitor)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(1, b"answer")]
    client.server.sendall(encode_frame(1, b"go on"))
    assert worker.recvfrom(100) == (b"go on", visitor)
    worker.close()
    client.server.sendall(encode_frame(1, b"lost"))
    until(lambda: client.stats.udp_drops["target_refused"])
    assert client.ask(1) == visitor


def test_by_default_a_flow_takes_the_targets_own_answers_only(stack: ExitStack) -> None:
    client = Client(stack)
    visitor = client.ask(1)
    other = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    other.sendto(b"not the target", visitor)
    client.target.sendto(b"answer", visitor)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(1, b"answer")]


def test_a_flow_that_begins_again_still_has_its_visitors_addresses(stack: ExitStack) -> None:
    """The server announces them once; this end may have closed the flow earlier."""
    client = Client(stack, limit=2, proxy_protocol="v2")
    for number in (1, 2, 3, 3):
        client.server.sendall(encode_addresses(number, f"192.0.2.{number}:1", "198.51.100.1:2"))
    for number in (2, 3, 4, 2):
        client.server.sendall(encode_frame(number, b"hello"))
        seen, _ = client.target.recvfrom(100)
        assert seen.endswith(b"hello")
        known = bytes([192, 0, 2, number, 198, 51, 100, 1]) if number < 4 else b"\x20\0\0\0"
        assert known in seen


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


def test_a_datagram_whose_turn_comes_while_the_socket_is_full_is_dropped_and_counted(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop begins turns, so that the send must not wait. A Unix socket is full sooner than one of UDP."""

    def dial_full(_: Endpoint, blocking: bool, bind: object) -> Any:  # noqa: ARG001
        near, far = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
        assert far
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(10_000))
        near.setblocking(blocking)
        return near

    monkeypatch.setattr(flows_module, "dial_udp", dial_full)
    client = Client(stack, rate_up=parse_rate("8M"))
    client.stats.tcp.up.bytes += 110_000  # beyond what was saved up
    client.server.sendall(encode_frame(1, b"question"))
    until(lambda: client.stats.udp_drops["target_unreachable"] == 1)
    assert not client.stats.udp.up.bytes


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


def bound(stack: ExitStack) -> Any:
    """A UDP socket of another address of the target."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind(("127.0.0.1", 0))
    sock.settimeout(10)
    return sock


def unbound(stack: ExitStack) -> Any:
    """An address that refuses datagrams: the socket is connected, so that the port is not given away."""
    sock = bound(stack)
    sock.connect(("127.0.0.1", 9))
    return sock


def test_an_address_that_refuses_is_followed_by_the_next_which_gets_the_same_datagrams(stack: ExitStack) -> None:
    client = Client(stack)
    client.move(unbound(stack), unbound(stack), client.target)
    client.server.sendall(b"".join(encode_frame(1, b"%d" % number) for number in range(3)))
    received = [client.target.recvfrom(100) for _ in range(3)]
    assert [payload for payload, _ in received] == [b"0", b"1", b"2"]
    client.target.sendto(b"answer", received[-1][1])
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(1, b"answer")]
    assert not any(client.stats.udp_drops.values())


def test_new_flows_begin_with_the_address_that_answered_last(stack: ExitStack) -> None:
    client = Client(stack)
    client.move(silent := bound(stack), client.target)
    client.known.note_answer(Endpoint(socket.AF_INET, client.target.getsockname()))
    client.ask(1)
    client.move(unbound(stack), silent)
    client.server.sendall(encode_frame(2, b"question"))
    silent.sendto(b"answer", silent.recvfrom(100)[1])
    client.server.recv(100)
    assert client.known.datagram_endpoints()[0].sockaddr == silent.getsockname()


def test_a_datagram_that_every_address_refuses_is_counted_once_and_the_next_one_is_tried_at_all_again(
    stack: ExitStack,
) -> None:
    client = Client(stack)
    later = unbound(stack)
    client.move(later, unbound(stack))
    for number in (1, 2):
        client.server.sendall(encode_frame(1, b"%d" % number))
        until(lambda: client.stats.udp_drops["target_refused"] == number)  # noqa: B023
    again = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    again.settimeout(10)
    address = later.getsockname()
    later.close()
    again.bind(address)
    client.server.sendall(encode_frame(1, b"3"))
    assert again.recv(100) == b"3"


def test_a_flow_leaves_an_address_that_the_target_no_longer_has(stack: ExitStack) -> None:
    client = Client(stack)
    old = client.ask(1)
    client.move(moved := bound(stack), client.target)
    assert client.ask(1) == old  # it is still one of them
    client.move(moved)
    client.server.sendall(encode_frame(1, b"question"))
    _, address = moved.recvfrom(100)
    client.target.sendto(b"too late", old)
    moved.sendto(b"answer", address)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(1, b"answer")]
    assert len(client.flows) == 1


def test_a_target_that_refuses_is_followed_by_the_next_where_its_flow_then_stays(stack: ExitStack) -> None:
    second = bound(stack)
    client = Client(stack, others=[Address(*second.getsockname())], spread="first")
    client.move(unbound(stack))
    client.server.sendall(encode_frame(1, b"question"))
    payload, asker = second.recvfrom(100)
    assert payload == b"question"
    second.sendto(b"answer", asker)
    assert list(FrameBuffer().feed(client.server.recv(100))) == [(1, b"answer")]
    assert [each.sessions for each in client.targets.all] == [0, 1]
    client.move(client.target)
    client.server.sendall(encode_frame(1, b"more"))
    assert second.recv(100) == b"more", "the first one is back, and the flow stays"
    client.server.close()
    until(lambda: not len(client.flows))
    assert [each.sessions for each in client.targets.all] == [0, 0]


def test_flows_are_spread_like_sessions(stack: ExitStack) -> None:
    second = bound(stack)
    client = Client(stack, others=[Address(*second.getsockname())], spread="least")
    for number in range(4):
        client.server.sendall(encode_frame(number, b"question"))
    until(lambda: len(client.flows) == 4)
    assert [each.sessions for each in client.targets.all] == [2, 2]


def test_a_flow_goes_round_the_targets_until_one_takes_its_datagram(stack: ExitStack) -> None:
    second = unbound(stack)
    client = Client(stack, others=[Address(*second.getsockname())], spread="first")
    client.target.connect(("127.0.0.1", 9))
    client.server.sendall(encode_frame(1, b"lost"))
    until(lambda: client.stats.udp_drops["target_refused"] == 1)
    address = client.target.getsockname()
    client.target.close()
    again = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    again.settimeout(10)
    again.bind(address)
    client.server.sendall(encode_frame(1, b"found"))
    assert again.recv(100) == b"found"


def test_a_target_whose_name_is_unknown_is_passed_over_and_never_waited_for(
    stack: ExitStack, resolver: Resolver
) -> None:
    """The event loop has the news of a refusal, and may not wait for a lookup."""
    last = bound(stack)
    client = Client(stack, others=[Address("unknown.example", 9), Address(*last.getsockname())], spread="first")
    run(stack, client.targets.names[0].name.follow)
    client.move(unbound(stack))
    client.server.sendall(encode_frame(1, b"question"))
    assert last.recv(100) == b"question"
    assert resolver.is_asked()
    assert not client.stats.trouble["bugs"]
