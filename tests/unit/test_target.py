"""Which of a target's addresses is dialled, and what the server is told of it."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

import gevent
import pytest
from gevent import socket

from nodepass.client.client import Client
from nodepass.client.launches import Launches
from nodepass.client.target import HostTarget
from nodepass.client.targets import Targets
from nodepass.client.udp_flows import TargetFlows
from nodepass.config.kinds import parse_rate
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ClientURL
from nodepass.log import Log
from nodepass.net import udp
from nodepass.net.sockets import Endpoint
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.part import Common, Records
from nodepass.tunnel.rates import Rates
from nodepass.wire.signals import UDP, Launch
from tests.unit.controls import run
from tests.unit.resolver import Resolver
from tests.unit.streams import tcp_pair

ADDRESS = Address("moving.example", 80)
LOG = Log("test")


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> ExitStack:
    """Sockets are gevent's, as in the patched program, until all has been left."""
    monkeypatch.setattr(udp, "socket", socket)
    return stack


@pytest.fixture
def targets(stack: ExitStack, resolver: Resolver) -> Targets:  # noqa: ARG001  # its name is looked up there
    targets = Targets([ADDRESS], Settings(), LOG, Stats())
    run(stack, targets.names[0].name.follow)
    return targets


@pytest.fixture
def target(targets: Targets) -> HostTarget:
    return targets.names[0]


def listener(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> Any:
    sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
    sock.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def refusing(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> Any:
    """A socket of an address that refuses: it does not listen, or is connected elsewhere."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
    sock.bind(("127.0.0.1", 0))
    if kind == socket.SOCK_DGRAM:
        sock.connect(("127.0.0.1", 9))
    return sock


def endpoint(sock: Any) -> Endpoint:
    return Endpoint(sock.family, sock.getsockname())


def test_a_visitor_whose_target_has_moved_is_served_at_the_new_address(
    stack: ExitStack, target: HostTarget, resolver: Resolver
) -> None:
    old, new = endpoint(refusing(stack)), endpoint(listener(stack))
    resolver.answer(old)
    dialling = run(stack, target.dial, 10)
    resolver.answer(new)
    with closing(dialling.get()) as sock:  # type: ignore[type-var]
        assert sock.getpeername() == new.sockaddr  # type: ignore[attr-defined]
    assert target.answers


def test_a_visitor_of_a_target_that_refuses_is_told_although_its_name_is_not_answered(
    stack: ExitStack, targets: Targets, resolver: Resolver
) -> None:
    resolver.answer(endpoint(refusing(stack)))
    for is_down in (False, True):
        with gevent.Timeout(5), pytest.raises(ConnectionRefusedError):
            targets.dial(60)
        assert resolver.is_asked()
        assert targets.answers != is_down


def test_the_server_is_told_of_a_target_whose_name_has_never_been_resolved(
    target: HostTarget, resolver: Resolver
) -> None:
    assert target.answers
    resolver.fail()
    assert not target.answers
    target.name.refresh()
    resolver.answer(Endpoint(socket.AF_INET, ("192.0.2.1", 80)))
    assert target.answers
    target.name.refresh()
    resolver.fail()
    assert target.answers  # as far as is known


def test_the_status_says_that_a_name_cannot_be_resolved() -> None:
    client = Client(ClientURL(Address("127.0.0.1", 9), ADDRESS), "id", list, Settings(), Records(LOG, Stats()))
    assert "moving.example" not in client.status()
    client._targets.names[0].name.failure = OSError("cannot resolve 'moving.example': no such name")
    assert "target: cannot resolve 'moving.example': no such name" in client.status()


def test_the_address_that_answered_last_is_dialled_first_and_tcp_and_udp_have_each_their_own(
    stack: ExitStack, target: HostTarget, resolver: Resolver
) -> None:
    refuses, answers, other = endpoint(refusing(stack)), endpoint(listener(stack)), endpoint(listener(stack))
    resolver.answer(refuses, answers, other)
    assert target.datagram_endpoints() == [refuses, answers, other]
    target.dial(10).close()
    assert target.datagram_endpoints() == [answers, refuses, other]
    target.note_answer(other)
    assert target.datagram_endpoints() == [other, refuses, answers]
    with closing(target.dial(10)) as sock:
        assert sock.getpeername() == answers.sockaddr


def test_a_datagram_of_wire_v1_is_answered_by_the_first_address_that_does_not_refuse(
    stack: ExitStack, targets: Targets, target: HostTarget, resolver: Resolver
) -> None:
    service = listener(stack, socket.SOCK_DGRAM)
    resolver.answer(endpoint(refusing(stack, socket.SOCK_DGRAM)), endpoint(service))
    common = Common(Settings(), LOG, Stats(), TaskGroup(LOG, Stats()))
    launches = Launches(common, targets, TargetFlows(common, targets))
    asking = run(stack, launches._ask_target, b"question", 100, 10.0)
    payload, asker = service.recvfrom(100)
    service.sendto(payload.upper(), asker)
    assert asking.get() == (target, b"QUESTION")
    assert target.datagram_endpoints()[0] == endpoint(service)


def test_a_datagram_of_wire_v1_goes_on_to_the_next_target_which_the_access_log_has(stack: ExitStack) -> None:
    service = listener(stack, socket.SOCK_DGRAM)
    places = [Address(*each.getsockname()) for each in (refusing(stack, socket.SOCK_DGRAM), service)]
    settings, lines = Settings(spread="first"), list[str]()
    common = Common(settings, LOG, Stats(), TaskGroup(LOG, Stats()), lines.append)
    targets = Targets(places, settings, LOG, Stats())
    launches = Launches(common, targets, TargetFlows(common, targets))
    data, peer = stack.enter_context(tcp_pair())
    peer.sendall(b"question")
    peer.shutdown(socket.SHUT_WR)
    serving = run(stack, launches._serve_datagram, data, Launch("0123abcd", UDP), 0.0, LOG)
    service.sendto(b"answer", service.recvfrom(100)[1])
    serving.get()
    assert peer.recv(100) == b"answer"
    (line,) = lines
    assert f" {places[1]} " in line


def test_a_datagram_of_wire_v1_does_not_wait_for_good_under_a_rate(stack: ExitStack) -> None:
    settings, stats = Settings(rate_up=parse_rate("8k"), udp_read_timeout=0.05), Stats()
    common = Common(settings, LOG, stats, TaskGroup(LOG, stats), rates=Rates.of(settings, stats))
    targets = Targets([Address("127.0.0.1", 9)], settings, LOG, stats)
    launches = Launches(common, targets, TargetFlows(common, targets))
    data, peer = stack.enter_context(tcp_pair())
    stats.tcp.up.bytes += 10**6  # a quarter of an hour
    peer.sendall(b"question")
    run(stack, launches._serve_datagram, data, Launch("0123abcd", UDP), 0.0, LOG).get(timeout=10)
    assert stats.udp_drops["rate"] == 1
    assert stats.udp.ended["unanswered"] == 1


@pytest.mark.parametrize("is_open", [True, False])
def test_a_datagram_of_wire_v1_without_an_answer_is_an_error(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, is_open: bool
) -> None:
    sock = stack.enter_context(closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    sock.bind(("127.0.0.1", 0))
    stats = Stats()
    common = Common(Settings(), LOG, stats, TaskGroup(LOG, stats))
    targets = Targets([Address(*sock.getsockname())], common.settings, LOG, stats)
    (target,) = targets.for_datagrams()
    refreshed: list[bool] = []
    monkeypatch.setattr(target.name, "refresh", lambda: refreshed.append(True))
    if not is_open:
        sock.close()
    launches = Launches(common, targets, TargetFlows(common, targets))
    with pytest.raises(TimeoutError if is_open else ConnectionRefusedError):
        launches._ask_target(b"question", 100, 0.05)
    assert refreshed == ([] if is_open else [True]), "a target that refuses may have moved"
