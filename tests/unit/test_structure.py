"""What makes the program fast is its structure: counted here, never timed."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import gevent
import pytest
from gevent import Greenlet, socket
from greenlet import greenlet

from nodepass.config.kinds import parse_rate
from nodepass.config.settings import Settings
from nodepass.log import Log
from nodepass.net import pipes
from nodepass.net import pump as pumping
from nodepass.net import stream as streams
from nodepass.net.pump import Pump, _shared
from nodepass.net.relay import relay
from nodepass.net.sockets import Socket, reset_on_close
from nodepass.net.stream import Data, TCPStream
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.rates import Rates
from tests.support.command import call
from tests.unit.streams import receive_all, tcp_pair

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"OpenSSL", "cryptography", "cffi", "service_identity", "ssl", "asyncio", "subprocess", "email"}
HEAVY |= {"prometheus_client", "rich"}  # of the extras
HEAVY |= {"hashlib", "hmac"}  # of OpenSSL
if sys.version_info < (3, 11):
    HEAVY -= {"subprocess"}  # of `platform`, which gevent needs
HELD = 20  # connections
MODULES_AT_START = """\
import contextlib, importlib, runpy, sys
module, sys.argv = sys.argv[1], ["nodepass", "--version"]
with contextlib.suppress(SystemExit):
    runpy.run_module("nodepass", run_name="__main__")
importlib.import_module(module)  # as `daemon` does for a URL of this role
print(*sys.modules, sep="\\n")
"""


class Held:
    """Sessions that have moved a byte each way and are quiet now."""

    def __init__(self, stack: ExitStack, count: int, rate: str = "0") -> None:
        self.ends = []
        stats = Stats()
        rates = Rates.of(Settings(rate_up=parse_rate(rate)), stats)
        for _ in range(count):
            near, visitor = stack.enter_context(tcp_pair())
            far, target = stack.enter_context(tcp_pair())
            running: Greenlet[..., object] = Greenlet.spawn(relay, near, far, stats, throttles=rates)
            stack.callback(running.kill)
            visitor.sendall(b"?")
            assert target.recv(1) == b"?"
            target.sendall(b"!")
            assert visitor.recv(1) == b"!"
            self.ends.append((visitor, target))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def greenlets() -> list[Greenlet[..., object]]:
    """Those that live."""
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, Greenlet) and not each.dead]


def test_garbage_is_collected_when_all_is_imported() -> None:
    gc.disable()  # as the entry point does
    try:
        assert call("--version").code == 0
        assert gc.isenabled()
    finally:
        gc.enable()


def test_a_quiet_session_costs_one_greenlet_and_no_buffer(stack: ExitStack) -> None:
    before = set(greenlets())  # those of earlier tests may end meanwhile
    held = Held(stack, HELD)
    assert len([each for each in greenlets() if each not in before]) == HELD
    assert_no_buffer(HELD)
    assert held.ends


def assert_no_buffer(sessions: int) -> None:
    """Assert that every pump waits for its source, with no pipe, nothing left to send, and no memory but the shared."""
    pumps = [each for each in gc.get_objects() if inspect.isgenerator(each) and each.gi_code is Pump.run.__code__]
    assert len(pumps) == 2 * sessions
    for pump in pumps:
        assert pump.gi_yieldfrom is None
        assert pump.gi_frame
        kept = [each for each in pump.gi_frame.f_locals.values() if isinstance(each, bytes | bytearray | memoryview)]
        assert all(not each or getattr(each, "obj", None) is _shared.obj for each in kept)


class Full(TCPStream):
    """A stream that never takes anything at once."""

    def send(self, data: Data) -> Data:
        return bytes(data)


def test_a_session_whose_sink_was_full_keeps_no_copy_once_it_is_quiet(stack: ExitStack) -> None:
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    running: Greenlet[..., object] = Greenlet.spawn(relay, Full(near.sock), Full(far.sock), Stats())
    stack.callback(running.kill)
    visitor.sendall(b"question")
    assert target.recv(100) == b"question"
    target.sendall(b"answer")
    assert visitor.recv(100) == b"answer"
    assert_no_buffer(1)


class Counted(TCPStream):
    """Writes down what the relay calls."""

    def __init__(self, plain: TCPStream, calls: list[str]) -> None:
        super().__init__(plain.sock)
        self._calls = calls

    def read(self, buffer: memoryview) -> int:
        self._calls.append("read")
        return int(self._raw.recv_into(buffer))

    def send(self, data: Data) -> Data:
        self._calls.append("send")
        return super().send(data)


def test_a_message_costs_one_read_and_one_write(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pumping, "room_to_send", lambda _sock: calls.append("room"))
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    running: Greenlet[..., object] = Greenlet.spawn(relay, Counted(near, calls), Counted(far, calls), Stats())
    stack.callback(running.kill)
    gevent.idle()
    calls.clear()
    for _ in range(10):
        visitor.sendall(b"question")
        assert target.recv(100) == b"question"
        target.sendall(b"answer")
        assert visitor.recv(100) == b"answer"
    assert calls == ["read", "send"] * 20


def test_a_session_sets_an_option_only_where_it_changes(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a system call, and short sessions have few others."""
    calls: list[bool] = []

    def count(sock: Socket, on: bool) -> None:
        calls.append(on)
        reset_on_close(sock, on)

    monkeypatch.setattr(streams, "reset_on_close", count)
    near, visitor = stack.enter_context(tcp_pair())
    far, target = stack.enter_context(tcp_pair())
    near.reset_on_close(True)  # as a pooled connection, or a visitor's, is
    calls.clear()
    visitor.close()
    target.close()
    relay(near, far, Stats())
    assert calls == [True, False, False]


@pytest.mark.parametrize("rate", ["0", "4G"])
def test_a_busy_stream_is_spliced_and_gives_its_pipes_back(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, rate: str
) -> None:
    monkeypatch.setattr(pipes.pipes._timer, "period", 0.01)
    spliced = 0
    splice = os.splice

    def count_splice(*args: int, **kwargs: int) -> int:
        nonlocal spliced
        moved = splice(*args, **kwargs)
        spliced += moved
        return moved

    monkeypatch.setattr(os, "splice", count_splice)
    visitor, target = Held(stack, 1, rate).ends[0]
    total = 24 << 20
    sender = gevent.spawn(visitor.sendall, bytes(total))
    received = 0
    while received < total:
        received += len(target.recv(1 << 20))
    sender.get()
    assert spliced > total  # each byte goes in and comes out
    assert pipes.pipes.open <= 1
    with gevent.Timeout(10):
        while pipes.pipes.open:
            gevent.sleep(0.01)
    visitor.sendall(b"the end")
    visitor.shutdown(socket.SHUT_WR)
    assert receive_all(target) == b"the end"


def test_short_work_runs_in_greenlets_that_are_used_again() -> None:
    workers = WorkerPool(Log("test"), Stats(), 8)
    seen: set[greenlet] = set()
    for _ in range(50):
        workers.spawn("work", lambda: seen.add(gevent.getcurrent()))
        gevent.sleep(0)
    assert workers.join(5)
    assert len(seen) <= 2
    with gevent.Timeout(10):
        while not all(each.dead for each in seen):  # nobody rests for ever
            gevent.sleep(0.01)


def test_a_worker_that_is_killed_before_it_began_gives_its_place_back() -> None:
    workers = WorkerPool(Log("test"), Stats(), 1)
    workers.spawn("work", gevent.sleep, 10)
    assert workers.full()
    assert workers.kill() == 1
    gevent.sleep(0)
    assert not workers.full()
    assert workers.join(5)


@pytest.mark.parametrize(
    ("role", "other"),
    [("nodepass.server.server", "nodepass.client.client"), ("nodepass.client.client", "nodepass.server.server")],
)
def test_without_tls_and_keys_nothing_heavy_is_imported_and_one_role(role: str, other: str) -> None:
    command = [sys.executable, "-c", MODULES_AT_START, role]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    shown = done.stdout.split()
    assert {"nodepass.net.relay", role} <= set(shown)
    assert not {each.partition(".")[0] for each in shown} & HEAVY
    assert other not in shown


def test_what_has_been_sent_is_not_kept(stack: ExitStack) -> None:
    near, far = stack.enter_context(tcp_pair())
    rest = near.try_rest(b"all of it")
    assert isinstance(rest, bytes)  # an empty view would keep a batch alive for as long as the session
    assert far.recv(100) == b"all of it"


@pytest.mark.parametrize("make", [TaskGroup, lambda log, stats: WorkerPool(log, stats, 8)], ids=["crew", "workers"])
def test_what_a_killed_greenlet_held_is_free_at_once(make: Callable[[Log, Stats], TaskGroup | WorkerPool]) -> None:
    """Else many reconnects in a row would pile up memory until the next collection."""

    class Held:
        pass

    def hold(held: Held) -> None:
        gevent.sleep(60)
        del held

    crew, held = make(Log("test"), Stats()), Held()
    watched = weakref.ref(held)
    gc.collect()
    gc.disable()
    try:
        crew.spawn("hold", hold, held)
        del held
        gevent.sleep(0)
        assert watched() is not None
        crew.kill()
        gevent.sleep(0)
        assert watched() is None
    finally:
        gc.enable()
