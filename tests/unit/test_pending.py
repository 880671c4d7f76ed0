"""Pending connections: when their work begins, what they cost before, and which of too many is dropped."""

from __future__ import annotations

import contextlib
import gc
import weakref
from contextlib import ExitStack

import gevent
import pytest
from gevent import get_hub, socket
from gevent.event import Event

from nodepass.log import Log
from nodepass.net.sockets import Endpoint, Socket, as_plain, count_waiting, since_last_bytes
from nodepass.server import pending as module
from nodepass.server.pending import PendingConnections
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from tests.unit.controls import until
from tests.unit.streams import reset, tcp_pair

HERE = Endpoint(socket.AF_INET, ("127.0.0.1", 50000))
FOREVER = 60  # seconds
QUIET = 0.1  # seconds


class Peer:
    """A peer of a pending connection; `begun` and `ended` say what has become of its work."""

    def __init__(self, stack: ExitStack) -> None:
        stream, self.sock = stack.enter_context(tcp_pair())
        assert isinstance(stream.sock, socket.socket)
        self.accepted = as_plain(stream.sock)
        self.begun, self.ended = Event(), Event()

    def come_to(self, pending: PendingConnections, silence: float = FOREVER) -> Peer:
        """Be accepted, which takes no turn of the event loop."""
        pending.accept(self.accepted, HERE, self.work, silence=silence)
        return self

    def work(self, sock: Socket, _peer: Endpoint) -> None:
        assert sock is self.accepted
        self.begun.set()
        try:
            gevent.sleep(FOREVER)
        finally:
            sock.close()
            self.ended.set()

    def is_dropped(self) -> bool:
        """Whether the program has closed it."""
        return self.accepted.fileno() < 0


def make_pending(stack: ExitStack, stats: Stats | None = None) -> PendingConnections:
    pending = PendingConnections("a port", Log("test"), stats or Stats())
    stack.callback(pending.close)
    return pending


@pytest.fixture
def pending(stack: ExitStack) -> PendingConnections:
    return make_pending(stack)


# When the work begins


def test_a_peer_that_may_be_silent_costs_no_greenlet_while_it_is(stack: ExitStack, pending: PendingConnections) -> None:
    peers = [Peer(stack).come_to(pending) for _ in range(10)]
    gevent.sleep(0)
    assert len(pending) == 10
    assert len(pending._tasks) == 0
    peers[3].sock.sendall(b"x")
    assert peers[3].begun.wait(10)
    assert len(pending._tasks) == 1
    assert [peer.begun.is_set() for peer in peers].count(True) == 1


def test_the_work_begins_when_a_peer_has_been_silent_for_long_enough(
    stack: ExitStack, pending: PendingConnections
) -> None:
    """Each has a time of its own, and its timeout runs since it was accepted."""
    patient, peer = Peer(stack).come_to(pending), Peer(stack).come_to(pending, silence=QUIET)
    assert peer.begun.wait(10)
    assert pending.time_left(peer.accepted, 60) <= 60 - QUIET
    assert pending.time_left(peer.accepted, QUIET / 2) == pytest.approx(0, abs=0.01)
    assert not patient.begun.is_set()


def test_the_timer_runs_only_while_a_peer_is_silent(stack: ExitStack, pending: PendingConnections) -> None:
    assert not pending._timer.active
    Peer(stack).come_to(pending, silence=0)
    assert not pending._timer.active
    peer = Peer(stack).come_to(pending)
    assert pending._timer.active
    peer.sock.sendall(b"x")
    until(lambda: not pending._timer.active)


def test_a_peer_that_may_not_be_silent_is_served_at_once(stack: ExitStack, pending: PendingConnections) -> None:
    peer = Peer(stack).come_to(pending, silence=0)
    gevent.sleep(0)
    assert peer.begun.is_set()


def test_the_end_of_a_silent_peers_stream_begins_the_work(stack: ExitStack, pending: PendingConnections) -> None:
    peer = Peer(stack).come_to(pending)
    peer.sock.close()
    assert peer.begun.wait(10)


def test_a_peer_that_has_left_already_is_closed(stack: ExitStack, pending: PendingConnections) -> None:
    stream, peer = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    sock = as_plain(stream.sock)
    reset(peer)
    until(lambda: is_disconnected(sock))
    pending.accept(sock, HERE, lambda *_: pytest.fail("there is nothing to serve"))
    assert sock.fileno() < 0
    assert len(pending) == 0


def is_disconnected(sock: Socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


# Its end


def test_the_silent_are_closed_when_all_end(stack: ExitStack, pending: PendingConnections) -> None:
    peer = Peer(stack).come_to(pending)
    pending.close()
    assert len(pending) == 0
    assert peer.is_dropped()
    assert peer.sock.recv(1) == b""
    assert not pending._timer.active


def test_the_work_is_killed_when_all_end_also_after_it_was_released(
    stack: ExitStack, pending: PendingConnections
) -> None:
    peers = [Peer(stack).come_to(pending, silence=0) for _ in range(2)]
    gevent.sleep(0)
    pending.release(peers[0].accepted)
    assert len(pending) == 1
    assert not peers[0].ended.is_set()
    pending.close()
    assert all(peer.ended.is_set() for peer in peers)


def test_what_was_released_has_all_of_its_timeout(stack: ExitStack, pending: PendingConnections) -> None:
    """What goes on after it has authenticated is not limited by when it was accepted."""
    peer = Peer(stack).come_to(pending, silence=0)
    assert peer.begun.wait(10)
    pending.release(peer.accepted)
    assert pending.time_left(peer.accepted, 60) == 60


def test_work_that_returns_is_not_pending_any_more(stack: ExitStack, pending: PendingConnections) -> None:
    stream, _ = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    pending.accept(as_plain(stream.sock), HERE, lambda sock, _: sock.close())
    assert len(pending) == 1
    until(lambda: not pending._tasks)
    assert (len(pending), len(pending._ports)) == (0, 0)


# Limits


def assert_one_was_dropped(peers: list[Peer], last: Peer, stats: Stats) -> None:
    """One of `peers`, for the last one."""
    assert [peer.is_dropped() for peer in peers].count(True) == stats.trouble["pending_dropped"] == 1
    assert not last.is_dropped()
    dropped = next(peer for peer in peers if peer.is_dropped())
    assert dropped.sock.recv(1) == b""


@pytest.mark.parametrize("limit", ["PER_NETWORK", "PER_PORT"])
def test_of_too_many_one_is_dropped(stack: ExitStack, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(module, limit, 3)
    stats = Stats()
    pending = make_pending(stack, stats)
    *peers, last = [Peer(stack).come_to(pending) for _ in range(4)]
    assert_one_was_dropped(peers, last, stats)
    assert len(pending) == 3


def test_of_too_many_in_the_process_one_is_dropped_on_the_port_of_the_largest_network(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pending_limit", lambda: 3)
    stats = Stats()
    first, second = make_pending(stack, stats), make_pending(stack)
    other = Peer(stack).come_to(second)
    *peers, last = [Peer(stack).come_to(port) for port in (first, first, second)]
    assert_one_was_dropped(peers, last, stats)
    assert not other.is_dropped()
    assert (len(first), len(second)) == (1, 2)


def test_one_that_has_spoken_is_not_dropped_while_another_has_not(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where its work began with its first bytes, nor where it began before them."""
    monkeypatch.setattr(module, "PER_PORT", 3)
    pending = make_pending(stack)
    spoken = [Peer(stack).come_to(pending), Peer(stack).come_to(pending, silence=0)]
    for peer in spoken:
        peer.sock.sendall(b"x")
    until(lambda: pending._here.silent == 0)
    silent = [Peer(stack).come_to(pending) for _ in range(5)]
    assert [peer.is_dropped() for peer in silent] == [True] * 4 + [False]
    silent[-1].sock.sendall(b"x")
    until(lambda: pending._here.silent == 0)
    last = Peer(stack).come_to(pending)
    until(lambda: [peer.is_dropped() for peer in (*spoken, silent[-1])].count(True) == 1)
    assert not last.is_dropped()


def test_a_peer_that_has_authenticated_is_not_dropped(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PER_NETWORK", 1)
    pending = make_pending(stack)
    client = Peer(stack).come_to(pending, silence=0)
    assert client.begun.wait(10)
    pending.release(client.accepted)
    others = [Peer(stack).come_to(pending) for _ in range(2)]
    assert [peer.is_dropped() for peer in (client, *others)] == [False, True, False]


def test_a_peer_that_has_authenticated_is_not_watched(stack: ExitStack, pending: PendingConnections) -> None:
    """Its socket can be closed and its number used again."""
    client = Peer(stack).come_to(pending, silence=0)
    assert client.begun.wait(10)
    loop = get_hub().loop
    active = loop.activecnt
    pending.release(client.accepted)
    assert loop.activecnt == active - 1


@pytest.mark.parametrize("state", ["silent", "scheduled", "working"])
def test_a_dropped_connection_releases_everything_at_once(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Whether it waits for bytes, for its greenlet to be scheduled, or works."""
    monkeypatch.setattr(module, "PER_PORT", 1)
    pending = make_pending(stack)
    dropped, another = Peer(stack), Peer(stack)
    dropped.come_to(pending, silence=FOREVER if state == "silent" else 0)
    if state == "working":
        assert dropped.begun.wait(10)
    another.come_to(pending)
    until(lambda: dropped.is_dropped() and not pending._tasks)
    assert dropped.begun.is_set() == dropped.ended.is_set() == (state == "working")
    assert (len(pending), len(pending._waiting[FOREVER])) == (1, 1)


# Bugs


def test_a_bug_before_the_work_begins_closes_that_connection_only(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop calls what could raise."""
    stats = Stats()
    pending = make_pending(stack, stats)
    broken, other = Peer(stack).come_to(pending), Peer(stack).come_to(pending)
    with monkeypatch.context() as patched:
        patched.setattr(TaskGroup, "spawn", lambda *_: 1 / 0)
        broken.sock.sendall(b"x")
        until(broken.is_dropped)
    assert stats.trouble["bugs"] == 1
    assert len(pending) == 1
    other.sock.sendall(b"x")
    assert other.begun.wait(10)


def test_what_a_pending_connection_held_is_free_as_soon_as_its_work_ends(stack: ExitStack) -> None:
    """Else a flood would fill memory, with OpenSSL's above all, until the next collection."""

    class Held:
        pass

    def work(sock: Socket, _peer: Endpoint, _held: Held) -> None:
        sock.close()

    pending, held, peer = make_pending(stack), Held(), Peer(stack)
    watched = weakref.ref(held)
    gc.collect()
    gc.disable()
    stack.callback(gc.enable)
    pending.accept(peer.accepted, HERE, work, held)
    del held
    assert watched() is not None
    until(lambda: not len(pending))
    until(lambda: watched() is None)


# More than can be served in time


@pytest.mark.parametrize(
    ("waited", "queued", "is_turned_away"),
    [(3.0, module.LONG_QUEUE, True), (2.0, module.LONG_QUEUE, False), (3.0, module.LONG_QUEUE - 1, False)],
)
def test_what_has_waited_too_long_in_a_long_queue_is_turned_away(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack, waited: float, queued: int, is_turned_away: bool
) -> None:
    monkeypatch.setattr(module, "since_last_bytes", lambda _: waited)
    monkeypatch.setattr(module, "count_waiting", lambda _: queued)
    pending, peer = make_pending(stack, stats := Stats()), Peer(stack)
    assert pending.turn_away(peer.accepted, [object()], timeout=5.0) == is_turned_away
    assert peer.is_dropped() == is_turned_away
    assert stats.trouble["pending_late"] == is_turned_away
    peer.accepted.close()


def test_the_kernel_tells_how_long_a_connection_has_waited_and_how_many_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        for waiting in range(3):
            assert count_waiting(listener) == waiting
            stack.enter_context(socket.create_connection(listener.getsockname()))
            until(lambda waiting=waiting: count_waiting(listener) == waiting + 1)  # type: ignore[misc]
        accepted = as_plain(listener.accept()[0])
        with contextlib.closing(accepted):
            until(lambda: since_last_bytes(accepted) > 0.02)
            assert since_last_bytes(accepted) < FOREVER
