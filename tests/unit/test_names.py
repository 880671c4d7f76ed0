"""Names that are followed: one lookup at a time, in the background, with the last good answer kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import socket
from gevent.event import AsyncResult

from nodepass.client import names
from nodepass.client.names import Name
from nodepass.log import Log
from nodepass.net import sockets
from nodepass.net.sockets import Endpoint, resolve
from nodepass.urls import Address
from tests.unit.controls import run, until

OLD, NEW = (Endpoint(socket.AF_INET, (host, 80)) for host in ("192.0.2.1", "192.0.2.2"))


class Resolver:
    """Answers lookups when a test says so: each waits for the next of `answers`."""

    def __init__(self) -> None:
        self.lookups: list[AsyncResult[list[Endpoint]]] = []

    def look_up(self, address: Address) -> list[Endpoint]:
        assert address.host == "moving.example"
        self.lookups.append(AsyncResult())
        return self.lookups[-1].get()

    def answer(self, *endpoints: Endpoint) -> None:
        """Answer the lookup that runs; there is one, now or in a moment."""
        until(self.is_asked)
        self.lookups[-1].set(list(endpoints))
        gevent.sleep(0)

    def fail(self, words: str = "no such name") -> None:
        until(self.is_asked)
        self.lookups[-1].set_exception(OSError(-2, words))
        gevent.sleep(0)

    def is_asked(self) -> bool:
        return bool(self.lookups) and not self.lookups[-1].ready()


class Events(Log):
    """A log that keeps its events."""

    def __init__(self) -> None:
        super().__init__("test")
        self.events: list[str] = []

    def log(self, level: int, event: str, *_: object, **__: object) -> None:  # type: ignore[override]  # noqa: ARG002
        self.events.append(event)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    resolver = Resolver()
    for module in (names, sockets):
        monkeypatch.setattr(module, "look_up", resolver.look_up)
    monkeypatch.setattr(names, "FRESH", 0.0)
    return resolver


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
    monkeypatch.setattr(names, "LOOKUP_TIMEOUT", 0.01)
    resolver.answer(OLD)
    name.refresh()
    until(lambda: name.failure)
    assert log.events == ["name.failed"]
    with gevent.Timeout(5):  # a failed dial does not wait for it any more
        assert name.newer(60) == [OLD]
    resolver.answer(NEW)
    assert name.endpoints(0) == [NEW]
    assert len(resolver.lookups) == 2


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
