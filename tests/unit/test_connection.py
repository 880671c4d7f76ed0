"""A client's connection: what there is while one control connection lasts, and how it ends."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import pytest
from gevent.event import Event

from nodepass.client.connection import Connection
from nodepass.client.data_dialer import Route
from nodepass.client.launches import ServerLaunches
from nodepass.client.pool import ClientPool
from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.outbound.ways import Direct
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.part import Common
from nodepass.wire.negotiation import HEARTBEATS, Offer
from nodepass.wire.signals import LANE, TCP, Launch
from tests.unit.controls import connect_ends, run, until
from tests.unit.records import recorded


class FullLaunches:
    """No launch finds a slot."""

    def __init__(self) -> None:
        self.asked = Event()

    def target_answers(self) -> bool:
        return True

    def begin_session(self, *_: object) -> None:
        self.asked.set()
        Event().wait()


class RecordedLaunches(FullLaunches):
    """Every launch begins."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []

    def begin_session(self, _pool: object, launch: Launch, *_: object) -> None:
        self.begun.append(launch.id)

    def begin_lane(self, _pool: object, launch: Launch) -> bool:
        self.begun.append(launch.id)
        return True


def test_a_connection_that_ends_is_not_unhealthy_however_long_a_server_makes_that_take(stack: ExitStack) -> None:
    """It offered the shortest heartbeats; a watchdog would end the other tunnels of the process, too."""
    ends, log, stats = connect_ends(stack), Log("test"), Stats()
    agreement = Agreement(Offer(9, 0, HEARTBEATS[0]))
    control, launches = ends.client_control(agreement), FullLaunches()
    common = Common(Settings(min_pool_capacity=0), log, stats, TaskGroup(log, stats))
    route = Route(Direct([control.endpoint], None), "localhost", 1.0, 15.0, agreement, None)
    pool = ClientPool(common.log, common.stats, 0, 1)
    connection = Connection(common, control, pool, route, cast(ServerLaunches, cast(Any, launches)), lambda: None)
    ends.server.sendall(b"//00000000#1\n")
    running = run(stack, connection.run)
    launches.asked.wait()
    until(control.unhealthy_reason)
    assert not running.dead
    assert not connection.unhealthy_reason()
    running.get()


@pytest.mark.parametrize(
    ("off", "dropped", "begun"),
    [("tcp", "1", "3"), ("udp", "3", "1")],
)
def test_a_client_refuses_launches_of_what_is_off_and_counts_and_logs_them(
    stack: ExitStack, off: str, dropped: str, begun: str
) -> None:
    ends, stats, launches = connect_ends(stack), Stats(), RecordedLaunches()
    agreement = Agreement(Offer(9, 0, HEARTBEATS[0]))
    control = ends.client_control(agreement)
    settings = Settings(min_pool_capacity=0, **{off: False})
    common = Common(settings, Log("test"), stats, TaskGroup(Log("test"), stats))
    route = Route(Direct([control.endpoint], None), "localhost", 1.0, 15.0, agreement, None)
    pool = ClientPool(common.log, common.stats, 0, 1)
    connection = Connection(common, control, pool, route, cast(ServerLaunches, cast(Any, launches)), lambda: None)
    lines = (Launch(f"0000000{kind}", kind).encode() for kind in (TCP, LANE))
    with recorded() as log:
        running = run(stack, connection.run)
        ends.server.sendall(b"".join(lines))
        until(lambda: len(launches.begun) + stats.trouble["launches_dropped"] == 2)
        running.kill()
    refused = [record for record in log if record.event == "launch.dropped"]
    assert [record.fields["id"][-1] for record in refused] == [dropped]
    assert {record.fields["reason"] for record in refused} == {f"{off}_off"}
    assert sorted(id[-1] for id in launches.begun) == [begun]
