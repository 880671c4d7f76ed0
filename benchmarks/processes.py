"""Starting, weighing and ending the processes of a measurement, by their own handles."""

from __future__ import annotations

import itertools
import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

LOOPBACK = "127.0.0.1"

STOP_TIMEOUT = 3.0  # seconds that processes get to end by themselves
READY_TIMEOUT = 20.0  # seconds until the first bytes must go all the way through
PROBE_PAUSE = 0.02  # seconds between two looks

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# Where fixed ports are taken from: under the kernel's range for outgoing connections, so that none of the
# many that a measurement makes sits on a port that a listener is about to bind.
PORTS = range(15000, 30000)


class MeasurementError(Exception):
    """A measurement could not be made; the text says why."""


_candidates = itertools.cycle(random.sample(PORTS, len(PORTS)))  # so that none comes twice in a run


def free_port() -> int:
    """Return a loopback port that is free for TCP and UDP; MeasurementError if a hundred tries find none."""
    for port in itertools.islice(_candidates, 100):
        try:
            with socket.socket() as stream, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
                stream.bind((LOOPBACK, port))
                datagrams.bind((LOOPBACK, port))
        except OSError:
            continue
        return port
    raise MeasurementError("found no free port")


def is_listening(port: int) -> bool:
    """Tell whether something listens on a TCP port, without connecting to it."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    local = f":{port:04X}"
    return any(fields[1].endswith(local) and fields[3] == "0A" for fields in map(str.split, rows))


def wait_until(ready: Callable[[], bool], what: str, *owners: Processes) -> None:
    """Look again and again until `ready` says yes, as long as all processes of `owners` live.

    MeasurementError if one of them ends, and after READY_TIMEOUT.
    """
    deadline = time.monotonic() + READY_TIMEOUT
    while not ready():
        for owner in owners:
            owner.check()
        if time.monotonic() > deadline:
            raise MeasurementError(f"{what} was not ready after {READY_TIMEOUT:.0f} s")
        time.sleep(PROBE_PAUSE)


class Processes:
    """Processes that belong together, with their logs in one folder; leaving the context ends them all."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Start one process; `environment` is added to our own, its output goes to `<name>.log`."""
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # a Ctrl-C at the terminal reaches them through us, in order
            )
        self._started.append((process, log))

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, _ in self._started:
            process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT
        for process, _ in self._started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def check(self) -> None:
        """Raise MeasurementError, with the end of its log, if one of the processes has ended."""
        for process, log in self._started:
            if process.poll() is not None:
                tail = log.read_text(errors="replace")[-400:].strip()
                raise MeasurementError(f"{log.stem} ended with status {process.returncode}: {tail}")

    def family(self) -> list[int]:
        """Return the ids of the processes and all their descendants that are alive."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            fields = _stat_fields(int(entry.name)) if entry.name.isdecimal() else None
            if fields is not None:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        family = [process.pid for process, _ in self._started if process.poll() is None]
        for pid in family:  # grows while it is walked
            family += children.get(pid, [])
        return family

    def cpu_seconds(self) -> float:
        """Return user and system seconds used so far by the family and by children it has reaped."""
        ticks = 0
        for pid in self.family():
            fields = _stat_fields(pid)
            if fields is not None:
                ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
        return ticks / TICKS_PER_SECOND

    def pss_bytes(self) -> int:
        """Return the family's memory, in bytes, shared pages divided among those who share them."""
        return sum(map(_pss_bytes, self.family()))


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat behind the name, None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
