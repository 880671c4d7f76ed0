"""The loads that other programs make: iperf3 and wrk, with what they print turned into numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import LOOPBACK, MeasurementError
from benchmarks.targets import require_program

GRACE = 15.0  # seconds that a program may take beyond the length of its load
WRK_TIMEOUT = 5  # seconds after which wrk counts a request as timed out

# wrk prints for people; its script interface gives the numbers, in microseconds.
WRK_SCRIPT = """\
done = function(summary, latency, requests)
    local e = summary.errors
    io.stderr:write(string.format('{"requests": %d, "microseconds": %d, "p50": %d, "p99": %d, "errors": %d}',
        summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
        e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Transfer:
    """A bulk transfer: bytes that arrived, and seconds it took."""

    bytes: float
    seconds: float


@dataclass(frozen=True)
class Requests:
    """An HTTP load: requests answered, seconds it took, response times in seconds, errors of any kind."""

    count: int
    seconds: float
    p50: float
    p99: float
    errors: int


def run_program(command: Sequence[str | Path], duration: float) -> subprocess.CompletedProcess[str]:
    """Run a load program to its end; MeasurementError if it fails or takes GRACE longer than `duration`."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=duration + GRACE,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{Path(command[0]).name} did not end {GRACE:.0f} s after its time") from error
    if done.returncode != 0:
        told = (done.stderr or done.stdout)[-400:].strip()
        raise MeasurementError(f"{Path(command[0]).name} ended with status {done.returncode}: {told}")
    return done


def transfer(port: int, duration: int, streams: int, down: bool) -> Transfer:
    """Move bytes with iperf3 for `duration` seconds: up from visitor to target, or down."""
    command = [require_program("iperf3"), "-c", LOOPBACK, "-p", str(port), "-t", str(duration)]
    command += ["-P", str(streams), "--json", *(["-R"] if down else [])]
    received = json.loads(run_program(command, duration).stdout)["end"]["sum_received"]
    return Transfer(received["bytes"], received["seconds"])


def request_pages(port: int, duration: int, connections: int, keep_alive: bool, folder: Path) -> Requests:
    """Fetch the page with wrk, one thread, as fast as answers come, for `duration` seconds.

    The percentiles are wrk's, over all its samples of one microsecond resolution.
    """
    script = folder / "wrk.lua"
    script.write_text(WRK_SCRIPT)
    command: list[str | Path] = [require_program("wrk"), "-t", "1", "-c", str(connections), "-s", script]
    command += ["-d", f"{duration}s", "--timeout", f"{WRK_TIMEOUT}s"]
    command += [] if keep_alive else ["-H", "Connection: close"]
    told = json.loads(run_program([*command, f"http://{LOOPBACK}:{port}/"], duration).stderr)
    seconds = told["microseconds"] / 1e6
    return Requests(told["requests"], seconds, told["p50"] / 1e6, told["p99"] / 1e6, told["errors"])
