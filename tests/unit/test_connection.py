"""A client's connection: what there is while one control connection lasts, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from nodepass.client.connection import Connection
from nodepass.client.data_dialer import Route
from nodepass.client.launches import Launches
from nodepass.config import Settings
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.part import Common
from nodepass.wire.negotiation import HEARTBEATS, Offer
from tests.unit.controls import connect_ends, run, until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


class FullLaunches:
    """No launch finds a slot."""

    def __init__(self) -> None:
        self.asked = Event()

    def target_answers(self) -> bool:
        return True

    def begin_session(self, *_: object) -> None:
        self.asked.set()
        Event().wait()


def test_a_connection_that_ends_is_not_unhealthy_however_long_a_server_makes_that_take(stack: ExitStack) -> None:
    """It offered the shortest heartbeats; a watchdog would end the other tunnels of the process, too."""
    ends, log, stats = connect_ends(stack), Log("test"), Stats()
    agreement = Agreement(Offer(9, 0, HEARTBEATS[0]))
    control, launches = ends.client_control(agreement), FullLaunches()
    common = Common(Settings(min_pool_capacity=0), log, stats, TaskGroup(log, stats))
    route = Route(control.endpoint, "localhost", 1.0, agreement, None)
    connection = Connection(common, control, route, cast(Launches, cast(Any, launches)), lambda: None)
    ends.server.sendall(b"//00000000#1\n")
    running = run(stack, connection.run)
    launches.asked.wait()
    until(control.unhealthy_reason)
    assert not running.dead
    assert not connection.unhealthy_reason()
    running.get()
