"""The client's pool against a model: random orders of connections, first bytes, ends, launches, dials and intervals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias, cast
from unittest import mock

import gevent
import pytest
from gevent import Greenlet, GreenletExit
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nodepass.client import pool as client_pool
from nodepass.client.pool import LAUNCH_WITHIN, MAKE_UP_EVERY, YOUNG, ClientPool, Comparison, ConnectionStates
from nodepass.errors import NoDataConnection
from nodepass.log import Log
from nodepass.net.stream import Stream
from nodepass.outbound.idle_cuts import REPLACED_AT, SHORTEST, IdleCuts
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer
from nodepass.tunnel import pool as tunnel_pool
from tests.support.table import each_row

LOWEST, HIGHEST = 2, 6
IDS = st.sampled_from([f"{number:08x}" for number in range(6)])  # few, so that some are given twice
LONG = 60.0  # seconds: a claim that waits so long is ended by something else


Claim: TypeAlias = "Greenlet[..., Any]"


class Bug(Exception):
    """A fault in the code that looks at a connection."""


class FakeStream:
    """A data connection whose peer the test plays; it objects to a wrong order of calls."""

    def __init__(self, id: str, added: float) -> None:
        self.id = id
        self.added = added
        self.ended = 0.0  # when its first bytes or its end came
        self.place = "idle"  # by the model: idle, early, reserved, claimed or closed
        self.closed = 0
        self._input: bool | Bug | None = None
        self._callback: Any = None

    def watch(self, callback: Any, *args: object) -> None:
        assert not self.closed
        assert not self._callback
        self._callback = callback, args

    def unwatch(self) -> None:
        self._callback = None

    def peek(self) -> bool | None:
        assert not self.closed
        if isinstance(self._input, Bug):
            raise self._input
        return self._input

    def close(self) -> None:
        assert not self._callback, "a watcher would be left behind"
        self.closed += 1

    def abort(self) -> None:
        self.close()

    @property
    def watched(self) -> bool:
        return self._callback is not None

    def bring(self, what: bool | Bug | None) -> None:
        """Be readable, as the event loop sees it."""
        self._input = what
        callback, args = self._callback
        callback(*args)
        assert what is None or not self.watched, "the loop would call back without a pause"


class FakeTimer(IdleTimer):
    """An idle timer that looks when the test says so."""

    __slots__ = ("_active",)

    def __init__(self, period: float, look: Callable[[], bool]) -> None:
        super().__init__(period, look)
        self._active = False

    @property
    def active(self) -> bool:
        return self._active

    def start(self) -> None:
        self._active = True

    def stop(self) -> None:
        self._active = False

    def run(self) -> None:
        self._run()


class States(ConnectionStates[int]):
    """The pure part of the pool, with numbers for streams."""

    def __init__(self) -> None:
        super().__init__(LOWEST, HIGHEST, Stats())
        self.now = 1000.0

    def contents(self) -> list[int]:
        """Every connection, once for each state that it is in."""
        early = (each.stream for each in self.early.values())
        return sorted([*self.idle.values(), *early, *self.reserved.values()])

    def state_of(self, stream: int) -> str:
        """Its state; `gone` where it was claimed or closed."""
        if any(each.stream == stream for each in self.early.values()):
            return "early"
        if stream in self.idle.values():
            return "idle"
        return "reserved" if stream in self.reserved.values() else "gone"

    def happen(self, event: str, id: str, stream: int) -> list[int]:
        """Have an event at one connection; those that the caller must close or has claimed."""
        match event:
            case "add":
                closing = self.add(id, stream)
            case "first bytes" | "end":
                closing = []
                if id in self.idle:
                    self.become_early(id, event == "first bytes", False, self.now)
            case "reserve":
                closing = []
                self.reserve(id)
            case "drop":
                closing = self.drop(id)
            case "claim":
                claimed = self.claim(id)
                closing = [] if claimed is None else [(id, claimed)]
            case "wait":
                self.now += LAUNCH_WITHIN
                closing = []
            case "expire":
                closing = self.expire(self.now + 0.1)
            case _:
                closing = self.close()
        return [stream for _, stream in closing]


@each_row(
    ("state", "event", "expected"),
    [
        ("idle", "first bytes", "early"),
        ("idle", "end", "early"),
        ("idle", "reserve", "reserved"),
        ("idle", "drop", "idle"),
        ("idle", "claim", "gone"),
        ("idle", "expire", "idle"),
        ("idle", "close", "gone"),
        ("early", "reserve", "reserved"),
        ("early", "drop", "early"),
        ("early", "claim", "gone"),
        ("early", "expire", "gone"),
        ("early", "close", "gone"),
        ("reserved", "reserve", "reserved"),
        ("reserved", "drop", "gone"),
        ("reserved", "claim", "gone"),
        ("reserved", "expire", "reserved"),
        ("reserved", "close", "gone"),
    ],
)
def test_an_event_moves_a_connection_to_the_state_that_the_table_says(state: str, event: str, expected: str) -> None:
    states = States()
    for before in {"idle": ["add"], "early": ["add", "end"], "reserved": ["add", "reserve"]}[state]:
        assert not states.happen(before, "00000001", 7)
    assert states.state_of(7) == state
    states.happen("wait", "00000001", 7)
    gone = states.happen(event, "00000001", 7)
    assert states.state_of(7) == expected
    assert gone == ([7] if expected == "gone" else [])


@pytest.mark.parametrize("state", ["idle", "early", "reserved"])
def test_a_connection_whose_id_is_taken_is_closed_and_the_other_stays(state: str) -> None:
    """Else a replayed id would throw out the real connection."""
    states = States()
    for before in {"idle": ["add"], "early": ["add", "end"], "reserved": ["add", "reserve"]}[state]:
        states.happen(before, "00000001", 7)
    assert states.happen("add", "00000001", 8) == [8]
    assert (states.state_of(7), states.state_of(8)) == (state, "gone")


EVENTS = ("add", "first bytes", "end", "reserve", "drop", "claim", "wait", "expire", "close")


@given(st.lists(st.tuples(st.sampled_from(EVENTS), IDS), max_size=60))
def test_a_connection_leaves_the_states_once_and_is_returned_then(events: list[tuple[str, str]]) -> None:
    states = States()
    for stream, (event, id) in enumerate(events):
        before = states.contents() + ([stream] if event == "add" else [])
        gone = states.happen(event, id, stream)
        assert sorted(states.contents() + gone) == sorted(before)
        assert LOWEST <= states.capacity.size <= HIGHEST


def test_an_end_lowers_the_capacity_until_a_launch_shows_that_its_visitor_had_left() -> None:
    states = States()
    states.capacity.size = 5
    for stream, id in enumerate(["00000001", "00000002"]):
        states.happen("add", id, stream)
        states.happen("end", id, stream)
    assert states.capacity.size == 3
    states.happen("reserve", "00000001", 0)
    assert states.capacity.size == 4


def test_a_burst_of_sessions_is_replaced_at_once_up_to_the_limit() -> None:
    """Those whose launch waits for a slot, and those whose first bytes overtook it, do not hold up the next ones."""
    states = States()
    for number in range(HIGHEST):
        assert states.missing == min(LOWEST, HIGHEST - number)
        states.happen("add", id := f"{number:08x}", number)
        states.happen("first bytes" if number % 2 else "reserve", id, number)
        states.capacity.size = LOWEST
    assert states.missing == 0
    states.happen("claim", "00000000", 0)
    assert states.missing == 1


# The server's count

CAPACITY = 32


def beats(comparison: Comparison, mine: int, known: int, count: int, now: float = 1000.0) -> list[int]:
    """What so many heartbeats find missing, with the same connections here all the time."""
    return [comparison.count_missing(map(str, range(mine)), known, CAPACITY, now) for _ in range(count)]


@each_row(
    ("mine", "known", "missing"),
    [(10, 10, 0), (10, 11, 0), (0, 0, 0), (10, 9, 1), (10, 6, 4), (10, 5, 4), (32, 0, 4)],
)
def test_what_the_server_lacks_three_times_in_a_row_is_dialled_up_to_an_eighth_of_the_pool(
    mine: int, known: int, missing: int
) -> None:
    """A connection counts once it has been there for three heartbeats."""
    assert beats(Comparison(), mine, known, 6) == [0] * 5 + [missing]


def test_one_heartbeat_with_as_many_begins_the_row_again() -> None:
    comparison = Comparison()
    assert beats(comparison, 10, 9, 5) == [0] * 5
    assert beats(comparison, 10, 10, 1) == [0]
    assert beats(comparison, 10, 9, 3) == [0, 0, 1]


def test_connections_that_come_and_go_are_not_compared() -> None:
    """As in a busy pool, where the server's number is always a moment old."""
    comparison = Comparison()
    for turn in range(20):
        young = [f"{turn}-{number}" for number in range(10)]
        assert comparison.count_missing(young, 0, CAPACITY, 1000.0) == 0


def test_what_is_missing_is_dialled_once_in_ten_seconds() -> None:
    comparison = Comparison()
    assert beats(comparison, 10, 9, 6)[-1] == 1
    assert not any(beats(comparison, 10, 9, 20, 1000.0 + MAKE_UP_EVERY - 0.1))
    assert beats(comparison, 10, 9, 1, 1000.0 + MAKE_UP_EVERY) == [1]


def test_a_small_pool_dials_one() -> None:
    comparison = Comparison()
    found = [comparison.count_missing(["a", "b"], 0, 2, 1000.0) for _ in range(6)]
    assert found[-1] == 1


def test_what_is_dialled_beyond_the_capacity_is_given_back_by_the_ends_of_dead_connections() -> None:
    """The capacity stays, which other ends lower."""
    states = States()
    states.capacity.size, states.extra = 4, 1
    for number in range(5):
        states.happen("add", f"{number:08x}", number)
    assert states.missing == 0
    states.happen("end", "00000000", 0)
    assert (states.extra, states.capacity.size, states.missing) == (0, 4, 0)
    states.happen("end", "00000001", 1)
    assert (states.extra, states.capacity.size) == (0, 3)


def test_a_pool_keeps_within_limits_that_change() -> None:
    pool = ClientPool(Log("test"), Stats(), 4, 16)
    assert (pool.capacity, pool.missing) == (4, 4)
    pool.limit(2, 3)
    assert (pool.capacity, pool.missing) == (3, 3)
    pool.limit(5, 8)
    assert (pool.capacity, pool.missing) == (5, 5)


class Proxy:
    """A pool of four behind a proxy, which ends connections as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(client_pool, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(client_pool, "IdleTimer", FakeTimer)
        self.cuts = IdleCuts()
        self.pool = ClientPool(Log("test"), Stats(), 4, 16, self.cuts)
        self._made = 0

    def fill(self) -> list[FakeStream]:
        """Add what is missing."""
        made = []
        while self.pool.missing > 0:
            self._made += 1
            made.append(FakeStream(f"{self._made:08x}", self.now))
            self.pool.add(made[-1].id, cast(Stream, made[-1]))
        return made

    def wait(self, seconds: float) -> None:
        """Let time pass, and timers that are due look."""
        self.now += seconds
        for timer in (self.pool._timer, self.pool._cut_timer):
            assert isinstance(timer, FakeTimer)
            if timer.active:
                timer.run()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Proxy:
    return Proxy(monkeypatch)


def test_a_proxy_that_has_ended_a_pool_finds_the_next_one_replaced_before(proxy: Proxy) -> None:
    first = proxy.fill()
    proxy.wait(60)
    for stream in first:
        stream.bring(False)
    second = proxy.fill()
    created = proxy.pool._capacity.created
    proxy.wait(LAUNCH_WITHIN + 1)
    assert proxy.cuts.limit == pytest.approx(60)
    proxy.wait(60 * REPLACED_AT - LAUNCH_WITHIN - 2)
    assert proxy.pool.missing == 0
    proxy.wait(2)
    assert len(proxy.pool) == 4
    assert len(proxy.fill()) == 4
    for stream in second:
        stream.bring(False)
    assert (proxy.pool.capacity, proxy.pool.missing, len(proxy.pool)) == (4, 0, 4)
    assert proxy.pool._capacity.created == created, "replacements show no need for more"


def test_connections_that_end_at_other_ages_or_with_launches_say_nothing_of_a_proxy(proxy: Proxy) -> None:
    """Such as those that the server ends because it has too many: the oldest, and never all."""
    for age in (20, 40, 30, 60):
        [oldest, *others] = proxy.fill()
        proxy.wait(age)
        oldest.bring(False)
        proxy.wait(LAUNCH_WITHIN + 1)
        for stream in others:
            proxy.pool.reserve(stream.id)
            proxy.pool.drop(stream.id)
    streams = proxy.fill()
    proxy.wait(60)
    for stream in streams:
        stream.bring(False)
        proxy.pool.reserve(stream.id)  # the launch of a visitor that left at once
    proxy.wait(LAUNCH_WITHIN + 1)
    assert proxy.cuts.limit is None
    proxy.pool.end_interval()
    assert not proxy.cuts._since, "what is not idle is forgotten"


def test_two_ends_at_one_age_and_different_times_are_a_limit(proxy: Proxy) -> None:
    for _ in range(2):
        assert proxy.cuts.limit is None
        [oldest, *others] = proxy.fill()
        proxy.wait(30)
        oldest.bring(False)
        proxy.wait(LAUNCH_WITHIN + 1)
        for stream in others:
            proxy.pool.reserve(stream.id)
            proxy.pool.drop(stream.id)
    assert proxy.cuts.limit == pytest.approx(30)


def test_what_ends_soon_was_not_idle_for_too_long(proxy: Proxy) -> None:
    for _ in range(3):
        streams = proxy.fill()
        proxy.wait(SHORTEST - 1)
        for stream in streams:
            stream.bring(False)
        proxy.wait(LAUNCH_WITHIN + 1)
    assert proxy.cuts.limit is None


class PoolMachine(RuleBasedStateMachine):
    """Plays the filler, the signal reader, the launch handlers, the report, the timer and the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        quiet = mock.patch.object(logging.getLogger("nodepass"), "disabled", new=True)
        timed = [module for module in (client_pool, tunnel_pool) if hasattr(module, "time")]
        timer = mock.patch.object(client_pool, "IdleTimer", FakeTimer)
        self.patches: list[Any] = [quiet, timer, *(mock.patch.object(module, "time", clock) for module in timed)]
        for patch in self.patches:
            patch.start()
        self.stats = Stats()
        self.pool = ClientPool(Log("test"), self.stats, LOWEST, HIGHEST, IdleCuts())
        self.timer = cast(FakeTimer, self.pool._timer)
        self.streams: list[FakeStream] = []
        self.waiting: dict[str, Claim] = {}  # claims by id
        self.dialling = 0
        self.young: set[str] = set()  # ended as soon as they were made, their launches not read so far
        self.bugs = 0

    # The model

    @property
    def extra(self) -> int:
        return self.pool._states.extra

    @property
    def due(self) -> dict[str, None]:
        return self.pool._states.due

    def at(self, *places: str) -> list[FakeStream]:
        return [each for each in self.streams if each.place in places]

    def find(self, id: str, *places: str) -> FakeStream | None:
        """The connection of this id in the first of these places that has one."""
        return next((each for place in places for each in self.at(place) if each.id == id), None)

    def move(self, stream: FakeStream, place: str) -> None:
        """Move a connection to another state."""
        if stream.place == "early":
            self.young.discard(stream.id)
        stream.place = place

    def end_dial(self) -> None:
        self.dialling -= 1
        if not self.dialling:
            for id in list(self.waiting):
                self.assert_failed(self.waiting.pop(id))

    def settle(self) -> None:
        """Let greenlets run."""
        for _ in range(3):
            gevent.sleep(0)

    def assert_failed(self, claim: Claim) -> None:
        self.settle()
        assert isinstance(claim.value, NoDataConnection)

    def start_claim(self, id: str) -> Claim:
        def claim() -> Stream | NoDataConnection:
            try:
                return self.pool.claim(id, LONG)
            except NoDataConnection as error:
                return error

        return Greenlet.spawn(claim)

    # The filler

    @initialize()
    def begin(self) -> None:
        self.fill()

    @precondition(lambda self: self.pool.wanted.is_set())
    @rule()
    def fill(self) -> None:
        pool = self.pool
        pool.wanted.clear()
        before = self.dialling
        while pool.missing > 0:
            pool.begin_dial()
            self.dialling += 1
        if self.dialling > before:
            everything = len(self.at("idle", "early", "reserved")) + self.dialling
            assert len(pool) + self.dialling == pool.capacity + self.extra + len(self.due) or everything == HIGHEST

    @precondition(lambda self: self.dialling)
    @rule(id=IDS)
    def succeed(self, id: str) -> None:
        stream = FakeStream(id, self.now)
        claim = self.waiting.pop(id, None)
        if claim:
            stream.place = "claimed"
        else:
            stream.place = "closed" if self.find(id, "idle", "early", "reserved") else "idle"
        self.streams.append(stream)
        self.pool.add(id, cast(Stream, stream))
        self.pool.end_dial()
        self.end_dial()
        self.settle()
        if claim:
            assert claim.value is stream

    @precondition(lambda self: self.dialling)
    @rule()
    def fail(self) -> None:
        self.pool.end_dial()
        self.end_dial()
        self.settle()

    @rule()
    def ask_whether_the_server_wants_more(self) -> None:
        unwanted = len(self.young) >= max(1, self.pool.capacity)
        assert self.pool.should_pause() == unwanted
        if unwanted:
            self.young.clear()

    # The event loop

    @precondition(lambda self: self.at("idle"))
    @rule(data=st.data(), what=st.sampled_from([True, False, None]))
    def become_readable(self, data: st.DataObject, what: bool | None) -> None:
        stream = data.draw(st.sampled_from(self.at("idle")))
        stream.ended = self.now
        if what is not None:
            self.move(stream, "early")
            if not what and self.now - stream.added < YOUNG:
                self.young.add(stream.id)
        stream.bring(what)
        self.settle()

    @precondition(lambda self: self.at("idle"))
    @rule(data=st.data())
    def be_looked_at_by_wrong_code(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.at("idle")))
        stream.place = "closed"
        stream.bring(Bug())
        self.bugs += 1
        assert self.stats.trouble["bugs"] == self.bugs

    # The proxy

    @precondition(lambda self: self.at("idle"))
    @rule(data=st.data())
    def be_about_to_end(self, data: st.DataObject) -> None:
        stream = data.draw(st.sampled_from(self.at("idle")))
        self.pool._states.make_due([stream.id])
        self.pool._finish()

    @invariant()
    def only_what_is_idle_is_about_to_end(self) -> None:
        assert set(self.due) <= {each.id for each in self.at("idle")}

    # The signal reader

    @rule(id=IDS)
    def reserve(self, id: str) -> None:
        self.pool.reserve(id)
        if stream := self.find(id, "early", "idle"):
            self.move(stream, "reserved")
        self.settle()

    @rule(id=IDS)
    def drop(self, id: str) -> None:
        self.pool.drop(id)
        if stream := self.find(id, "reserved"):
            self.move(stream, "closed")

    # The launch handlers

    @rule(id=IDS)
    def claim(self, id: str) -> None:
        stream = self.find(id, "reserved", "early", "idle")
        may_wait = self.dialling and id not in self.waiting
        claim = self.start_claim(id)
        self.settle()
        if stream:
            self.move(stream, "claimed")
            assert claim.value is stream
        elif may_wait:
            assert not claim.ready()
            self.waiting[id] = claim
        else:
            self.assert_failed(claim)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), comes=st.booleans())
    def let_a_claim_time_out(self, data: st.DataObject, comes: bool) -> None:
        """A connection that comes in the very moment in which the claim gives up is not lost."""
        id = data.draw(st.sampled_from(sorted(self.waiting)))
        claim = self.waiting[id]
        claim.kill(gevent.Timeout(), block=False)
        if comes:
            self.succeed(id)
        else:
            del self.waiting[id]
            self.assert_failed(claim)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), comes=st.booleans())
    def kill_a_claim(self, data: st.DataObject, comes: bool) -> None:
        """A connection that is handed over to a greenlet which is being killed is closed."""
        id = data.draw(st.sampled_from(sorted(self.waiting)))
        claim = self.waiting.pop(id)
        claim.kill(block=False)
        if comes:
            stream = FakeStream(id, self.now)
            stream.place = "closed"
            self.streams.append(stream)
            self.pool.add(id, cast(Stream, stream))
            self.pool.end_dial()
            self.end_dial()
        self.settle()
        assert isinstance(claim.value, GreenletExit)

    # The report, the timer, and time

    @rule(known=st.integers(0, HIGHEST))
    def hear_how_many_the_server_has(self, known: int) -> None:
        before = self.extra
        self.pool.compare(known)
        assert self.extra in (0, before, before + 1), "an eighth of the capacity, which is one here"

    @rule()
    def end_interval(self) -> None:
        self.pool.end_interval()

    @precondition(lambda self: self.timer.active)
    @rule()
    def look_for_those_that_are_overdue(self) -> None:
        overdue = [each for each in self.at("early") if each.ended < self.now - LAUNCH_WITHIN]
        self.timer.run()
        for stream in overdue:
            self.move(stream, "closed")
        assert self.timer.active == bool(self.at("early"))

    @rule(seconds=st.sampled_from([0.1, YOUNG, LAUNCH_WITHIN]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # What always holds

    @invariant()
    def every_connection_is_in_one_place_or_closed_once(self) -> None:
        for stream in self.streams:
            assert stream.closed == (stream.place == "closed"), stream.place
            assert stream.watched == (stream.place == "idle"), stream.place

    @invariant()
    def what_is_idle_is_what_was_added_and_not_used(self) -> None:
        assert len(self.pool) == len(self.at("idle"))
        assert all(each.id in self.pool for each in self.at("idle"))

    @invariant()
    def the_timer_runs_while_a_launch_may_be_overdue(self) -> None:
        assert self.timer.active or not self.at("early")

    @invariant()
    def what_is_missing_is_what_capacity_and_dials_leave_within_the_limit(self) -> None:
        assert LOWEST <= self.pool.capacity <= HIGHEST
        ready, leaving = len(self.at("idle")) + self.dialling, len(self.at("early", "reserved"))
        assert ready + leaving <= HIGHEST
        wanted = self.pool.capacity + self.extra + len(self.due)
        assert self.pool.missing == min(wanted - ready, HIGHEST - ready - leaving)
        assert self.pool.wanted.is_set() or self.pool.missing <= 0, "the filler sleeps though something is missing"

    @invariant()
    def a_claim_waits_only_while_something_is_dialled(self) -> None:
        assert self.dialling or not self.waiting
        assert not any(each.ready() for each in self.waiting.values())

    def teardown(self) -> None:
        """After the flush only those that were claimed are open, and no claim waits any more."""
        self.pool.close("the test is over")
        self.settle()
        try:
            for stream in self.streams:
                assert stream.closed == (stream.place != "claimed")
                assert not stream.watched
            assert not len(self.pool)
            self.assert_failed(self.start_claim("ffffffff"))
            for claim in self.waiting.values():
                self.assert_failed(claim)
        finally:
            gevent.killall(list(self.waiting.values()))
            for patch in self.patches:
                patch.stop()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
