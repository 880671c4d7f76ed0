"""The log's way out: it never waits for the reader, keeps the order, and counts what is lost; with real descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gevent
import pytest

from nodepass import log
from nodepass.daemon import log_output
from nodepass.daemon.log_output import QUEUED, LineQueue, LogOutput
from nodepass.log import Log
from nodepass.stats import Stats
from tests.unit.records import recorded

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 10.0  # seconds
COUNT = 1500  # lines, more than a queue and the kernel's buffers take


class Out:
    """A log on a descriptor, and the other end of it."""

    def __init__(self, writing: int, reading: int) -> None:
        self.writing, self.reading, self.stats = writing, reading, Stats()
        os.set_blocking(reading, False)
        self.output = LogOutput(writing, "utf-8", self.stats)
        log.set_up("info", {}, cast(Any, self.output), "text")
        self._read = b""

    def say(self, *numbers: int) -> None:
        for number in numbers:
            Log("t").info("a.line", "line %(number)d " + 400 * "x", number=number)

    def read(self) -> list[str]:
        """All lines so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.reading, 1 << 16):
                self._read += data
        return self._read.decode().splitlines()

    def read_until(self, wanted: str) -> list[str]:
        """All lines, once one of them matches; the event loop runs meanwhile."""
        with gevent.Timeout(PATIENCE):
            while not re.search(wanted, "\n".join(self.read()), re.MULTILINE):
                gevent.sleep(0.01)
        return self.read()

    def is_waiting(self) -> bool:
        return bool(self.output.lines._timer.active or self.output.lines._room.active)


def numbers_of(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"line (\d+) x", line))]


def lost_of(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"ERROR\S* nodepass lost (\d+) lines", line))]


def refuse(*_: object) -> int:
    raise PermissionError


def a_pipe(_: pytest.MonkeyPatch) -> tuple[int, int]:
    reading, writing = os.pipe()
    return writing, reading


def a_pipe_of_another_user(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    reading, writing = os.pipe()
    monkeypatch.setattr(os, "open", refuse)
    return writing, reading


def a_terminal(_: pytest.MonkeyPatch) -> tuple[int, int]:
    reading, writing = pty.openpty()
    tty.setraw(writing)
    return writing, reading


def a_socket(_: pytest.MonkeyPatch) -> tuple[int, int]:
    near, far = socket.socketpair()
    for each in (near, far):
        os.set_blocking(each.fileno(), True)  # gevent's are not
    return near.detach(), far.detach()


def fail(*_: object) -> None:
    pytest.fail("a write waits")  # no Exception, which `logging` would take


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The log of other tests stays as it was; what waits is tried again soon."""
    monkeypatch.setattr(log_output, "RETRY", 0.005)
    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    with recorded():
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=[a_pipe, a_pipe_of_another_user, a_terminal, a_socket], ids=lambda each: each.__name__)
def out(request: pytest.FixtureRequest) -> Iterator[Out]:
    with pytest.MonkeyPatch.context() as patch:
        one = Out(*request.param(patch))
    yield one
    one.output.close()
    os.close(one.writing)
    os.close(one.reading)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Out]:
    one = Out(*a_pipe(monkeypatch))
    yield one
    one.output.close()
    os.close(one.writing)
    with contextlib.suppress(OSError):
        os.close(one.reading)


def test_a_line_is_written_at_once_where_there_is_room(out: Out) -> None:
    out.say(1)
    assert numbers_of(out.read()) == [1]
    assert not out.is_waiting()


def test_a_reader_that_stands_still_stops_nothing_and_finds_every_line_or_its_loss(out: Out) -> None:
    out.say(*range(COUNT))
    assert out.stats.log_lines_lost > 0
    assert out.output.lines._size < QUEUED + 1000
    lost = lost_of(out.read_until("lost .* written$"))
    out.say(COUNT)
    lines = out.read_until(f"line {COUNT} x+$")
    arrived = numbers_of(lines)
    assert arrived == [*range(COUNT - lost[0]), COUNT], "in order, and one gap"
    assert lost == [out.stats.log_lines_lost]
    where = next(index for index, line in enumerate(lines) if lost_of([line]))
    assert numbers_of(lines[:where]) == arrived[:-1], "what is lost is said where it is missing"
    with gevent.Timeout(PATIENCE):
        while out.is_waiting():
            gevent.sleep(0.01)


def test_others_that_share_stderr_can_still_wait_for_it(out: Out) -> None:
    out.say(*range(COUNT))
    assert not fcntl.fcntl(out.writing, fcntl.F_GETFL) & os.O_NONBLOCK


def test_a_long_line_arrives_whole(out: Out) -> None:
    Log("t").info("a.line", "%(long)s", long="y" * 900)
    text = "z" * 200_000
    out.output.write(f"{text}\n")
    assert out.read_until(f"{text}$")[-1] == text


CRASHING = """\
import sys
from nodepass import log
from nodepass.daemon.log_output import LogOutput
from nodepass.stats import Stats
LogOutput.replace_stderr(Stats())
log.set_up("info", {})
for number in range(600):
    log.Log("t").info("a.line", "line %(number)d " + 400 * "x", number=number)
sys.stdout.write("crashing\\n")
sys.stdout.flush()
raise ValueError("at the end")
"""


def test_the_traceback_of_a_crash_follows_the_lines_that_were_waiting() -> None:
    with subprocess.Popen([sys.executable, "-c", CRASHING], cwd=ROOT, stdout=-1, stderr=-1, text=True) as crashing:
        assert crashing.stdout
        assert crashing.stderr
        assert crashing.stdout.readline() == "crashing\n"  # it has written more than the pipe takes
        lines = crashing.stderr.read().splitlines()
    assert numbers_of(lines) == [*range(600)]
    assert lines[600] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: at the end"


def test_at_the_exit_a_reader_that_stands_still_is_waited_for_with_a_limit(
    pipe: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_output, "LAST_CHANCE", 0.05)
    pipe.say(*range(600))
    pipe.output.lines.finish()
    assert pipe.output.lines._lines


def test_without_a_reader_the_exit_waits_for_nothing(pipe: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_output, "LAST_CHANCE", 1000.0)
    os.close(pipe.reading)
    pipe.say(1)
    assert pipe.is_waiting()
    pipe.output.lines.finish()


def test_a_line_that_a_full_disk_does_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    with path.open("w") as file, path.open() as reading:
        one = Out(file.fileno(), reading.fileno())
        write = one.output.lines._write
        monkeypatch.setattr(one.output.lines, "_write", refuse)
        one.say(1)
        assert one.read() == []
        monkeypatch.setattr(one.output.lines, "_write", write)
        one.read_until("line 1 ")
        one.output.close()


def test_a_write_that_takes_nothing_is_tried_again_when_there_is_room(pipe: Out) -> None:
    taken: list[bytes] = []

    def write(data: bytes) -> int:
        taken.append(data)
        return len(data) if len(taken) > 1 else 0

    queue = LineQueue(pipe.writing, write, fail)
    queue.put(b"line\n")
    assert taken == [b"line\n"]
    with gevent.Timeout(PATIENCE):
        while len(taken) < 2:
            gevent.sleep(0.01)
    assert taken == [b"line\n"] * 2
    gevent.sleep(0.01)
    assert not queue._room.active
    queue.close()
