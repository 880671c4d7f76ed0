"""Task groups, worker pools and idle timers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import gevent
import pytest
from gevent.event import Event

from nodepass import tasks
from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import IdleTimer, TaskGroup, WorkerPool, find_ended
from tests.unit.records import recorded

PERIOD = 0.001  # seconds

Make = Callable[[Log, Stats], TaskGroup | WorkerPool]
MakePool = Callable[[int], WorkerPool]
EACH = pytest.mark.parametrize("make", [TaskGroup, lambda log, stats: WorkerPool(log, stats, 8)], ids=["group", "pool"])


class Bug(Exception):
    """Unexpected."""


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    with gevent.Timeout(10):
        yield


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    """Pools of which nothing is left for the next test."""
    with ExitStack() as stack:

        def make(limit: int) -> WorkerPool:
            pool = WorkerPool(Log("test"), Stats(), limit)
            stack.callback(pool.kill)
            return pool

        yield make


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with recorded() as records:
        yield records


def fail() -> None:
    raise Bug("told to")


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        gevent.sleep(PERIOD)


@EACH
def test_a_crash_is_logged_with_its_traceback_and_counted_and_the_others_go_on(log: list[Any], make: Make) -> None:
    stats, over = Stats(), Event()
    group = make(Log("server:1"), stats)
    group.spawn("wait", over.wait)
    group.spawn("fail", fail)
    wait_for(lambda: log)
    assert len(group) == 1
    over.set()
    assert group.join()
    (record,) = log
    assert (record.event, record.tunnel, record.fields) == ("bug.caught", "server:1", {"where": "fail"})
    assert record.exc_info[0] is Bug
    assert stats.trouble["bugs"] == 1
    group.kill()


@EACH
def test_join_says_whether_all_have_ended_and_kill_how_many_had_not(log: list[Any], make: Make) -> None:
    stats = Stats()
    group = make(Log("test"), stats)
    assert group.join(0)
    for _ in range(3):
        group.spawn("wait", Event().wait)
    assert not group.join(PERIOD)
    assert group.kill() == 3
    assert group.join()
    assert group.kill() == len(group) == 0
    assert not log, "an end that was asked for is no bug"
    assert not stats.trouble["bugs"]


def test_a_crash_of_a_child_reaches_the_owner(log: list[Any]) -> None:
    crashes: list[Exception] = []
    group = TaskGroup(Log("test"), Stats(), on_crash=crashes.append)
    group.spawn("fail", fail)
    group.join()
    assert [type(each) for each in crashes] == [Bug]
    assert len(log) == 1


def test_a_child_has_the_name_that_an_operator_reads() -> None:
    group = TaskGroup(Log("test"), Stats())
    loops = [group.spawn(name, work) for name, work in (("run", Event().wait), ("end", lambda: None))]
    assert find_ended(loops) == ""
    wait_for(lambda: loops[1].dead)
    assert "end" in find_ended(loops)
    assert "run" not in find_ended(loops)
    group.kill()


def test_a_pool_never_runs_more_than_its_limit(make_pool: MakePool) -> None:
    pool, running, most, over = make_pool(3), 0, 0, Event()

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        over.wait()
        running -= 1

    def spawn_all() -> None:
        for _ in range(9):
            pool.spawn("work", work)

    spawning = gevent.spawn(spawn_all)
    wait_for(pool.full)
    assert not spawning.ready(), "the fourth waits for a slot"
    waiting = gevent.spawn(pool.wait_for_slot)
    gevent.sleep(PERIOD)
    assert not waiting.ready()
    over.set()
    spawning.join()
    waiting.join()
    pool.join()
    assert most == 3
    assert not pool.full()


def test_a_crash_frees_the_slot_and_the_worker_is_used_again(log: list[Any], make_pool: MakePool) -> None:
    pool, workers = make_pool(1), list[object]()

    def work() -> None:
        workers.append(gevent.getcurrent())
        fail()

    for name in ("first", "second"):
        pool.spawn(name, work)
        pool.join()
    assert [record.fields["where"] for record in log] == ["first", "second"]
    assert workers[0] is workers[1]


def test_workers_that_nothing_needed_for_a_while_are_released_and_the_others_kept(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, over = make_pool(8), Event()
    monkeypatch.setattr(pool._timer, "period", 60)  # looks only when told to
    for _ in range(4):
        pool.spawn("work", over.wait)
    over.set()
    pool.join()
    pool._release_surplus()  # from now on it counts
    workers = list(pool._idle)
    assert len(workers) == 4
    for _ in range(2):
        pool.spawn("work", lambda: None)
    pool.join()
    assert pool._release_surplus(), "two were needed since the last look"
    gevent.sleep(0)
    assert sum(each.dead for each in workers) == 2
    assert not pool._release_surplus()
    gevent.sleep(0)
    assert all(each.dead for each in workers)


def test_no_more_workers_idle_than_allowed(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "IDLE_AT_MOST", 2)
    pool, over = make_pool(8), Event()
    for _ in range(5):
        pool.spawn("work", over.wait)
    over.set()
    pool.join()
    gevent.sleep(0)
    assert len(pool._idle) == 2


def test_an_idle_worker_keeps_nothing_of_its_last_work_alive(make_pool: MakePool) -> None:
    class Held:
        pass

    pool, held = make_pool(1), Held()
    watched = weakref.ref(held)
    gc.collect()
    gc.disable()
    try:
        pool.spawn("hold", lambda _held: None, held)
        del held
        pool.join()
        assert len(pool._idle) == 1
        assert watched() is None
    finally:
        gc.enable()


def test_an_idle_timer_runs_only_while_there_is_something_to_look_at() -> None:
    looks: list[int] = []

    def look() -> bool:
        looks.append(len(looks))
        return len(looks) < 3

    timer = IdleTimer(PERIOD, look)
    assert not timer.active
    for _ in range(2):
        looks.clear()
        timer.start()
        timer.start()  # it runs already
        assert timer.active
        assert not looks, "the first look is one period away"
        wait_for(lambda: not timer.active)
        assert len(looks) == 3
        gevent.sleep(3 * PERIOD)
        assert len(looks) == 3


def test_an_idle_timer_can_be_stopped_also_by_its_own_look() -> None:
    looks: list[None] = []

    def look() -> bool:
        looks.append(None)
        return True

    def stop() -> bool:
        looks.append(None)
        own.stop()
        return True

    timer, own = IdleTimer(PERIOD, look), IdleTimer(PERIOD, stop)
    timer.stop()  # it never ran
    timer.start()
    wait_for(lambda: looks)
    timer.stop()
    looks.clear()
    gevent.sleep(3 * PERIOD)
    assert not looks
    own.start()
    wait_for(lambda: not own.active)
    gevent.sleep(3 * PERIOD)
    assert len(looks) == 1


def test_a_bug_in_a_look_is_reported_by_the_hub_and_the_next_look_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(gevent.get_hub(), "print_exception", lambda _where, kind, *_: reported.append(kind))
    looks = iter(["bug", "bug", "more", "nothing"])

    def look() -> bool:
        found = next(looks)
        if found == "bug":
            raise Bug
        return found == "more"

    timer = IdleTimer(PERIOD, look)
    timer.start()
    wait_for(lambda: not timer.active)
    assert reported == [Bug, Bug]
    assert next(looks, None) is None
