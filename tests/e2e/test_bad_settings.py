"""Wrong settings: exit 2 and one line that names the variable or the flag, and the value."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.support.process import Finished, run

URL = "client://127.0.0.1:9/127.0.0.1:9"
TOGETHER = 4
"""Runs at a time."""

WRONG_COUNTS = ("", "many", "-1", "0", "99999999999999999999")
WRONG_DURATIONS = ("", "soon", "5", "-5s", "99999999999h")
WRONG_ADDRESSES = (
    "",
    "on",
    "localhost",
    "9464",
    "127.0.0.1:65536",
    "::1:9464",
    "[1]:9464",
    "unix:name",
    "unix:/" + 107 * "p",
)
WRONG_PORTS = ("", "any", "-1", "65536", "20099-20000", "20000-", "1-2-3")

WRONG: dict[str, tuple[str, ...]] = {
    "SEMAPHORE_LIMIT": WRONG_COUNTS,
    "MIN_POOL_CAPACITY": WRONG_COUNTS,
    "MAX_POOL_CAPACITY": WRONG_COUNTS,
    "UDP_DATA_BUF_SIZE": (*WRONG_COUNTS, "65536"),
    "UDP_READ_TIMEOUT": WRONG_DURATIONS,
    "REPORT_INTERVAL": (*WRONG_DURATIONS, "0s"),
    "RELOAD_INTERVAL": (*WRONG_DURATIONS, "0s"),
    "SERVICE_COOLDOWN": WRONG_DURATIONS,
    "SHUTDOWN_TIMEOUT": WRONG_DURATIONS,
    "HANDSHAKE_TIMEOUT": (*WRONG_DURATIONS, "0s"),
    "POOL_GET_TIMEOUT": WRONG_DURATIONS,
    "DATA_PORT": WRONG_PORTS,
    "METRICS_LISTEN": WRONG_ADDRESSES,
}


@dataclass(frozen=True)
class Case:
    """A setting with a wrong value, given by its variable or by its flag."""

    name: str
    value: str
    by_flag: bool

    @property
    def source(self) -> str:
        """How the user wrote it, and how the line must name it."""
        return "--" + self.name.lower().replace("_", "-") if self.by_flag else self.name

    def run(self) -> Finished:
        if self.by_flag:
            return run(f"{self.source}={self.value}", URL)
        return run(URL, env={self.name: self.value})

    def complaints(self) -> list[str]:
        """What is wrong with how the program took it."""
        done = self.run()
        text = done.errors
        found = [
            (done.code != 2, f"exit {done.code}"),
            (len(done.lines) != 1, f"{len(done.lines)} lines"),
            ("Traceback" in text, "a traceback"),
            (self.source not in text, "does not name the source"),
            (self.value not in text, "does not name the value"),
        ]
        return [f"{self}: {what}: {text!r}" for wrong, what in found if wrong]


@pytest.mark.parametrize("by_flag", [False, True], ids=["variable", "flag"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_in_one_line(name: str, by_flag: bool) -> None:
    cases = [Case(name, value, by_flag) for value in WRONG[name]]
    with ThreadPoolExecutor(TOGETHER) as pool:
        complaints = [line for lines in pool.map(Case.complaints, cases) for line in lines]
    assert not complaints, "\n".join(complaints)


def test_bounds_in_the_wrong_order_are_refused_in_one_line() -> None:
    done = run("--min-pool-capacity=64", URL, env={"MAX_POOL_CAPACITY": "32"})
    assert done.code == 2
    assert len(done.lines) == 1
    for part in ("--min-pool-capacity", "64", "MAX_POOL_CAPACITY", "32"):
        assert part in done.errors or part.strip("-").replace("-", "_").upper() in done.errors


def test_an_unknown_flag_is_refused_in_one_line() -> None:
    done = run("--min-pool-capazity=16", URL)
    assert done.code == 2
    assert len(done.lines) == 1
    assert "--min-pool-capazity" in done.errors


def test_a_variable_of_another_program_is_ignored() -> None:
    done = run("--version", env={"POOL_CAPACITY": "none", "PORT": "x"})
    assert done.code == 0


@pytest.mark.parametrize("text", ["5s", "500ms", "1h30m", "1.5s", "20000us", "1m0.5s", ".5s"])
def test_durations_are_written_as_in_go(text: str) -> None:
    """Refused for the URL only, which comes last on the line of complaints."""
    done = run("--udp-read-timeout", text, "client://nowhere")
    assert done.code == 2
    assert "udp-read-timeout" not in done.errors
    assert "nowhere" in done.errors
