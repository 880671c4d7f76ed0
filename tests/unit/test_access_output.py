"""Where access logs go: real files and sockets, which never make a writer wait, and of which every loss is said."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from nodepass.config.kinds import AccessPlace
from nodepass.daemon import access_output, log_output
from nodepass.daemon.access_output import AccessOutputs
from nodepass.errors import ConfigError
from nodepass.stats import Stats
from tests.unit.records import recorded

Write = Any  # a callable; None only for `off`


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is logged; what waits is tried again soon."""
    monkeypatch.setattr(log_output, "RETRY", 0.005)
    monkeypatch.setattr(access_output._log, "_bursts", {})
    with recorded() as records, gevent.Timeout(20):
        yield records


@pytest.fixture
def outputs() -> Iterator[AccessOutputs]:
    made = AccessOutputs(Stats(), {})
    yield made
    made.close()


def open_file(outputs: AccessOutputs, path: Path) -> Write:
    return outputs.writer(AccessPlace(str(path)))


def reader_at(path: Path) -> socket.socket:
    """A datagram socket that is read without waiting."""
    reader = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reader.bind(str(path))
    reader.setblocking(False)
    return reader


def receive(reader: socket.socket) -> str:
    """The next datagram; the event loop runs meanwhile."""
    while True:
        try:
            return reader.recv(1000).decode()
        except BlockingIOError:
            gevent.sleep(0.001)


def end_turn() -> None:
    """Have the event loop end its turn, as between two sessions."""
    gevent.sleep(0)


def test_off_is_no_place(outputs: AccessOutputs) -> None:
    assert outputs.writer(None) is None


def test_a_new_file_is_for_its_group_and_an_old_one_is_appended_to(outputs: AccessOutputs, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("before\n")
    old.chmod(0o600)
    before = os.umask(0o077)  # the unit's
    try:
        for path in (old, new):
            open_file(outputs, path)("line")
        end_turn()
    finally:
        os.umask(before)
    assert (old.read_text(), new.read_text()) == ("before\nline\n", "line\n")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (old, new)] == [0o600, 0o640]


def test_tunnels_that_name_the_same_file_share_one_descriptor(outputs: AccessOutputs, tmp_path: Path) -> None:
    first = open_file(outputs, tmp_path / "log")
    before = len(os.listdir("/proc/self/fd"))
    second = open_file(outputs, tmp_path / "log")
    assert len(os.listdir("/proc/self/fd")) == before
    first("1")
    second("2")
    end_turn()
    assert (tmp_path / "log").read_text() == "1\n2\n"


def test_a_file_that_was_renamed_is_followed_at_a_reload(outputs: AccessOutputs, tmp_path: Path) -> None:
    path = tmp_path / "log"
    write = open_file(outputs, path)
    before = len(os.listdir("/proc/self/fd"))
    write("1")
    path.rename(tmp_path / "log.1")
    write("2")
    outputs.reopen()
    write("3")
    end_turn()
    assert ((tmp_path / "log.1").read_text(), path.read_text()) == ("1\n2\n", "3\n")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_cannot_be_opened_again_stays_open(outputs: AccessOutputs, tmp_path: Path, log: list[Any]) -> None:
    path = tmp_path / "log"
    write = open_file(outputs, path)
    path.rename(tmp_path / "log.1")
    path.mkdir()
    outputs.reopen()
    write("after")
    end_turn()
    assert (tmp_path / "log.1").read_text() == "after\n"
    assert [(each.event, each.fields["place"], each.fields["error"]) for each in log] == [
        ("access.reopen_failed", str(path), "Is a directory")
    ]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every write of a file."""
    made: list[bytes] = []
    write = os.write

    def keep(descriptor: int, data: bytes) -> int:
        made.append(data)
        return write(descriptor, data)

    monkeypatch.setattr(access_output, "os", SimpleNamespace(**{**vars(os), "write": keep}))
    return made


def test_the_lines_of_one_turn_are_written_together(
    outputs: AccessOutputs, tmp_path: Path, writes: list[bytes]
) -> None:
    write = open_file(outputs, tmp_path / "log")
    for turn in ("12", "3"):
        for line in turn:
            write(line)
        end_turn()
    assert writes == [b"1\n2\n", b"3\n"]
    assert not outputs._stats.access_lines_lost


def test_many_lines_of_one_turn_are_neither_kept_nor_cut(
    outputs: AccessOutputs, tmp_path: Path, writes: list[bytes]
) -> None:
    """More than the queue takes, as where thousands of sessions are cut; each write is one that a pipe takes whole."""
    write, lines = open_file(outputs, tmp_path / "log"), [f"{number:04d} {200 * 'x'}" for number in range(3000)]
    for line in lines:
        write(line)
    assert (tmp_path / "log").read_text().count("\n") > 2900, "they are written as they come"
    end_turn()
    assert (tmp_path / "log").read_text().splitlines() == lines
    assert max(map(len, writes)) <= select.PIPE_BUF
    assert len(writes) < len(lines) / 15
    assert all(each.endswith(b"\n") for each in writes)


def test_a_line_that_is_longer_than_a_batch_is_written_alone(
    outputs: AccessOutputs, tmp_path: Path, writes: list[bytes]
) -> None:
    write = open_file(outputs, tmp_path / "log")
    for line in ("1", 2 * log_output.BATCH * "2", "3"):
        write(line)
    end_turn()
    assert b"".join(writes) == (tmp_path / "log").read_bytes()
    assert [len(each) for each in writes] == [2, 2 * log_output.BATCH + 1, 2]


@pytest.mark.parametrize("end", ["close", "exit"])
def test_the_last_turn_is_written_at_the_end(tmp_path: Path, end: str) -> None:
    outputs = AccessOutputs(Stats(), {})
    open_file(outputs, tmp_path / "log")("1")
    if end == "exit":
        for output in outputs._outputs.values():
            output.finish()
        assert (tmp_path / "log").read_text() == "1\n"
    outputs.close()
    end_turn()
    assert (tmp_path / "log").read_text() == "1\n"


def test_lines_that_waited_for_a_full_disk_follow_into_the_file_that_is_opened_again(
    outputs: AccessOutputs, tmp_path: Path, log: list[Any]
) -> None:
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    write = open_file(outputs, path)
    write("1")
    write("2")
    path.unlink()
    outputs.reopen()
    assert path.read_text() == "1\n2\n"
    assert [each.event for each in log] == ["access.write_failed"]


@pytest.mark.parametrize("place", ["/nowhere/access.log", "/"])
def test_a_place_that_cannot_be_opened_is_bad_input(outputs: AccessOutputs, place: str) -> None:
    with pytest.raises(ConfigError, match=f"ACCESS_LOG={place}: cannot be opened: .*; allowed: ") as refused:
        outputs.writer(AccessPlace(place))
    assert "\n" not in str(refused.value)


def test_a_fifo_without_a_reader_is_refused_and_not_waited_for(outputs: AccessOutputs, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError):
        open_file(outputs, tmp_path / "fifo")


def test_a_datagram_socket_is_found_again_whenever_its_reader_comes(
    outputs: AccessOutputs, tmp_path: Path, log: list[Any]
) -> None:
    path = tmp_path / "socket"
    write = outputs.writer(AccessPlace(str(path), is_socket=True))
    assert write
    write("1")
    for number in (1, 2):
        with reader_at(path) as reader:
            assert receive(reader) == f"{number}\n"
            write(f"{number}b")
            assert receive(reader) == f"{number}b\n"
        path.unlink()
        write(str(number + 1))
    assert {each.event for each in log} == {"access.write_failed"}
    assert len(log) == 1, "once a minute"


def test_a_reader_that_stands_still_makes_lines_wait_and_then_get_lost(
    outputs: AccessOutputs, tmp_path: Path, log: list[Any]
) -> None:
    count = 3000
    with reader_at(tmp_path / "socket") as reader:
        write = outputs.writer(AccessPlace(str(tmp_path / "socket"), is_socket=True))
        assert write
        for number in range(count):
            write(f"{number:04d} {200 * 'x'}")
        lost = outputs._stats.access_lines_lost
        assert 0 < lost < count
        arrived = [int(receive(reader)[:4]) for _ in range(count - lost)]
        assert arrived == [*range(count - lost)], "in order, and one gap"
    assert [(each.event, each.fields["lines"]) for each in log] == [("access.lost", lost)]


def test_standard_output_has_priorities_where_the_journal_reads_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        status = os.fstat(stdout.fileno())
        for environ in ({}, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}):
            outputs = AccessOutputs(Stats(), environ)
            write = outputs.writer(AccessPlace())
            assert write
            write("line")
            outputs.close()
    assert (tmp_path / "out").read_text() == "line\n<6>line\n"


def test_a_standard_output_that_is_closed_is_bad_input(outputs: AccessOutputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(ConfigError, match="ACCESS_LOG=-: cannot be opened: standard output is closed"):
        outputs.writer(AccessPlace())
