"""The lines of the access log: their columns as text and as JSON, and that nothing from a peer can forge one."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest

from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.net.relay import Traffic, relay
from nodepass.stats import HEADER_FAILURES, REFUSALS, Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.part import Common
from nodepass.visitors.access_log import COLUMNS, AccessLog, Visit
from tests.support.command import call
from tests.support.fail2ban import banned
from tests.support.table import each_row
from tests.unit.streams import tcp_pair

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "visitors.md"


class Lines(list[str]):
    """The access log of a tunnel, whose lines are kept here."""

    def __init__(self, style: str = "text", tunnel: str = "server:10101/web") -> None:
        super().__init__()
        log, stats = Log(tunnel), Stats()
        common = Common(Settings(log_format=style), log, stats, TaskGroup(log, stats), self.append)
        access = AccessLog.of(common)
        assert access
        self.log = access

    def begin(self, visitor: str = "203.0.113.7:51000", protocol: str = "tcp") -> Visit:
        """A session that began a quarter of a second ago, on a server."""
        visit = self.log.begin(protocol, time.monotonic() - 0.25, visitor, "198.51.100.1:443")
        visit.session, visit.client = "5f0c1a77", "192.0.2.7:40312"
        return visit


def test_without_a_place_there_is_no_access_log_and_no_visit() -> None:
    log, stats = Log("server:1"), Stats()
    assert AccessLog.of(Common(Settings(), log, stats, TaskGroup(log, stats))) is None


def test_a_line_of_text_has_its_columns_in_the_documented_order() -> None:
    lines = Lines()
    lines.begin().end_relayed(Traffic(up=517, down=20480, first_byte=0.0041, ended=2))
    [line] = lines
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} .+", line)
    words = line.split(" ")[2:]
    seconds = words.pop(-2)
    assert 0.25 <= float(seconds) < 10
    assert words == [
        *("server:10101/web", "5f0c1a77", "tcp", "203.0.113.7:51000", "198.51.100.1:443", "192.0.2.7:40312"),
        *("-", "-", "517", "20480", "0.004100", "completed"),
    ]
    documented = re.findall(r"^\| [\d, ]+ \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(documented)) == ["time", *COLUMNS]


def test_as_json_a_line_is_an_object_with_the_same_columns() -> None:
    lines = Lines("json", tunnel="client:10101")
    visit = lines.log.begin("tcp", time.monotonic())
    visit.session, visit.target, visit.dial = "5f0c1a77", "localhost:80", "timeout"
    visit.end("unreachable")
    shown = json.loads(lines[0])
    assert list(shown) == ["time", *COLUMNS]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", shown["time"])
    assert [name for name in shown if shown[name] is None] == ["visitor", "local", "client", "first_byte"]
    assert (shown["target"], shown["dial"], shown["outcome"]) == ("localhost:80", "timeout", "unreachable")
    assert isinstance(shown["seconds"], float)


def test_a_datagram_back_tells_the_time_to_the_first_byte_once() -> None:
    lines = Lines("json")
    visit = lines.begin(protocol="udp")
    visit.count_up(3)
    visit.count_down(5)
    first = visit.first_byte
    visit.count_down(5)
    visit.end("completed")
    shown = json.loads(lines[0])
    assert (shown["up"], shown["down"]) == (3, 10)
    assert first is not None
    assert shown["first_byte"] == round(first, 6) >= 0.25


@each_row("forged", ["a b", "a\nb", 'a"b', "a\\b", "\x1b[2J", "", "ä", "x" * 301])
def test_text_of_a_peer_that_is_no_word_is_unknown(forged: str) -> None:
    lines, objects = Lines(), Lines("json")
    for each in (lines, objects):
        each.begin(visitor=forged).end("completed")
    assert lines[0].split(" ")[5] == "-"
    assert len(lines[0].split(" ")) == len(COLUMNS) + 2
    assert json.loads(objects[0])["visitor"] is None


@pytest.mark.parametrize("cut", [False, True])
def test_a_relay_that_is_killed_has_a_line_too(cut: bool) -> None:
    lines = Lines("json")
    with tcp_pair() as (near, visitor), tcp_pair() as (far, target):
        on_end: Callable[[Traffic], object] = lines.begin().end_relayed
        running = gevent.spawn(relay, near, far, Stats(), time.monotonic(), None, on_end)
        visitor.sendall(b"hello")
        assert target.recv(5) == b"hello"
        target.sendall(b"hi")
        assert visitor.recv(5) == b"hi"
        if cut:
            running.kill()
        else:
            visitor.close()
            target.close()
            running.get(timeout=10)
    shown = json.loads(lines[0])
    assert (shown["up"], shown["down"], shown["outcome"]) == (5, 2, "cut" if cut else "completed")
    assert 0 < shown["first_byte"] < 10


@each_row("place", ["on", "access.log", "unix:access.sock", "unix:", f"unix:/{'x' * 107}", "/a\0b"])
def test_a_place_is_absolute_so_that_a_typo_makes_no_file(place: str) -> None:
    if "\0" in place:
        done = call(f"server://:10101/:1?access_log={place.replace(chr(0), '%00')}")
    else:
        done = call("server://:10101/:1", env={"ACCESS_LOG": place})
    assert done.code == 2
    assert len(done.lines) == 1
    assert "ACCESS_LOG" in done.errors.upper()


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.programs("fail2ban-regex")
def test_the_filter_of_fail2ban_finds_visitors_that_send_nothing(style: str, tmp_path: Path) -> None:
    lines, of_client = Lines(style), Lines(style, tunnel="client:10101")
    for visitor, traffic in (
        ("203.0.113.7:51000", Traffic(ended=2)),
        ("[2001:db8::7]:51000", Traffic(down=20, ended=2, first_byte=0.1)),
        ("203.0.113.8:51000", Traffic(up=1, down=20, ended=2)),
    ):
        lines.begin(visitor).end_relayed(traffic)
    for outcome in ("unserved", "unreachable", "cut"):
        lines.begin("203.0.113.9:1").end(outcome)
    for number, why in enumerate(REFUSALS):
        lines.log.begin("tcp", time.monotonic(), f"198.51.100.{number}:1", "198.51.100.9:443").end(why)
    lines.begin("203.0.113.10:1", protocol="udp").end("unanswered")
    of_client.begin("203.0.113.11:1").end_relayed(Traffic(ended=2))
    path = tmp_path / "access.log"
    path.write_text("\n".join([*lines, *of_client, ""]))
    assert banned(path) == ["203.0.113.7", "2001:db8::7"]
    assert banned(path, "any") == ["203.0.113.7", "2001:db8::7", "203.0.113.8"]
    faultless = (*HEADER_FAILURES, "traffic_limit")
    of_visitors = [f"198.51.100.{number}" for number, why in enumerate(REFUSALS) if why not in faultless]
    assert banned(path, "refused") == of_visitors, "proxies are not banned"
