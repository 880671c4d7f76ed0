"""Handovers, as far as they need no process: messages and descriptors, the new environment, the count of traffic."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path

import gevent
import pytest

from nodepass.config.kinds import TrafficLimit
from nodepass.errors import ClosedError, ConfigError, ProtocolError
from nodepass.handover import program
from nodepass.handover.channel import MOST_DESCRIPTORS, Channel, make_pair
from nodepass.handover.succession import Succession
from nodepass.log import Log
from nodepass.net.activation import Inherited, PassedSocket
from nodepass.net.unix import UnixListener
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.traffic import Meter
from nodepass.tunnel.traffic_file import TrafficFile


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
    original.close()
    assert not Path(path).exists()
    assert share.take_unix("elsewhere") is None


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
    until_set(writing)
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


def until_set(event: threading.Event) -> None:
    while not event.is_set():
        gevent.sleep(0.001)
