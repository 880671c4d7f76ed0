"""TRAFFIC_LIMIT: the calendar, the count on a clock of its own, and the file that keeps it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from nodepass.config.kinds import TrafficLimit, parse_traffic_limit
from nodepass.errors import ConfigError, StartError
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tunnel import traffic as module
from nodepass.tunnel.traffic import KEPT, Meter, period_at
from nodepass.tunnel.traffic_file import LARGEST, TrafficFile
from tests.support.table import each_row
from tests.unit.controls import until
from tests.unit.records import recorded

LOG = Log("server:10101/web")


def unix(text: str) -> float:
    """The Unix time of a date and time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc).timestamp()


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process; UTC at first."""

    def set_zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    set_zone("UTC")
    yield set_zone
    monkeypatch.undo()
    time.tzset()


class Clock:
    """The time that meters see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = unix("2026-03-15 12:00")
        clock = SimpleNamespace(time=lambda: self.now, strftime=time.strftime, localtime=time.localtime)
        monkeypatch.setattr(module, "time", clock)


@pytest.fixture
def clock(zone: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Clock:  # noqa: ARG001
    return Clock(monkeypatch)


class Metered:
    """A tunnel whose traffic is counted."""

    def __init__(self, directory: Path, limit: str = "1kB/month") -> None:
        log = Log("server:10101/web")
        self.stats = Stats()
        self.file = TrafficFile(str(directory), "server-web", log)
        self.meter = Meter(parse_traffic_limit(limit), self.file, log, self.stats)

    def move(self, size: int) -> None:
        self.stats.tcp.up.bytes += size

    def save(self) -> None:
        self.meter._save()

    def restart(self, directory: Path, limit: str = "1kB/month") -> Metered:
        self.file.close()
        return Metered(directory, limit)


@pytest.fixture
def metered(tmp_path: Path, clock: Clock) -> Iterator[Metered]:  # noqa: ARG001
    metered = Metered(tmp_path)
    yield metered
    metered.file.close()


@each_row(
    ("text", "limit"),
    [
        ("0", TrafficLimit()),
        ("1TB/month", TrafficLimit(10**12, "month", "1TB/month")),
        ("500MB/day", TrafficLimit(5 * 10**8, "day", "500MB/day")),
        ("1.5GB/day", TrafficLimit(1_500_000_000, "day", "1.5GB/day")),
        ("1000PB/month", TrafficLimit(10**18, "month", "1000PB/month")),
    ],
)
def test_a_limit_is_in_decimal_units_for_a_day_or_a_month(text: str, limit: TrafficLimit) -> None:
    assert parse_traffic_limit(text) == limit
    assert bool(limit) == (text != "0")


@each_row(
    "text",
    ["", "1TB", "1/month", "1TB/week", "1TiB/month", "1tb/month", "0GB/day", "1001PB/day", "-1GB/day", "1 GB/day"],
)
def test_what_is_no_limit_on_traffic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a limit"):
        parse_traffic_limit(text)


@pytest.mark.parametrize(
    ("where", "when", "day", "month"),
    [
        ("UTC", "2026-02-28 23:59:59", "2026-02-28", "2026-02"),
        ("UTC", "2026-03-01 00:00:00", "2026-03-01", "2026-03"),
        ("UTC", "2028-02-29 12:00:00", "2028-02-29", "2028-02"),
        ("UTC", "2026-12-31 23:59:59", "2026-12-31", "2026-12"),
        ("UTC", "2027-01-01 00:00:00", "2027-01-01", "2027-01"),
        ("Asia/Tokyo", "2026-03-31 15:00:00", "2026-04-01", "2026-04"),
        ("America/New_York", "2026-04-01 03:59:59", "2026-03-31", "2026-03"),
        # Summer time in Berlin begins at 01:00 UTC on 29 March 2026, a day of 23 hours, and ends on 25 October.
        ("Europe/Berlin", "2026-03-28 22:59:59", "2026-03-28", "2026-03"),
        ("Europe/Berlin", "2026-03-28 23:00:00", "2026-03-29", "2026-03"),
        ("Europe/Berlin", "2026-03-29 21:59:59", "2026-03-29", "2026-03"),
        ("Europe/Berlin", "2026-03-29 22:00:00", "2026-03-30", "2026-03"),
        ("Europe/Berlin", "2026-10-24 22:00:00", "2026-10-25", "2026-10"),
        ("Europe/Berlin", "2026-10-25 22:59:59", "2026-10-25", "2026-10"),
        ("Europe/Berlin", "2026-10-25 23:00:00", "2026-10-26", "2026-10"),
    ],
)
def test_days_and_months_are_those_of_the_local_time(
    zone: Callable[[str], None], where: str, when: str, day: str, month: str
) -> None:
    zone(where)
    assert (period_at(unix(when), "day"), period_at(unix(when), "month")) == (day, month)


def test_both_directions_and_protocols_are_counted(metered: Metered) -> None:
    for number, way in enumerate((metered.stats.tcp.up, metered.stats.tcp.down, metered.stats.udp.up)):
        way.bytes += 10**number
    metered.stats.udp.down.bytes += 800
    assert metered.meter.used == 911
    assert not metered.meter.is_used_up
    metered.move(89)
    assert metered.meter.is_used_up


def test_a_count_goes_on_after_a_restart(metered: Metered, tmp_path: Path) -> None:
    metered.move(600)
    metered.save()
    again = metered.restart(tmp_path)
    assert again.meter.used == 600
    again.move(400)
    assert again.meter.is_used_up
    again.file.close()


def test_what_a_tunnel_moved_before_its_meter_was_made_again_is_not_counted_twice(tmp_path: Path, clock: Clock) -> None:
    assert clock.now
    stats = Stats()
    stats.tcp.up.bytes = 500
    file = TrafficFile(str(tmp_path), "server-web", LOG)
    assert Meter(parse_traffic_limit("1kB/day"), file, LOG, stats).used == 0
    file.close()


def test_a_new_month_begins_at_zero(metered: Metered, clock: Clock) -> None:
    metered.move(1000)
    assert metered.meter.is_used_up
    clock.now = unix("2026-03-31 23:59:59")
    assert metered.meter.is_used_up
    clock.now = unix("2026-04-01 00:00:00")
    assert metered.meter.used == 0
    assert not metered.meter.is_used_up


def test_a_clock_that_jumps_loses_no_count(metered: Metered, clock: Clock, tmp_path: Path) -> None:
    metered.move(700)
    assert metered.meter.used == 700
    clock.now = unix("2040-01-01")  # far ahead, for a moment
    metered.move(1)
    assert metered.meter.used == 1
    metered.save()
    clock.now = unix("2026-03-15 12:00")
    assert metered.meter.used == 700
    clock.now = unix("2026-04-01 00:00:01")
    metered.move(20)
    assert metered.meter.used == 20
    clock.now = unix("2026-03-31 23:59:59")  # set back over midnight
    metered.move(30)
    assert metered.meter.used == 730
    clock.now = unix("2026-04-01 00:00:00")
    assert metered.meter.used == 20
    metered.save()
    state = json.loads((tmp_path / "traffic-server-web.json").read_text())
    assert state == {"tunnel": "server-web", "bytes": {"2026-03": 730, "2026-04": 20, "2040-01": 1}}


def test_a_few_periods_are_kept_and_always_the_present_one(metered: Metered, clock: Clock) -> None:
    for year in range(2030, 2030 + 2 * KEPT):
        clock.now = unix(f"{year}-01-01")
        metered.move(1)
        assert metered.meter.used == 1
    assert len(metered.meter._counts) == KEPT
    clock.now = unix("2026-01-01")
    metered.move(5)
    assert metered.meter.used == 5
    assert len(metered.meter._counts) == KEPT


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with recorded(logging.INFO) as records:
        yield records


def said(logged: list[Any]) -> list[str]:
    return [each.event for each in logged]


def test_each_step_is_said_once_in_a_month(metered: Metered, clock: Clock, logged: list[Any]) -> None:
    for size, events in (
        (799, []),
        (1, ["traffic.nearly_used"]),
        (100, []),
        (100, ["traffic.used_up"]),
        (500, []),
    ):
        metered.move(size)
        logged.clear()
        metered.meter._report()
        metered.meter._report()
        assert said(logged) == events
    clock.now = unix("2026-04-01")
    logged.clear()
    metered.meter._report()
    metered.meter._report()
    assert said(logged) == ["traffic.renewed"]
    metered.move(5000)
    logged.clear()
    metered.meter._report()
    assert said(logged) == ["traffic.used_up"]


def test_a_file_is_replaced_as_a_whole_and_for_its_owner_only(metered: Metered, tmp_path: Path) -> None:
    metered.move(1)
    metered.save()
    path = tmp_path / "traffic-server-web.json"
    before = path.stat()
    assert before.st_mode & 0o777 == 0o600
    metered.save()
    assert path.stat().st_ino == before.st_ino  # nothing has moved: nothing is written
    with path.open() as reader:
        metered.move(1)
        metered.save()
        assert json.load(reader)["bytes"] == {"2026-03": 1}
    assert json.loads(path.read_text())["bytes"] == {"2026-03": 2}
    assert {each.name for each in tmp_path.iterdir()} == {"traffic-server-web.json", "traffic-server-web.lock"}


@pytest.mark.parametrize("is_broken", ["write", "fsync", "rename"])
def test_a_disk_that_takes_nothing_is_logged_and_the_count_goes_on_in_memory(
    metered: Metered,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[Any],
    is_broken: str,
) -> None:
    metered.move(1)
    metered.save()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, is_broken, fail)
        for _ in range(3):
            metered.move(10)
            metered.save()
    assert said(logged) == ["traffic.write_failed"]
    assert metered.meter.used == 31
    path = tmp_path / "traffic-server-web.json"
    assert json.loads(path.read_text())["bytes"] == {"2026-03": 1}
    metered.save()  # there is room again
    assert json.loads(path.read_text())["bytes"] == {"2026-03": 31}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 40_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "not a state file of nodepass"),
        (b'{"tunnel": "server-web"}', "not a state file of nodepass"),
        (b'{"tunnel": "server-ssh", "bytes": {"2026-03": 5}}', "of another tunnel, 'server-ssh'"),
        (b'{"tunnel": "server-web", "bytes": {"2026-03": -5}}', "not numbers of bytes"),
        (b'{"tunnel": "server-web", "bytes": {"2026-03": "5"}}', "not numbers of bytes"),
        (b'{"tunnel": "server-web", "bytes": {"2026-03": true}}', "not numbers of bytes"),
        (b'{"tunnel": "server-web", "bytes": {"2026-03": 1e3}}', "not numbers of bytes"),
        (b" " * (LARGEST + 1), f"longer than {LARGEST} bytes"),
        (None, "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_used_is_set_aside(
    tmp_path: Path, clock: Clock, logged: list[Any], content: bytes | None, why: str
) -> None:
    assert clock.now
    path = tmp_path / "traffic-server-web.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    metered = Metered(tmp_path)
    [entry] = logged
    assert (entry.event, entry.fields["error"]) == ("traffic.unusable", why)
    aside = Path(entry.fields["aside"])
    assert aside.is_dir() if content is None else aside.read_bytes() == content
    metered.move(7)
    metered.save()
    metered.file.close()
    assert json.loads(path.read_text())["bytes"] == {"2026-03": 7}


def test_a_second_tunnel_of_the_same_name_does_not_count_into_the_same_file(metered: Metered, tmp_path: Path) -> None:
    metered.move(1)
    with pytest.raises(StartError, match=r"is counted already in .*traffic-server-web\.lock"):
        TrafficFile(str(tmp_path), "server-web", LOG)
    TrafficFile(str(tmp_path), "server-ssh", LOG).close()
    metered.file.close()
    TrafficFile(str(tmp_path), "server-web", LOG).close()


def test_a_directory_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*: No such file or directory; allowed: a directory in which"):
        TrafficFile(str(tmp_path / "missing"), "server-web", LOG)


def test_a_full_disk_at_the_start_does_not_keep_the_tunnel_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", fail)
    file = TrafficFile(str(tmp_path), "server-web", LOG)
    assert said(logged) == ["traffic.unlocked"]
    assert file.save({"2026-03": 1})
    file.close()


def test_no_link_is_followed(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_text("untouched")
    (tmp_path / "traffic-server-web.json.new").symlink_to(foreign)
    file = TrafficFile(str(tmp_path), "server-web", LOG)
    error = file.save({"2026-03": 1})
    assert error
    assert "symbolic" in os.strerror(error.errno or 0)
    assert foreign.read_text() == "untouched"
    file.close()


def test_the_loop_writes_at_most_once_a_second_and_when_it_is_ended(
    metered: Metered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.02)
    path = tmp_path / "traffic-server-web.json"
    metered.move(1)
    loop = gevent.spawn(metered.meter.run)
    until(path.exists)
    monkeypatch.setattr(module, "INTERVAL", 3600.0)
    until(lambda: metered.meter._saved == {"2026-03": 1})
    gevent.sleep(0.05)  # it sleeps for an hour now
    metered.move(5)
    loop.kill()
    assert json.loads(path.read_text())["bytes"] == {"2026-03": 6}
