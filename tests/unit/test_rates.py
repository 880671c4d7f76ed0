"""The rate of a tunnel: its arithmetic on a clock of its own, and sessions and flows that take turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import gevent
import pytest
from gevent import socket

import nodepass.net.relay
from nodepass.config.kinds import parse_rate
from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.net.deadlines import Deadlines
from nodepass.net.relay import Traffic, relay
from nodepass.net.stopped import stopped_directions
from nodepass.stats import Stats, Way
from nodepass.tunnel import rates as module
from nodepass.tunnel.rates import (
    BURST,
    LEAST_TURN,
    MOST_TURN,
    MOST_WAITING,
    OVERHEAD,
    Bucket,
    DatagramRate,
    NoTurnError,
    Rates,
)
from tests.support.table import each_row
from tests.unit.controls import until
from tests.unit.streams import receive_all, reset, tcp_pair

MEGABIT = 1_000_000
PATIENT = 10.0  # seconds


class Clock:
    """The time that buckets see, and the turns that are due in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@each_row(
    ("text", "bits"),
    [("0", 0), ("8k", 8000), ("8000", 8000), ("500K", 500_000), ("10M", 10**7), ("2.5G", 25 * 10**8), ("100G", 10**11)],
)
def test_a_rate_is_in_decimal_bits_per_second(text: str, bits: int) -> None:
    assert parse_rate(text).bits == bits


@each_row(
    "text",
    ["", "1", "7.9k", "101G", "10m", "10MB", "10 M", "-10M", "1e6", "nan", ".5M", "\u0661M", "0k"],
)
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a rate"):
        parse_rate(text)


def test_a_bucket_lets_as_much_pass_as_time_has_brought(clock: Clock) -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    turns = 0
    for _ in range(1000):
        while bucket.is_free():
            way.bytes += bucket.turn
            turns += 1
        clock.now += 0.01
    saved = BURST * 1e6
    assert turns * bucket.turn == pytest.approx(10e6 + saved, abs=2 * bucket.turn)


def test_a_turn_that_overdraws_the_bucket_is_paid_for_later(clock: Clock) -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    way.bytes += 1_100_000  # a second beyond what was saved up
    for _ in range(99):
        clock.now += 0.01
        assert not bucket.is_free()
    clock.now += 0.02
    assert bucket.is_free()


def test_a_quiet_tunnel_saves_up_no_more_than_a_burst(clock: Clock) -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    clock.now += 3600
    way.bytes += round(BURST * 1e6)
    assert not bucket.is_free()


@pytest.mark.parametrize(("bits", "turn"), [(8000, LEAST_TURN), (8 * MEGABIT, 10_000), (100_000 * MEGABIT, MOST_TURN)])
def test_a_turn_is_worth_a_hundredth_of_a_second_within_bounds(bits: int, turn: int) -> None:
    assert Bucket(bits, [Way()]).turn == turn


def test_both_protocols_of_a_direction_share_its_bucket() -> None:
    stats = Stats()
    rates = Rates.of(Settings(rate_up=parse_rate("8M")), stats)
    assert rates.up
    assert rates.down is None
    stats.udp.up.bytes += 60_000
    stats.udp.down.bytes += 10**9
    assert rates.up.is_free()
    stats.tcp.up.bytes += 60_000
    assert not rates.up.is_free()


def test_turns_begin_in_the_order_in_which_they_were_queued_and_one_can_be_cancelled() -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    way.bytes += 110_000
    begun: list[str] = []
    turns = {name: lambda name=name: begun.append(name) for name in "abcd"}
    for turn in turns.values():
        bucket.queue(turn)
    bucket.cancel(turns["b"])
    assert not bucket.is_free()
    until(lambda: len(begun) == 3)
    assert begun == ["a", "c", "d"]


def test_what_comes_while_turns_wait_does_not_overtake_them(clock: Clock) -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    way.bytes += 110_000

    def turn() -> None:
        pass

    bucket.queue(turn)
    clock.now += 1
    assert not bucket.is_free()
    bucket.cancel(turn)
    assert bucket.is_free()


def test_turns_that_move_much_in_a_row_let_others_run() -> None:
    way = Way()
    bucket = Bucket(100_000 * MEGABIT, [way])
    way.bytes += round(bucket.rate * BURST) + 1
    moved_at_once: list[int] = []

    def turn() -> None:
        way.bytes += MOST_TURN
        moved_at_once[-1] += 1
        if sum(moved_at_once) < 50:
            bucket.queue(turn)

    def count_turns() -> None:
        while sum(moved_at_once) < 50:
            moved_at_once.append(0)
            gevent.sleep(0.0005)

    counter = gevent.spawn(count_turns)
    gevent.sleep(0)
    bucket.queue(turn)
    counter.get(timeout=10)
    assert max(moved_at_once) <= 10


def test_a_greenlet_waits_for_its_turn_and_leaves_the_queue_when_it_is_killed() -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    bucket.wait(PATIENT)  # does not
    way.bytes += 105_000
    killed, waiting = gevent.spawn(bucket.wait, PATIENT), gevent.spawn(bucket.wait, PATIENT)
    gevent.sleep(0)
    assert len(bucket._turns) == 2
    killed.kill()
    assert len(bucket._turns) == 1
    waiting.get(timeout=10)


def test_a_greenlet_waits_for_its_turn_with_a_limit() -> None:
    way = Way()
    bucket = Bucket(8 * MEGABIT, [way])
    way.bytes += 10**9
    with pytest.raises(NoTurnError, match="no turn under the rate within 10ms"):
        bucket.wait(0.01)
    assert not bucket._turns


class Session:
    """A session of a tunnel with a rate."""

    def __init__(self, stack: contextlib.ExitStack, stats: Stats, rates: Rates, idle: float = 0.0) -> None:
        near, self.visitor = stack.enter_context(tcp_pair())
        far, self.target = stack.enter_context(tcp_pair())
        deadlines = Deadlines(idle, idle, data_is_near=False)
        self.running: gevent.Greenlet[..., Traffic] = gevent.Greenlet.spawn(
            relay, near, far, stats, None, deadlines, None, rates
        )
        stack.callback(self.running.kill)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def rates_of(stats: Stats, up: str = "0", down: str = "0") -> Rates:
    return Rates.of(Settings(rate_up=parse_rate(up), rate_down=parse_rate(down)), stats)


def starve(rates: Rates, stats: Stats, seconds: float = 3600.0) -> None:
    """Overdraw the bucket of the way up for so long."""
    assert rates.up
    stats.tcp.up.bytes += round(rates.up.rate * (seconds + BURST)) + LEAST_TURN


def feed(rates: Rates, stats: Stats) -> None:
    """Undo it."""
    assert rates.up
    stats.tcp.up.bytes = 0
    rates.up._level, rates.up._seen = 1.0, 0
    if rates.up._timer is not None:
        rates.up._serve()


def waits(session: Session, stats: Stats, rates: Rates, data: bytes = b"question") -> None:
    """Have the session wait for its turn with these bytes."""
    starve(rates, stats)
    session.visitor.sendall(data)
    assert rates.up
    until(lambda: len(rates.up._turns) == 1)  # type: ignore[union-attr]


def test_bytes_wait_for_their_turn_and_then_arrive(stack: contextlib.ExitStack) -> None:
    stats = Stats()
    rates = rates_of(stats, up="80k")
    session = Session(stack, stats, rates)
    waits(session, stats, rates)
    session.target.sendall(b"the other direction is free")
    assert session.visitor.recv(100) == b"the other direction is free"
    feed(rates, stats)
    assert session.target.recv(100) == b"question"


def test_a_half_close_without_bytes_does_not_wait_for_a_turn(stack: contextlib.ExitStack) -> None:
    stats = Stats()
    rates = rates_of(stats, up="8k")
    session = Session(stack, stats, rates)
    starve(rates, stats)
    session.visitor.shutdown(socket.SHUT_WR)
    assert session.target.recv(1) == b""
    session.target.sendall(b"answer")
    session.target.close()
    assert receive_all(session.visitor) == b"answer"
    assert session.running.get(timeout=10).outcome == "completed"


def test_a_half_close_behind_bytes_follows_them(stack: contextlib.ExitStack) -> None:
    stats = Stats()
    rates = rates_of(stats, up="80k")
    session = Session(stack, stats, rates)
    waits(session, stats, rates)
    session.visitor.shutdown(socket.SHUT_WR)
    feed(rates, stats)
    assert receive_all(session.target) == b"question"


@pytest.mark.parametrize("end", ["visitor", "target"])
def test_a_reset_ends_a_session_that_waits_for_its_turn(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    stopped_directions.timer.stop()  # it may still run for an earlier test, with its own period
    monkeypatch.setattr(stopped_directions.timer, "period", 0.01)
    monkeypatch.setattr(stopped_directions, "patience", 0.05)
    monkeypatch.setattr(nodepass.net.relay, "DELIVERY_GRACE", 0.01)
    stats = Stats()
    rates = rates_of(stats, up="8k")
    session = Session(stack, stats, rates)
    waits(session, stats, rates)
    reset(getattr(session, end))
    assert session.running.get(timeout=10).outcome == "reset"
    assert rates.up
    assert not rates.up._turns
    until(lambda: not stopped_directions.timer.active)
    assert not stopped_directions._gone


def test_a_session_that_is_killed_leaves_the_queue(stack: contextlib.ExitStack) -> None:
    stats = Stats()
    rates = rates_of(stats, up="8k")
    session = Session(stack, stats, rates)
    waits(session, stats, rates)
    session.running.kill()
    assert rates.up
    assert not rates.up._turns


def test_deadlines_do_not_end_a_session_that_waits_for_its_turn(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodepass.net.deadlines.SHORTEST_ROUND", 0.03)
    stats = Stats()
    rates = rates_of(stats, up="80k")
    session = Session(stack, stats, rates, idle=0.1)
    waits(session, stats, rates)
    gevent.wait(timeout=0.5)  # five times as long as either deadline
    assert not session.running.ready()
    feed(rates, stats)
    assert session.target.recv(100) == b"question"
    assert session.running.get(timeout=10).outcome == "idle"


def test_sessions_that_want_more_than_there_is_get_equal_shares_and_a_small_one_is_not_starved(
    stack: contextlib.ExitStack,
) -> None:
    stats = Stats()
    rates = rates_of(stats, up="8M")
    bulk = [Session(stack, stats, rates) for _ in range(3)]
    small = Session(stack, stats, rates)
    received = [0, 0, 0]

    def receive(number: int) -> None:
        while data := bulk[number].target.recv(1 << 16):
            received[number] += len(data)

    for number, each in enumerate(bulk):
        gevent.spawn(receive, number)
        stack.callback(gevent.spawn(each.visitor.sendall, bytes(8 << 20)).kill)
    assert rates.up
    until(lambda: min(received) > 6 * rates.up.turn)  # type: ignore[union-attr]
    begun = list(received)
    small.visitor.sendall(b"?")
    assert small.target.recv(1) == b"?"
    overtaken = [now - before for now, before in zip(received, begun, strict=True)]
    assert max(overtaken) <= 5 * rates.up.turn  # two turns at most, and what was on its way
    until(lambda: min(received) > 20 * rates.up.turn)  # type: ignore[union-attr]
    assert max(received) < 1.5 * min(received)


class Flows:
    """Flows of datagrams under a rate of 8 Mbit/s."""

    def __init__(self) -> None:
        self.stats = Stats()
        self.way = self.stats.udp.up
        self.bucket = Bucket(8 * MEGABIT, [self.way])
        self.rate = DatagramRate(self.bucket, "RATE_UP", Log("test"), self.stats)
        self.sent: list[str] = []

    def send(self, flow: str, size: int) -> None:
        def send() -> None:
            self.way.bytes += size
            self.sent.append(flow)

        self.rate.pass_on(flow, size, send)

    @property
    def dropped(self) -> int:
        return self.stats.udp_drops["rate"]


def test_datagrams_pass_at_once_while_the_rate_allows_it() -> None:
    flows = Flows()
    for _ in range(10):
        flows.send("a", 1000)
    assert flows.sent == ["a"] * 10


def test_flows_take_turns_and_the_order_within_one_is_kept() -> None:
    flows = Flows()
    flows.way.bytes += 110_000
    for _ in range(30):
        flows.send("bulk", 1000)
    flows.send("small", 100)
    assert not flows.sent
    until(lambda: len(flows.sent) == 31)
    assert flows.sent == ["bulk"] * 10 + ["small"] + ["bulk"] * 20
    assert not flows.rate._queues
    assert not flows.rate._waiting
    assert not flows.dropped


def test_the_datagrams_of_a_flow_wait_no_longer_than_a_tenth_of_a_second() -> None:
    flows = Flows()
    flows.way.bytes += 110_000
    for _ in range(150):
        flows.send("a", 1000)
    assert flows.dropped == 50
    flows.send("b", 65507)  # one always may
    assert flows.dropped == 50


def test_the_datagrams_of_all_flows_that_wait_are_limited() -> None:
    flows = Flows()
    flows.way.bytes += 10**6
    for number in range(2 * MOST_WAITING // 65507):
        flows.send(str(number), 65507)
    assert flows.rate._waiting <= MOST_WAITING
    assert flows.dropped == 2 * MOST_WAITING // 65507 - MOST_WAITING // (65507 + OVERHEAD)
    assert len(flows.rate._queues) == MOST_WAITING // (65507 + OVERHEAD)


def test_empty_datagrams_that_wait_are_limited_too() -> None:
    """They use nothing of the rate, but a flood of them would use memory."""
    flows = Flows()
    flows.way.bytes += 10**6
    for _ in range(MOST_WAITING // OVERHEAD + 10):
        flows.send("a", 0)
    assert flows.dropped == 10
    assert flows.rate._waiting <= MOST_WAITING
    flows.rate.end("a")
    assert not flows.rate._waiting


def test_what_waits_of_a_flow_that_ends_is_counted_as_dropped() -> None:
    flows = Flows()
    flows.way.bytes += 110_000
    for _ in range(3):
        flows.send("a", 1000)
    flows.rate.end("a")
    flows.rate.end("unknown")
    assert flows.dropped == 3
    assert not flows.rate._waiting
    flows.send("b", 1)
    until(lambda: flows.sent == ["b"])


def test_a_flow_that_ends_in_its_own_turn_sends_nothing_more() -> None:
    flows = Flows()
    flows.way.bytes += 110_000
    flows.rate.pass_on("a", 10, lambda: flows.rate.end("a"))
    flows.send("a", 10)
    until(lambda: flows.dropped == 1)
    assert not flows.sent
    assert not flows.bucket._turns
