"""Wrong settings: exit 2 and one line that names the variable or the flag, and the value."""

from __future__ import annotations

import pytest

from tests.support.process import run
from tests.support.wrong import WRONG, WrongSetting

URL = "client://127.0.0.1:9/127.0.0.1:9"


@pytest.mark.parametrize("by_flag", [False, True], ids=["variable", "flag"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_in_one_line(name: str, by_flag: bool) -> None:
    """One of each; the others are tried without a process for each, in tests/unit/test_command_line.py."""
    wrong = WrongSetting(name, WRONG[name][-1], by_flag)
    done = run(*wrong.arguments, URL, env=wrong.environment)
    assert not wrong.complaints(done.code, done.errors)


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
