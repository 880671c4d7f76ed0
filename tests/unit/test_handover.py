"""Handovers, as far as they need no process: messages and descriptors, the new environment, the count of traffic."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import gevent
import gevent.socket
import pytest

from nodepass.config.kinds import TrafficLimit
from nodepass.errors import ClosedError, ConfigError, ProtocolError, StartError
from nodepass.handover import program
from nodepass.handover.accession import Accession
from nodepass.handover.channel import MOST_DESCRIPTORS, Channel, make_pair
from nodepass.handover.receiver import Legacy, Takeover
from nodepass.handover.sender import Handover
from nodepass.handover.succession import Succession
from nodepass.log import Log
from nodepass.net.activation import Inherited, PassedSocket
from nodepass.net.unix import UnixListener
from nodepass.server.server import Server
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.traffic import Meter
from nodepass.tunnel.traffic_file import TrafficFile
from tests.unit.controls import until


def test_a_message_arrives_with_its_descriptors() -> None:
    mine, its = make_pair()
    reading, writing = os.pipe()
    mine.send({"items": [1, "two"]}, [reading] * MOST_DESCRIPTORS)
    with contextlib.closing(Channel(its)) as other:
        message, descriptors = other.receive()
    mine.close()
    assert message == {"items": [1, "two"]}
    assert len(descriptors) == MOST_DESCRIPTORS
    assert not any(os.get_inheritable(each) for each in descriptors)
    os.write(writing, b"x")
    assert os.read(descriptors[-1], 1) == b"x"
    for each in (reading, writing, *descriptors):
        os.close(each)


def test_the_end_of_the_other_process_and_what_is_no_message_are_errors() -> None:
    mine, its = make_pair()
    for sent in (b"{", b"[]", b'"text"', b"\xff"):
        its.send(sent)
        with pytest.raises(ProtocolError):
            mine.receive()
    its.close()
    with pytest.raises(ClosedError):
        mine.receive()
    mine.close()


def test_a_new_process_gets_the_environment_of_the_start_without_what_is_for_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = tmp_path / "environ"
    given.write_bytes(b"TUNNEL_KEY=a=b\0LISTEN_FDS=1\0LISTEN_PID=7\0WATCHDOG_PID=7\0NOTIFY_SOCKET=/s\0EMPTY=\0odd\0")
    started: list[dict[str, str]] = []
    monkeypatch.setattr(program, "Path", lambda _: given)
    monkeypatch.setattr(os, "posix_spawn", lambda _path, _command, environment, **_: started.append(environment))
    program.start_again(9)
    assert started == [{"TUNNEL_KEY": "a=b", "NOTIFY_SOCKET": "/s", "EMPTY": "", "NODEPASS_HANDOVER": "3"}]


@pytest.mark.parametrize(("text", "found"), [("3", 3), ("", None), ("x", None), ("-1", None), ("9" * 9, None)])
def test_the_descriptor_of_the_channel_is_taken_out_of_the_environment(text: str, found: int | None) -> None:
    environ = {"NODEPASS_HANDOVER": text}
    assert program.take_descriptor(environ) == found
    assert not environ


def test_descriptors_that_do_not_fit_are_an_error() -> None:
    mine, its = make_pair()
    mine.send({"items": []}, [0] * 50)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(Channel(its)) as other, contextlib.closing(mine):
        resource.setrlimit(resource.RLIMIT_NOFILE, (its.fileno() + 20, allowed[1]))
        try:
            with pytest.raises(ProtocolError, match="too few free descriptors"):
                other.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_a_process_that_is_stopped_while_it_hands_over_stops_in_good_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log, announced = Log("nodepass"), list[int]()
    handover = MagicMock(spec=Handover, process=7)
    handover.begin.side_effect = StartError("the channel is closed")
    monkeypatch.setattr("nodepass.handover.succession.Handover", lambda: handover)
    tunnel = MagicMock(spec=Server, client_id="", meter=None, listeners=[])
    holder = SimpleNamespace(tunnel=tunnel)
    succession = Succession([holder], None, log, TaskGroup(log, Stats()), announced.append)
    tunnel.end_accepting.side_effect = succession.cancel
    assert not succession.run()
    handover.abandon.assert_called_once()
    assert not announced


def test_where_the_new_process_fails_the_old_one_keeps_its_places_and_may_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handover = MagicMock(spec=Handover, process=7)
    handover.connect.side_effect = StartError("no handshake")
    monkeypatch.setattr("nodepass.handover.succession.Handover", lambda: handover)
    tunnel = MagicMock(spec=Server, client_id="", meter=None, listeners=[])
    log = Log("nodepass")
    succession = Succession([SimpleNamespace(tunnel=tunnel)], None, log, TaskGroup(log, Stats()), int)
    for attempt in (1, 2):
        assert not succession.run()
        assert (handover.abandon.call_count, tunnel.keep_places.call_count) == (attempt, attempt)
    tunnel.end_accepting.assert_not_called()


def test_more_descriptors_than_a_message_takes_arrive_with_their_names() -> None:
    handover, number = Handover(), MOST_DESCRIPTORS + 50
    with open(os.devnull) as null, contextlib.closing(Channel(handover._its)) as other:
        handover._pass_on([], {f"/{each}": null.fileno() for each in range(number)})
        handover._channel.send({"legacy": {"process": 7, "clients": [""]}})
        legacy = Takeover(other).legacy
    handover.abandon()
    for descriptor in legacy.locks.values():
        os.close(descriptor)
    assert list(legacy.locks) == [f"/{each}" for each in range(number)]
    assert (legacy.process, legacy.clients) == (7, [""])


def test_a_new_process_waits_until_each_client_has_as_many_servers_as_the_one_before() -> None:
    looks = []

    def view() -> SimpleNamespace:
        looks.append(0)
        return SimpleNamespace(peers=range(min(len(looks), 3)))

    def accession(*wanted: int, timeout: float) -> None:
        takeover = MagicMock(spec=Takeover, legacy=Legacy(clients=["id"] * len(wanted)))
        takeover.wait_to_connect.return_value, takeover.wait_for_turn.return_value = wanted, {}
        log, holders = Log("nodepass"), [joining, lost][: len(wanted)]
        Accession(takeover, holders, log, TaskGroup(log, Stats())).run(timeout)

    joining = MagicMock(**{"tunnel.view": view, "tunnel.meter": None})
    lost = MagicMock(**{"tunnel.view.return_value.peers": [], "tunnel.meter": None})
    accession(3, timeout=10)
    joining.begin.assert_called_once()
    assert len(looks) >= 3
    accession(4, timeout=0)  # it has some
    with pytest.raises(StartError, match="no handshake"):
        accession(3, 1, timeout=0)


def test_a_process_that_does_not_get_as_far_as_to_detach_itself_is_ended_and_reaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    monkeypatch.setattr("nodepass.handover.sender.start_again", lambda _: started)
    handover = Handover()
    with pytest.raises(StartError, match=r"not ready within 0\.01s"):
        handover.start([], {}, [], 0.01)
    handover.abandon()
    with pytest.raises(ChildProcessError):
        os.waitpid(started, os.WNOHANG)


def test_without_a_descriptor_for_the_channel_the_process_goes_on_and_may_be_told_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("nodepass.handover.sender.make_pair", fail)
    tunnel = MagicMock(spec=Server, client_id="", meter=None, listeners=[])
    log = Log("nodepass")
    succession = Succession([SimpleNamespace(tunnel=tunnel)], None, log, TaskGroup(log, Stats()), int)
    for _ in range(2):
        assert not succession.run()
    assert tunnel.keep_places.call_count == 2
    tunnel.end_accepting.assert_not_called()


def test_a_new_process_that_stands_still_does_not_keep_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.handover.sender.ADD_WITHIN", 0.01)
    monkeypatch.setattr("nodepass.handover.sender.BEGIN_WITHIN", 0.01)
    mine, its = gevent.socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    monkeypatch.setattr("nodepass.handover.sender.make_pair", lambda: (Channel(mine), its))
    handover = Handover()
    with gevent.Timeout(10):
        for _ in range(20):  # more than wait in the kernel
            handover.add({"file": 1})
        with pytest.raises(StartError, match=r"not ready within 0\.01s"):
            handover.begin({"file": {}})
    handover.abandon()
    its.close()


def test_process_1_of_a_container_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log("nodepass")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    succession = Succession([], None, log, TaskGroup(log, Stats()), int)
    assert not succession.run()
    assert not succession.is_over


def test_a_passed_unix_listener_keeps_its_file(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    old = UnixListener(path, "target address")
    original = old.sock.dup()
    share = Inherited(unix={path: original}).share()
    passed = share.take_unix(path)
    new = UnixListener(path, "target address", passed=passed)
    old.hand_over()
    old.close()
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(path)
    new.close()
    assert not Path(path).exists()
    assert share.take_unix("elsewhere") is None
    restarted = UnixListener(path, "target address", passed=share.take_unix(path))
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(path)  # after a crash, which removes the file
    restarted.close()
    original.close()


def test_what_the_process_before_passes_and_no_url_uses_is_named_as_its() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        inherited = Inherited([PassedSocket("target", listener)], source="the process before")
        assert "the process before passed" in inherited.share().hint()
    with socket.socket() as sock, pytest.raises(ConfigError, match="the process before passed"):
        Inherited([PassedSocket("target", sock)], source="the process before")


def test_the_count_of_traffic_passes_to_the_new_process_and_then_only_what_is_added(tmp_path: Path) -> None:
    limit, log, moved = TrafficLimit(1000, "month"), Log("server"), Stats()
    file = TrafficFile(str(tmp_path), "server-web", log)
    old = Meter(limit, file, log, moved)
    assert old.lock is not None
    new = Meter(limit, TrafficFile(str(tmp_path), "server-web", log, {file.path: old.lock}), log, Stats())
    moved.tcp.up.bytes += 100
    new.take_over(old.hand_over())
    assert new.used == 100
    moved.tcp.up.bytes += 20
    new.add(old.take_moved())
    assert new.used == 120
    assert old.take_moved() == 0


def test_a_count_that_is_being_written_while_traffic_passes_reaches_the_new_process_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old process writes no more afterwards, and until then, no two of its threads at once."""
    log, moved, writing, may_end = Log("server"), Stats(), threading.Event(), threading.Event()
    file = TrafficFile(str(tmp_path), "server-web", log)
    old, saved = Meter(TrafficLimit(1000, "month"), file, log, moved), list[int]()

    def save(counts: Mapping[str, int]) -> None:
        saved.append(sum(counts.values()))
        writing.set()
        may_end.wait(10)

    monkeypatch.setattr(file, "save", save)
    moved.tcp.up.bytes += 100
    run = gevent.spawn(old._save)
    until(writing.is_set)
    handing = gevent.spawn(old.hand_over)
    gevent.sleep(0)
    moved.tcp.up.bytes += 20
    may_end.set()
    assert sum(handing.get().values()) + old.take_moved() == 120
    run.join()
    moved.tcp.up.bytes += 3
    old._save()
    assert saved == [100]
    old.keep()
    old._save()
    assert saved == [100, 123]
    file.close()


def test_messages_of_another_version_are_a_reason_not_to_take_over() -> None:
    mine, its = make_pair()
    mine.send({"legacy": 1})
    with pytest.raises(StartError, match="other messages"):
        Takeover(Channel(its))
    its.close()
    mine.close()
