"""Several targets: which one a session gets, which are up, and what is done where one does not answer."""

from __future__ import annotations

import errno
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from hypothesis import given
from hypothesis import strategies as st

from nodepass.client.health import HealthCheck, HealthChecks
from nodepass.client.target import FALL, RISE, Health
from nodepass.client.targets import Spread, Targets
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, Place, UnixPath
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, Socket
from nodepass.net.unix import dial_unix
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.part import Common
from tests.unit.controls import run, until
from tests.unit.records import recorded
from tests.unit.resolver import Resolver

LOG = Log("test")


@dataclass
class Known:
    """A target as far as the order is concerned."""

    sessions: int = 0
    health: Health = field(default_factory=Health)

    @property
    def rank(self) -> int:
        return 1 if self.health.is_doubtful else 0 if self.health.is_up else 2


@st.composite
def known_targets(draw: st.DrawFn) -> list[Known]:
    targets = []
    for sessions, failures in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=5)):
        targets.append(Known(sessions))
        for _ in range(failures):
            targets[-1].health.note(False)
    return targets


# The choice


@given(known_targets(), st.sampled_from(["least", "round", "first"]), st.booleans())
def test_every_target_is_tried_once_the_good_ones_first_and_those_that_are_down_last_or_never(
    targets: list[Known], kind: str, with_down: bool
) -> None:
    wanted = [each for each in targets if with_down or each.health.is_up]
    streams, flows = Spread(kind, targets), Spread(kind, targets)
    for _ in range(3):
        tried, ranking = list(streams.order(with_down)), flows.ranking(with_down)
        for found in (tried, ranking):
            assert sorted(map(id, found)) == sorted(map(id, wanted))
            assert [each.rank for each in found] == sorted(each.rank for each in wanted)
        assert [id(each) for each in tried[:1]] == [id(each) for each in ranking[:1]]


@given(known_targets(), st.integers(1, 20))
def test_least_gives_each_session_to_a_target_that_has_fewest(targets: list[Known], count: int) -> None:
    spread = Spread("least", targets)
    for _ in range(count):
        chosen = next(spread.order(True))
        best = min(each.rank for each in targets)
        assert chosen.sessions == min(each.sessions for each in targets if each.rank == best)
        chosen.sessions += 1


@given(st.integers(1, 6), st.sampled_from(["round", "least"]))
def test_equal_targets_get_sessions_in_turn(count: int, kind: str) -> None:
    targets = [Known() for _ in range(count)]
    spread = Spread(kind, targets)
    chosen = [next(spread.order(False)) for _ in range(3 * count)]
    assert list(map(id, chosen)) == 3 * list(map(id, targets))


@given(known_targets())
def test_first_is_the_first_in_the_list_of_the_best(targets: list[Known]) -> None:
    spread = Spread("first", targets)
    for _ in range(2):
        assert next(spread.order(True)) is min(targets, key=lambda each: each.rank)  # min: the first of equals


# Up and down


@given(st.lists(st.booleans(), max_size=40))
def test_a_state_changes_after_as_many_contrary_results_in_a_row_as_in_haproxy(results: list[bool]) -> None:
    """Compared with haproxy's one counter: below rise the target is down, and a contrary result sets it to its end."""
    health, counter = Health(RISE, FALL), RISE + FALL - 1
    for ok in results:
        was_up = counter >= RISE
        if ok:
            counter = RISE + FALL - 1 if was_up or counter + 1 == RISE else counter + 1
        else:
            counter = counter - 1 if counter > RISE else 0
        assert health.note(ok) == (was_up != (counter >= RISE))
        assert health.is_up == (counter >= RISE)
        assert health.is_doubtful == (RISE <= counter < RISE + FALL - 1)


def test_a_target_that_has_never_been_checked_is_down_after_the_first_failure() -> None:
    health = Health(RISE, FALL, is_proven=False)
    assert health.note(False)
    assert [health.note(True) for _ in range(RISE)] == [False, True]
    assert not health.note(False), "from now on it takes as many as ever"


# Dials


def listener(stack: ExitStack) -> Any:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


def refusing(stack: ExitStack) -> Any:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    sock.bind(("127.0.0.1", 0))
    return sock


def unix_listener(stack: ExitStack, path: Path, backlog: int = 8) -> UnixPath:
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.bind(str(path))
    sock.listen(backlog)
    return UnixPath(str(path))


class Some:
    """The targets at these sockets or paths, and what checks them."""

    def __init__(self, *places: Any, **settings: Any) -> None:
        self.places: list[Place] = [
            each if isinstance(each, UnixPath) else Address(*each.getsockname()) for each in places
        ]
        self.stats = Stats()
        values = Settings(**{"spread": "first", **settings})
        self.targets = Targets(self.places, values, LOG, self.stats)
        common = Common(values, LOG, self.stats, TaskGroup(LOG, self.stats))
        self.checks = HealthChecks(common, self.targets)

    def dial(self, timeout: float = 10) -> str:
        """The target that the next session gets, and keeps."""
        target, sock = self.targets.dial(timeout)
        sock.close()
        return target.text

    def failures(self, number: int) -> dict[str, int]:
        text = str(self.places[number])
        return {what: self.stats.target_failures[text, what] for what in ("dial", "check")}


def test_a_target_that_refuses_is_followed_by_the_next_and_from_then_on_preceded_by_it(stack: ExitStack) -> None:
    some = Some(refusing(stack), listener(stack))
    with recorded() as records:
        assert some.dial() == str(some.places[1])
        assert some.dial() == str(some.places[1])
    assert some.failures(0) == {"dial": 1, "check": 0}, "the second session goes to the other one at once"
    assert [each.event for each in records] == ["target.passed_over"]
    assert [each.sessions for each in some.targets.all] == [0, 2]
    some.targets.end(some.targets.all[1])
    assert [each.sessions for each in some.targets.states()] == [0, 1]


def test_a_silent_target_gets_its_share_of_the_time_only(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    some = Some(listener(stack), listener(stack))
    given_to: list[float] = []

    def hang(timeout: float) -> Socket:
        given_to.append(timeout)
        raise TimeoutError(errno.ETIMEDOUT, "no answer")

    monkeypatch.setattr(some.targets.all[0], "dial", hang)
    assert some.dial(20.0) == str(some.places[1])
    assert given_to == pytest.approx([10.0], abs=1.0)


def test_where_every_target_refuses_the_error_is_the_last_ones_and_no_session_is_counted(stack: ExitStack) -> None:
    some = Some(refusing(stack), refusing(stack))
    with pytest.raises(ConnectionRefusedError, match=str(some.places[1])):
        some.dial()
    assert [each.sessions for each in some.targets.all] == [0, 0]


def test_without_checks_a_target_is_down_after_a_second_dial_and_up_after_one_and_both_are_reported(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodepass.client.health.RETRY", 0.01)
    sock = refusing(stack)
    some = Some(sock)
    some.checks.start()
    stack.callback(some.checks.close)
    went_down = some.targets.changed
    with recorded() as records:
        with pytest.raises(ConnectionRefusedError):
            some.dial()
        until(lambda: not some.targets.answers)
        assert "Connection refused" in some.targets.describe()
        came_up = some.targets.changed
        sock.listen()
        until(lambda: some.targets.answers)
        until(lambda: some.targets.describe() == "")
    assert [each.event for each in records] == ["target.down", "target.up"]
    assert went_down.is_set()
    assert came_up.is_set()
    assert some.failures(0)["dial"] >= 2


def test_without_checks_a_session_still_tries_targets_that_are_down_and_with_them_it_does_not(stack: ExitStack) -> None:
    for health_check in ("off", "tcp"):
        some = Some(listener(stack), listener(stack), health_check=health_check)
        for target in some.targets.all:
            for _ in range(FALL):
                some.targets.note_failure(target, OSError("broken"), "check")
        if health_check == "off":
            assert some.dial() == str(some.places[0])
            assert len(some.targets.for_datagrams()) == 2
            continue
        with pytest.raises(OSError, match="no target is up"):
            some.dial()
        with pytest.raises(OSError, match="no target for datagrams is up"):
            some.targets.for_datagrams()


def test_dials_count_as_failed_checks_and_only_checks_make_a_target_good_again(stack: ExitStack) -> None:
    sock = refusing(stack)
    some = Some(sock, health_check="tcp")
    target = some.targets.all[0]
    some.targets.note_success(target)
    for _ in range(FALL):
        assert some.targets.answers
        with pytest.raises(ConnectionRefusedError):
            some.dial()
    assert not some.targets.answers
    sock.listen()
    some.targets.note_success(target)
    assert not some.targets.answers
    some.targets.note_success(target)
    assert some.dial() == target.text


# Checks


def answer(stack: ExitStack, sock: Any, text: bytes) -> list[bytes]:
    """Answer each connection to a listener with a text once something has come; what has."""
    asked: list[bytes] = []

    def serve() -> None:
        while True:
            peer, _ = sock.accept()
            with closing(peer):
                asked.append(peer.recv(1000))
                peer.sendall(text)

    run(stack, serve)
    return asked


@pytest.mark.parametrize("status", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 302\r\n"])
def test_a_check_by_http_asks_for_the_path_and_takes_2xx_and_3xx(stack: ExitStack, status: bytes) -> None:
    sock = listener(stack)
    asked = answer(stack, sock, status)
    some = Some(sock, health_check="http:/healthz?deep=1", health_interval=0.01)
    some.checks.start()
    stack.callback(some.checks.close)
    until(lambda: len(asked) > 1)
    assert some.targets.answers
    host = f"127.0.0.1:{sock.getsockname()[1]}".encode()
    assert asked[0].startswith(b"GET /healthz?deep=1 HTTP/1.1\r\nHost: " + host + b"\r\n")
    assert asked[0].endswith(b"\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\n", "HTTP status 503"),
        (b"SSH-2.0-OpenSSH\r\n", "closed without a status of HTTP"),
        (b"x" * 600, "not an answer of HTTP/1.1: 'xxx"),
        (b"", "closed without a status of HTTP"),
    ],
)
def test_a_check_by_http_refuses_everything_else(stack: ExitStack, text: bytes, why: str) -> None:
    sock = listener(stack)
    answer(stack, sock, text)
    some = Some(sock, health_check="http:/", health_interval=0.01)
    some.checks.start()
    stack.callback(some.checks.close)
    until(lambda: not some.targets.answers)
    assert why in some.targets.describe()
    assert some.failures(0)["check"]


def test_a_check_that_is_not_answered_ends_in_time(stack: ExitStack) -> None:
    sock = listener(stack)
    some = Some(sock, health_check="http:/", health_interval=0.05)
    some.checks.start()
    stack.callback(some.checks.close)
    until(lambda: not some.targets.answers)
    assert "no answer to the check in time" in some.targets.describe()


def test_a_check_begins_with_a_proxy_header_without_an_address_where_targets_expect_one(stack: ExitStack) -> None:
    sock = listener(stack)
    settings = Settings(health_check="tcp", proxy_protocol="v1")

    def read() -> bytes:
        with closing(sock.accept()[0]) as peer:
            return bytes(peer.recv(100))

    peer = run(stack, read)
    dialled = Some(sock).targets.all[0].dial(10)
    HealthCheck(settings, "").run(dialled, "localhost", 10)
    assert peer.get() == b"PROXY UNKNOWN\r\n"


# Names


@pytest.fixture
def named(stack: ExitStack, resolver: Resolver) -> Targets:  # noqa: ARG001  # names are looked up there
    """Two targets whose names are looked up, the first one first."""
    places = [Address("first.example", 9), Address("second.example", 9)]
    targets = Targets(places, Settings(spread="first"), LOG, Stats())
    for each in targets.names:
        run(stack, each.name.follow)
    gevent.sleep(0)
    return targets


def endpoint(number: int) -> Endpoint:
    return Endpoint(socket.AF_INET, (f"192.0.2.{number}", 9))


def test_a_flow_begins_at_a_target_whose_address_is_known_and_waits_where_none_is(
    stack: ExitStack, named: Targets, resolver: Resolver
) -> None:
    first, second = named.names
    waiting = run(stack, named.for_datagrams)
    gevent.sleep(0)
    assert not waiting.dead
    resolver.lookups[0].set_exception(OSError(-2, "no such name"))
    resolver.lookups[1].set([endpoint(2)])
    assert waiting.get() == [second]
    assert named.others_for_datagrams(second) == []
    first.name.refresh()
    resolver.answer(endpoint(1))
    assert named.for_datagrams() == [first, second]
    assert named.others_for_datagrams(second) == [first]


def test_a_flow_without_any_address_fails_as_the_first_lookup_does(
    stack: ExitStack, named: Targets, resolver: Resolver
) -> None:
    waiting = run(stack, named.for_datagrams)
    for lookup in resolver.lookups:
        lookup.set_exception(OSError(-2, "no such name"))
    with pytest.raises(OSError, match="no such name"):
        waiting.get()


# Unix sockets


def test_a_target_can_be_a_unix_socket_which_has_no_datagrams(stack: ExitStack, tmp_path: Path) -> None:
    path = unix_listener(stack, tmp_path / "a,b c.sock")
    some = Some(path, listener(stack))
    assert some.dial() == str(path) == f"unix:{tmp_path}/a%2Cb%20c.sock"
    assert [each.text for each in some.targets.for_datagrams()] == [str(some.places[1])]


@pytest.mark.parametrize("exists", [True, False])
def test_a_unix_socket_without_a_listener_is_an_error_that_names_it(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "app.sock"
    if exists:
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(str(path))
    with pytest.raises(ConnectionRefusedError if exists else FileNotFoundError, match=str(path)):
        dial_unix(str(path), 10)


def test_a_unix_socket_whose_queue_is_full_is_waited_for(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    sock = stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.bind(str(path))
    sock.listen(0)
    stack.enter_context(closing(dial_unix(str(path), 1)))
    with pytest.raises(TimeoutError, match=r"no answer within 0\.02s"):
        dial_unix(str(path), 0.02)
    waiting = run(stack, dial_unix, str(path), 10.0)
    gevent.sleep(0)
    sock.accept()[0].close()
    waiting.get().close()  # type: ignore[attr-defined]
