"""The real program under test: started, watched through its log, and ended by its own handle.

A `Nodepass` is one run of `bin/nodepass`. Its log is collected by a thread, event by event, so that a test waits for
what the program says and never for a length of time. The environment is scrubbed: no setting of the machine that runs
the tests reaches the program, and its log is JSON unless the test says otherwise.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tests.support.log import Entry, check_wanted, parse
from tests.support.proc import count_descriptors
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("NODEPASS") or REPOSITORY / "bin" / "nodepass").absolute()
INHERITED = ("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "VIRTUAL_ENV")

IS_MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ
"""Whether coverage.py notes which lines run, in this process and in those it starts."""

SHOWN = 150
"""Lines of a log, the last ones, that a failed test shows."""

Environment = Mapping[str, str]
Output = Literal["pipe", "journal", "terminal"]
Run = TypeVar("Run", bound="Nodepass")

runs: list[Nodepass] = []
"""Every run that has not been forgotten yet; a failed test shows their logs."""


def scrubbed(extra: Environment | None = None) -> dict[str, str]:
    """An environment with no setting but LOG_FORMAT, where `python3` is the interpreter that runs the tests."""
    kept = {name: text for name, text in os.environ.items() if name in INHERITED or name.startswith("COVERAGE_")}
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", os.defpath)))
    return {**kept, "LOG_FORMAT": "json", **(extra or {})}


@dataclass(frozen=True)
class Finished:
    """What a run that ended by itself left behind."""

    code: int
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        """The lines of standard error that are not blank."""
        return [line for line in self.errors.splitlines() if line.strip()]


def run(*arguments: str, env: Environment | None = None, timeout: float = PATIENCE) -> Finished:
    """Run the program to its end; it is killed, and the test fails, if it has none in time."""
    done = subprocess.run(
        [str(PROGRAM), *arguments],
        env=scrubbed(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class Nodepass(Closes):
    """One run of the program; a context manager that starts it and makes sure that it has ended.

    `prefix`: a command that runs the program, and becomes it or passes signals on.
    """

    prefix: tuple[str, ...] = ()
    program: tuple[str, ...] = (str(PROGRAM),)

    def __init__(self, *arguments: str, env: Environment | None = None, output: Output = "pipe") -> None:
        self.arguments = arguments
        self._env = scrubbed(env)
        self._output = output
        self._entries: list[Entry] = []
        self._changed = threading.Condition()
        self._drained = False
        self._shown_from = 0

    descriptors: tuple[int, ...] = ()
    """What the process gets beside the standard ones, for a run whose `command` makes something of them."""

    def command(self) -> list[str]:
        """What is executed."""
        return [*self.prefix, *self.program, *self.arguments]

    def __repr__(self) -> str:
        state = "not started"
        if hasattr(self, "process"):
            code = self.process.poll()
            state = "running" if code is None else f"exit {code}"
        return f"<nodepass {' '.join(self.arguments)}: {state}>"

    def __enter__(self: Run) -> Run:
        reading, writing = pty.openpty() if self._output == "terminal" else os.pipe()
        if self._output == "journal":
            status = os.fstat(writing)
            self._env["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
        try:
            self.process = subprocess.Popen(
                self.command(),
                env=self._env,
                pass_fds=self.descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=writing,
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._reader = threading.Thread(target=self._collect, args=(reading,), daemon=True)
        self._reader.start()
        runs.append(self)
        return self

    def close(self) -> None:
        if IS_MEASURED and self.is_running:  # `make coverage`: a killed process would take its lines with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.send(signal.SIGTERM)
                self.process.wait(0.2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.send(signal.SIGTERM)
                self.process.wait(5)
        self.kill()

    def _collect(self, descriptor: int) -> None:
        buffered = b""
        with open(descriptor, "rb", buffering=0) as stream:
            while data := self._read(stream.fileno()):
                *whole, buffered = (buffered + data).split(b"\n")
                self._append(whole)
        self._append([buffered] if buffered else [])
        with self._changed:
            self._drained = True
            self._changed.notify_all()

    @staticmethod
    def _read(descriptor: int) -> bytes:
        try:
            return os.read(descriptor, 1 << 16)
        except OSError:  # a terminal whose other side has closed
            return b""

    def _append(self, lines: list[bytes]) -> None:
        entries = [parse(line.decode(errors="replace").rstrip("\r")) for line in lines]
        with self._changed:
            self._entries += entries
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        """The process id, while it runs."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    @property
    def entries(self) -> list[Entry]:
        """The log so far."""
        with self._changed:
            return list(self._entries)

    @property
    def lines(self) -> list[str]:
        """The log so far, as it was written."""
        return [entry.line for entry in self.entries]

    def mark(self) -> int:
        """A place in the log: what `wait_for` and `find` are given to look only behind it."""
        return len(self.entries)

    def find(self, event: str = "", *, after: int = 0, **fields: Any) -> list[Entry]:
        """The events so far of this name (of any, without one) whose fields are so; see `Entry.matches`."""
        check_wanted(event, fields)
        return [entry for entry in self.entries[after:] if entry.matches(event, fields)]

    def find_crashes(self, after: int = 0) -> list[Entry]:
        """Every traceback so far."""
        return [entry for entry in self.entries[after:] if entry.is_crash]

    def wait_for(self, event: str = "", *, after: int = 0, timeout: float = PATIENCE, **fields: Any) -> Entry:
        """The first such event behind the mark; AssertionError at the timeout or the end of the log."""
        check_wanted(event, fields)
        deadline = time.monotonic() + timeout
        seen = after
        with self._changed:
            while True:
                for entry in self._entries[seen:]:
                    if entry.matches(event, fields):
                        return entry
                seen = max(seen, len(self._entries))
                left = deadline - time.monotonic()
                if self._drained or left <= 0:
                    why = "before the log ended" if self._drained else f"in {timeout:g} s"
                    raise AssertionError(f"not in the log {why}: {event} {fields}: {self!r}")
                self._changed.wait(left)

    def send(self, number: signal.Signals) -> None:
        """Send a POSIX signal, if the process still runs."""
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the process to end by itself and for its whole log; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Ask the process to end and wait for it; the exit code."""
        self.send(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """End the process at once, if it still runs, as a crash would."""
        self.process.kill()
        self.wait()

    def count_descriptors(self) -> int:
        """Open file descriptors of the process now."""
        return count_descriptors(self.pid)

    def settled_descriptors(self, seconds: float = 0.5) -> int:
        """The descriptor count once it has stayed the same for so long."""
        count, since = self.count_descriptors(), time.monotonic()
        deadline = since + PATIENCE
        while time.monotonic() - since < seconds:
            assert time.monotonic() < deadline, f"descriptors never settled: {self!r}"
            time.sleep(0.02)
            if (now := self.count_descriptors()) != count:
                count, since = now, time.monotonic()
        return count

    def wait_for_descriptors(self, at_most: int, timeout: float = PATIENCE) -> None:
        """Return once no more descriptors than these are open."""
        what = f"more descriptors than {at_most}: {self!r}"
        until(lambda: self.count_descriptors() <= at_most, timeout, what)

    def show_from_here(self) -> None:
        """Leave out what is in the log so far when a failed test shows it."""
        self._shown_from = self.mark()

    def text(self) -> str:
        """The part of the log that a failed test shows."""
        return "\n".join(map(str, self.entries[self._shown_from :][-SHOWN:]))
