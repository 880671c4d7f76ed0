"""Names that are followed: one lookup at a time, in the background, with the last good answer kept."""

from __future__ import annotations

from contextlib import ExitStack

import gevent
import pytest
from gevent import socket

from nodepass.client import names
from nodepass.client.names import Name
from nodepass.config.urls import Address
from nodepass.log import Log
from nodepass.net import sockets
from nodepass.net.sockets import Endpoint, resolve
from tests.unit.controls import run, until
from tests.unit.resolver import Resolver

OLD, NEW = (Endpoint(socket.AF_INET, (host, 80)) for host in ("192.0.2.1", "192.0.2.2"))


class Events(Log):
    """A log that keeps its events."""

    def __init__(self) -> None:
        super().__init__("test")
        self.events: list[str] = []

    def log(self, level: int, event: str, *_: object, **__: object) -> None:  # type: ignore[override]  # noqa: ARG002
        self.events.append(event)


@pytest.fixture
def log() -> Events:
    return Events()


@pytest.fixture
def name(stack: ExitStack, resolver: Resolver, log: Events) -> Name:  # noqa: ARG001  # it is looked up there
    name = Name(Address("moving.example", 80), log)
    run(stack, name.follow)
    return name


def test_a_first_answer_is_waited_for_and_then_returned_at_once(
    stack: ExitStack, name: Name, resolver: Resolver
) -> None:
    waiting = run(stack, name.endpoints, 10)
    resolver.answer(OLD)
    assert waiting.get() == [OLD]
    name.refresh()
    until(resolver.is_asked)
    assert name.endpoints(10) == [OLD]


def test_there_is_one_lookup_at_a_time_however_many_ask(stack: ExitStack, name: Name, resolver: Resolver) -> None:
    waiting = [run(stack, name.endpoints, 10) for _ in range(20)]
    until(resolver.is_asked)
    resolver.answer(OLD)
    assert [each.get() for each in waiting] == 20 * [[OLD]]
    gevent.sleep(0.01)
    assert len(resolver.lookups) == 1


def test_a_name_is_looked_up_again_while_it_lives(
    name: Name, resolver: Resolver, log: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "REFRESH", 0.01)
    resolver.answer(OLD)
    resolver.answer(NEW, OLD)
    assert (name.endpoints(0), name.version, log.events) == ([NEW, OLD], 1, ["name.changed"])
    resolver.answer(OLD, NEW)
    assert (name.endpoints(0), name.version, log.events) == ([OLD, NEW], 1, ["name.changed"])


def test_a_failure_keeps_the_last_answer_and_each_change_of_state_is_one_line(
    name: Name, resolver: Resolver, log: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "RETRY", 0.0)
    resolver.answer(OLD)
    name.refresh()
    for _ in range(3):
        resolver.fail()
    assert name.failure
    assert name.endpoints(0) == [OLD]
    assert log.events == ["name.failed"]
    resolver.answer(OLD)
    assert not name.failure
    assert log.events == ["name.failed", "name.resolved"]


def test_a_first_lookup_that_fails_or_takes_too_long_is_an_error_that_names_the_host(
    stack: ExitStack, name: Name, resolver: Resolver
) -> None:
    with pytest.raises(TimeoutError, match=r"cannot resolve 'moving\.example': no answer within 0\.01s"):
        name.endpoints(0.01)
    waiting = run(stack, name.endpoints, 10)
    gevent.sleep(0)
    resolver.fail("nobody knows it")
    with pytest.raises(OSError, match="nobody knows it"):
        waiting.get()


def test_a_late_lookup_counts_as_failed_and_its_answer_is_taken_all_the_same(
    name: Name, resolver: Resolver, log: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver.answer(OLD)
    until(lambda: name.has_endpoints)
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT", 0.01)
    name.refresh()
    until(lambda: name.failure)
    assert log.events == ["name.failed"]
    with gevent.Timeout(5):  # a failed dial does not wait for it any more
        assert name.newer(60) == [OLD]
    resolver.answer(NEW)
    assert name.endpoints(0) == [NEW]
    assert len(resolver.lookups) == 2
    assert name.refresh()  # the next lookup is waited for again


def test_localhost_does_not_wait_for_names_whose_name_servers_are_silent(
    stack: ExitStack, resolver: Resolver, log: Events
) -> None:
    hosts = [f"{number}.example" for number in range(20)] + ["localhost"]
    for host in hosts:
        run(stack, Name(Address(host, 80), log).follow)
    until(lambda: "localhost" in resolver.hosts)
    assert len(resolver.hosts) < len(hosts)


def test_what_has_just_been_looked_up_is_not_asked_again(
    name: Name, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "FRESH", 60.0)
    resolver.answer(OLD)
    assert not name.refresh()
    assert name.newer(60) == [OLD]


@pytest.mark.parametrize(
    ("host", "family", "sockaddr"),
    [("127.0.0.1", socket.AF_INET, ("127.0.0.1", 80)), ("::1", socket.AF_INET6, ("::1", 80, 0, 0))],
)
def test_an_address_is_its_own_answer(
    host: str, family: int, sockaddr: tuple[object, ...], resolver: Resolver, log: Events
) -> None:
    name = Name(Address(host, 80), log)
    assert not name.is_followed
    assert not name.refresh()
    assert name.endpoints(0) == resolve(Address(host, 80)) == [Endpoint(family, sockaddr)]
    assert not resolver.lookups


def test_a_single_lookup_has_a_deadline(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LOOKUP_TIMEOUT", 0.01)
    with pytest.raises(TimeoutError, match=r"cannot resolve 'moving\.example': no answer within 0\.01s"):
        resolve(Address("moving.example", 80))
    assert len(resolver.lookups) == 1
