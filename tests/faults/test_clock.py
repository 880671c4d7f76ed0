"""The wall clock jumps by a day: nobody counts on it."""

from __future__ import annotations

import ast
import contextlib
from glob import glob
from pathlib import Path

import pytest

import nodepass
from nodepass.tunnel.control import MISSED_HEARTBEATS
from tests.support.needs import FAKETIME
from tests.support.process import Environment, Nodepass
from tests.support.sockets import datagram_socket, until
from tests.support.target import Target
from tests.support.tunnel import STEADY, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_tunnel import KEYED

WALL_CLOCK = {"time": {"time", "time_ns", "localtime", "gmtime"}, "datetime": {"now", "utcnow", "today"}}
"""Functions that ask for it, by module."""


class Clock:
    """The wall clock of the processes that have this environment; the monotonic one is the machine's."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.shift("+0")
        self.env: Environment = {
            "LD_PRELOAD": glob(FAKETIME)[0],
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",  # its name in older versions
        }

    def shift(self, by: str) -> None:
        """Set it beside the machine's: `+1d`."""
        self._file.write_text(f"{by}\n")


@pytest.mark.programs("faketime")
def test_a_clock_that_jumps_by_a_day_either_way_is_not_noticed(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    env = {**KEYED, **STEADY, **clock.env, "UDP_SESSION_TIMEOUT": "30s", "SHUTDOWN_TIMEOUT": "100ms"}
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(tls=1, env=env))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    visitor, service = stack.enter_context(tunnel.session())
    asker = stack.enter_context(datagram_socket())
    asker.sendto(b"hello", tunnel.visitor_address)
    source = target.udp.recvfrom(100)[1]
    for shift in ("+1d", "-1d"):
        day, marks = server.entries[-1]["time"][:10], [(run, run.mark()) for run in (server, client)]
        clock.shift(shift)
        for run, mark in marks:
            until(lambda: reports_of_another_day(run, mark, day) > MISSED_HEARTBEATS)  # noqa: B023  # called in this round
        assert_connected(visitor, service)
        asker.sendto(b"again", tunnel.visitor_address)
        assert target.udp.recvfrom(100) == (b"again", source), "another flow"
        tunnel.assert_works()
    assert not server.find("client.disconnected") + server.find_crashes()
    assert not client.find("server.disconnected") + client.find_crashes()
    assert (client.stop(), server.stop()) == (0, 0)


def reports_of_another_day(run: Nodepass, mark: int, day: str) -> int:
    """How many there are since; there is one an interval."""
    return len(run.find("tunnel.report", after=mark, time=lambda time: not time.startswith(day)))


def asks_for_the_wall_clock(path: Path) -> bool:
    """Whether a module calls a function of WALL_CLOCK."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name | ast.Attribute)
        and node.attr in WALL_CLOCK.get(getattr(node.value, "attr", getattr(node.value, "id", "")), ())
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_nothing_that_waits_or_measures_asks_for_the_wall_clock() -> None:
    package = Path(nodepass.__file__).parent
    assert {path.stem for path in package.rglob("*.py") if asks_for_the_wall_clock(path)} == {
        "certificates",
        "access_log",  # says when a session ended; how long it took is measured by the other clock
        "exposition",  # says in Unix time when the process started, looked at once
        "traffic",  # counts by days and months of the local time
        "top_table",  # shows how long ago a process started, which Prometheus has in Unix time
    }
