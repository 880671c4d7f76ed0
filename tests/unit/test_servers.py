"""Which servers a client has, and what their connectors have together; what one does is in other tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import gevent
import pytest

from nodepass.client import servers
from nodepass.client.connector import Server
from nodepass.client.servers import LINGER, Servers
from nodepass.config.settings import Settings
from nodepass.config.urls import SERVERS, ClientURL, parse_url
from nodepass.log import Log
from nodepass.net.sockets import Endpoint
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.handshake import Terms
from nodepass.tunnel.part import Common
from nodepass.wire.auth import client_id_for, new_client_id
from tests.unit.records import recorded
from tests.unit.resolver import Resolver

ID = "0011223344556677"


class FakeControl:
    def __init__(self, tls: int, round_trip: float | None) -> None:
        self.round_trip = round_trip
        self._tls = tls

    def qualify(self, security: Any) -> Any:
        return servers.replace(security, tls=self._tls)


class FakeConnection:
    def __init__(self, tls: int = 0, round_trip: float | None = None, is_lacking: bool = False) -> None:
        self.control = FakeControl(tls, round_trip)
        self.pool = self
        self.is_lacking = is_lacking


class FakeConnector:
    """Records what is asked of it, and connects to nothing."""

    def __init__(self, common: Common, server: Server, *rest: Any) -> None:
        self.common = common
        self.server = server
        self.report: Callable[[], None] = rest[-1]
        self.connection: Any = None
        self.calls: list[str] = []
        self.keys: list[object] = []
        self.limits = (0, 0)
        self.unhealthy = ""

    def describe(self) -> str:
        return f"{self.server.text} is fake"

    def start(self) -> None:
        self.calls.append("start")

    def stop(self, _: float) -> None:
        self.calls.append("stop")
        gevent.sleep(0)

    def close(self) -> None:
        self.calls.append("close")

    def set_key(self, key: object) -> None:
        self.keys.append(key)

    def limit_pool(self, lowest: int, highest: int) -> None:
        self.limits = lowest, highest

    def unhealthy_reason(self) -> str:
        return self.unhealthy


class Made:
    """Servers whose connectors are fakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stack: ExitStack, addresses: str, **settings: Any) -> None:
        monkeypatch.setattr(servers, "Connector", FakeConnector)
        log, stats, self.reports = Log("client:1"), Stats(), list[str]()
        common = Common(Settings(**settings), log, stats, TaskGroup(log, stats))
        url = cast(ClientURL, parse_url(f"client://{addresses}/:80?tls=0"))
        launches = cast(Any, FakeLaunches())
        terms = Terms.of(url, ID, [])
        self.servers = Servers(common, url, terms, launches, lambda: self.reports.append("report"))
        stack.callback(self.servers.close)

    @property
    def connectors(self) -> dict[str, FakeConnector]:
        return cast(Any, self.servers._connectors)


class FakeLaunches:
    def for_server(self, log: Log) -> Log:
        return log


Make = Callable[..., Made]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Make:
    return lambda addresses, **settings: Made(monkeypatch, stack, addresses, **settings)


def endpoint(number: int) -> Endpoint:
    return Endpoint(2, (f"192.0.2.{number}", 1))


def test_each_server_of_the_url_has_a_connector_with_its_own_name_id_log_and_share_of_the_pool(make: Make) -> None:
    made = make("a.example:1,b.example:2", max_pool_capacity=100, min_pool_capacity=16)
    first, second = made.connectors.values()
    assert list(made.connectors) == ["a.example:1", "b.example:2"]
    assert [each.server.terms.host for each in (first, second)] == ["a.example", "b.example"]
    assert len({ID, first.server.terms.client, second.server.terms.client}) == 3
    assert first.limits == second.limits == (16, 50)
    with recorded() as log:
        second.common.log.info("name.resolved", "words")
    assert (log[0].fields, log[0].about, log[0].session) == ({"server": "b.example:2"}, "b.example:2", "")
    assert len(made.servers) == 2


def test_a_single_server_is_served_as_ever(make: Make) -> None:
    made = make("a.example:1")
    (only,) = made.connectors.values()
    assert only.server.is_only
    assert only.server.terms.client == ID
    assert only.common is made.servers.common
    assert only.limits == (Settings().min_pool_capacity, Settings().max_pool_capacity)
    assert made.servers.describe() == "a.example:1 is fake"
    assert made.servers.unready_reason() == "not connected to the server"


def test_a_pool_has_at_least_one_connection_and_less_than_the_least_where_the_share_is_smaller(make: Make) -> None:
    for most, limits in ((20, (10, 10)), (1, (1, 1))):
        made = make("a.example:1,b.example:2", max_pool_capacity=most, min_pool_capacity=16)
        assert {each.limits for each in made.connectors.values()} == {limits}


def test_an_id_for_a_server_is_the_same_each_time_and_another_one_for_each() -> None:
    id, texts = new_client_id(), [f"server.example:{port}" for port in range(1, 1000)]
    ids = [client_id_for(text, id) for text in texts]
    assert ids == [client_id_for(text, id) for text in texts]
    assert len({*ids, id}) == 1000
    assert {len(each) for each in ids} == {16}


def test_one_connected_and_supplied_server_makes_the_client_ready(make: Make) -> None:
    made = make("a.example:1,b.example:2")
    first, second = made.connectors.values()
    assert made.servers.unready_reason() == "not connected to any server"
    second.connection = FakeConnection(is_lacking=True)
    assert made.servers.unready_reason() == "no data connections"
    first.connection = FakeConnection()
    assert made.servers.unready_reason() == ""
    assert made.servers.describe() == "2 of 2 servers: a.example:1 is fake; b.example:2 is fake"


def test_of_several_the_lowest_mode_and_the_longest_round_trip_are_shown(make: Make) -> None:
    made = make("a.example:1,b.example:2,c.example:3")
    assert made.servers.security.tls is None
    assert made.servers.round_trip is None
    connections = (FakeConnection(1, 0.5), FakeConnection(0, 1.5), FakeConnection(2))
    for connector, connection in zip(made.connectors.values(), connections, strict=True):
        connector.connection = connection
    assert (made.servers.security.tls, made.servers.round_trip) == (0, 1.5)


def test_any_unhealthy_connector_needs_a_restart(make: Make) -> None:
    made = make("a.example:1,b.example:2")
    assert made.servers.unhealthy_reason() == ""
    made.connectors["b.example:2"].unhealthy = "silent"
    assert made.servers.unhealthy_reason() == "silent"


def test_statistics_are_logged_once_in_an_interval_whichever_server_is_connected(make: Make) -> None:
    made = make("a.example:1,b.example:2")
    first, second = made.connectors.values()
    second.connection = FakeConnection()
    second.report()
    assert len(made.reports) == 1
    first.connection = FakeConnection()
    for each in (first, second):
        each.report()
    assert len(made.reports) == 2


def test_another_key_is_for_all_and_also_for_those_that_come_later(make: Make, resolver: Resolver) -> None:
    made = make("name.example:1,192.0.2.9:1", servers="all")
    made.servers.start()
    key = cast(Any, object())
    made.servers.set_key(key)
    resolver.answer(endpoint(1))
    assert made.connectors["192.0.2.9:1"].keys == [key]
    assert made.connectors["192.0.2.1:1"].server.terms.key is key


def test_all_are_told_at_once_that_the_client_stops(make: Make) -> None:
    made = make("192.0.2.1:1,192.0.2.2:1")
    made.servers.start()
    made.servers.stop(1.0)
    made.servers.close()
    assert {tuple(each.calls) for each in made.connectors.values()} == {("start", "stop", "close")}


def test_with_all_each_endpoint_of_a_name_is_a_server_that_comes_and_goes_with_the_name(
    make: Make, resolver: Resolver
) -> None:
    made = make("name.example:1", servers="all")
    made.servers.start()
    assert (len(made.servers), made.connectors) == (1, {})
    assert made.servers.describe() == "0 of 1 servers: looking up name.example"
    resolver.answer(endpoint(1), endpoint(2))
    assert list(made.connectors) == ["192.0.2.1:1", "192.0.2.2:1"]
    first, second = made.connectors.values()
    assert {each.server.terms.host for each in (first, second)} == {"name.example"}
    assert first.server.name.endpoints(0) == [endpoint(1)]
    second.server.name.refresh()
    resolver.fail()
    assert len(made.servers) == 2
    first.server.name.refresh()
    resolver.answer(endpoint(3), endpoint(2))
    assert list(made.connectors) == ["192.0.2.2:1", "192.0.2.3:1"]
    assert not made.servers._absent
    gevent.sleep(0.001)
    assert first.calls == ["start", "stop", "close"]
    assert second.calls == ["start"]
    assert {each.limits[1] for each in made.connectors.values()} == {Settings().max_pool_capacity // 2}


def test_the_first_connection_to_an_address_that_comes_later_is_no_reconnect(make: Make, resolver: Resolver) -> None:
    made = make("name.example:1,192.0.2.9:1", servers="all")
    made.servers.start()
    made.servers.common.stats.connects += 1
    resolver.answer(endpoint(1))
    assert [each.server.is_new for each in made.connectors.values()] == [True, True]


def test_a_connected_server_is_left_once_the_name_has_been_without_its_address_for_a_minute(
    make: Make, resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Visitors have cached the address, too; and a name can have other ones of many at each lookup."""
    now = [1000.0]
    monkeypatch.setattr(servers.time, "monotonic", lambda: now[0])
    made = make("name.example:1", servers="all")
    made.servers.start()
    resolver.answer(endpoint(1), endpoint(2))
    first, second = made.connectors.values()
    first.connection = FakeConnection()
    for later, found, left in (
        (0.0, [2], False),
        (LINGER - 1, [2], False),
        (0.0, [1, 2], False),
        (LINGER, [2], False),
        (LINGER, [2], True),
    ):
        now[0] += later
        second.server.name.refresh()
        resolver.answer(*map(endpoint, found))
        assert (first not in made.connectors.values()) is left


def test_an_address_that_is_absent_makes_room_for_one_that_is_there(make: Make, resolver: Resolver) -> None:
    made = make("name.example:1", servers="all")
    made.servers.start()
    resolver.answer(*(endpoint(number) for number in range(1, SERVERS + 1)))
    first, *_, last = made.connectors.values()
    first.connection = FakeConnection()
    last.server.name.refresh()
    with recorded() as log:
        resolver.answer(*(endpoint(number) for number in range(2, SERVERS + 2)))
    assert first not in made.connectors.values()
    assert list(made.connectors)[-1] == f"192.0.2.{SERVERS + 1}:1"
    assert "server.left_out" not in [each.event for each in log]


def test_after_a_stop_no_new_address_is_connected_to(make: Make, resolver: Resolver) -> None:
    made = make("name.example:1", servers="all")
    made.servers.start()
    made.servers.stop(1.0)
    resolver.answer(endpoint(1))
    assert not made.connectors


def test_more_addresses_than_can_be_used_are_named_and_those_in_use_stay(make: Make, resolver: Resolver) -> None:
    made = make("name.example:1", servers="all")
    made.servers.start()
    resolver.answer(*(endpoint(number) for number in range(1, SERVERS)))
    known = list(made.connectors)
    cast(FakeConnector, made.connectors[known[0]]).server.name.refresh()
    with recorded() as log:
        resolver.answer(*(endpoint(number) for number in reversed(range(1, SERVERS + 3))))
    assert list(made.connectors)[: len(known)] == known
    assert len(made.connectors) == SERVERS
    (line,) = [each for each in log if each.event == "server.left_out"]
    assert line.fields["servers"] == SERVERS + 2
    assert len(line.fields["left_out"].split(", ")) == 2
