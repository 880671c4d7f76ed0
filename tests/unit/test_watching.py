"""What the process shows of its tunnels when they crash, and how failures and numbers are named."""

from __future__ import annotations

import gevent
import gevent.event
import pytest

from nodepass.config import Listen, Settings, parse_listen
from nodepass.daemon import daemon
from nodepass.daemon.systemd import ServiceManager
from nodepass.errors import ClosedError, ProtocolError, RefusedError, TLSError, VerificationError
from nodepass.log import Log
from nodepass.stats import BUCKETS, CONTROL_FAILURES, DATA_FAILURES, Histogram, Stats, failure
from nodepass.tasks import WorkerPool
from nodepass.tunnel.interface import View
from nodepass.urls import ServerURL, parse_url

IDLE = View("server", "", "", 0, None, 0, 0, 0, 1, 0, None)


class Fragile:
    """A tunnel that crashes once, and then runs until it is closed."""

    crashes_left = 1
    control = None

    def __init__(self, stats: Stats) -> None:
        self.log, self.stats = Log("server:1"), stats
        self.sessions = WorkerPool(self.log, stats, 1)
        self.closed = gevent.event.Event()

    def run(self) -> None:
        if Fragile.crashes_left:
            Fragile.crashes_left -= 1
            raise ZeroDivisionError
        self.closed.wait()

    def view(self) -> View:
        return IDLE

    def start(self) -> None: ...
    def stop(self, timeout: float) -> int:  # noqa: ARG002  # nothing to wait for
        return 0

    def reload(self) -> None: ...
    def describe(self) -> str:
        return ""

    def close(self) -> None:
        self.closed.set()


def test_a_crash_is_counted_and_a_supervisor_that_is_gone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fragile] = []

    def make(*given: object) -> Fragile:
        stats = given[-2]
        assert isinstance(stats, Stats)
        made.append(Fragile(stats))
        return made[-1]

    monkeypatch.setattr(daemon, "make_tunnel", make)
    url = parse_url("server://:1/:2?tls=0")
    assert isinstance(url, ServerURL)
    process = daemon.Daemon([url], Settings(service_cooldown=0.01), None, ServiceManager())
    supervisor = process._tasks.spawn("supervise", process._supervise, 0)
    process._supervising.append(supervisor)
    with gevent.Timeout(10):
        while len(made) < 2:
            gevent.sleep(0.01)
    (seen,) = process._watch()
    assert (seen.name, seen.alive, seen.view) == ("server:1", True, IDLE)
    assert seen.stats.trouble["crashes"] == 1
    supervisor.kill()
    assert not process._watch()[0].alive


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (VerificationError("x"), "certificate"),
        (TLSError("x"), "tls"),
        (ProtocolError("x"), "protocol"),
        (ClosedError("x"), "closed"),
        (ConnectionResetError(), "closed"),
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(), "unreachable"),
        (OSError("no route"), "unreachable"),
        (RefusedError("key-mismatch"), "key_mismatch"),
        (RefusedError("made-up-by-a-peer-1234"), "other"),
    ],
)
def test_a_failure_has_one_of_the_known_names(error: OSError, name: str) -> None:
    assert failure(error) == name
    assert name in CONTROL_FAILURES or name in DATA_FAILURES


def test_a_histogram_counts_what_is_at_most_the_bound() -> None:
    histogram = Histogram()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], BUCKETS[-1] + 1):
        histogram.observe(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-2:] == [1, 1]
    assert sum(histogram.counts) == 5
    assert histogram.total == pytest.approx(BUCKETS[0] * 2.01 + BUCKETS[-1] * 2 + 1)


def test_the_snapshot_names_the_reasons_that_have_happened_and_no_others() -> None:
    stats = Stats()
    stats.tcp.begin()
    stats.tcp.end("completed")
    stats.udp_drops["lane_full"] += 2
    stats.trouble["limit_reached"] += 1
    shown = str(stats)
    assert "tcp sessions 1, " in shown
    assert shown.endswith("tcp: completed 1, dropped: lane full 2, limit reached 1")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("off", None),
        (":9464", Listen("", 9464)),
        ("0.0.0.0:1", Listen("0.0.0.0", 1)),
        ("[::]:1", Listen("::", 1)),
        ("metrics.example:0", Listen("metrics.example", 0)),
        ("unix:/run/nodepass.sock", Listen(path="/run/nodepass.sock")),
    ],
)
def test_an_address_to_listen_on_is_read(text: str, listen: Listen | None) -> None:
    assert parse_listen(text) == listen
