"""Bad input to the program itself: a few of each kind; tests/unit/test_bad_input.py has the tables."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.certificates import Authority
from tests.support.command import call, refusals
from tests.support.process import PROGRAM, Environment, run, scrubbed

SERVER = "server://127.0.0.1:0/127.0.0.1:0"
CLIENT = "client://127.0.0.1:9/127.0.0.1:9"


@pytest.mark.parametrize(
    ("arguments", "env", "parts"),
    [
        ([f"{SERVER}?tsl=1"], {}, ["tsl", "did you mean 'tls'"]),
        pytest.param(["--data-port=any", CLIENT], {}, ["--data-port", "any", "allowed"], marks=pytest.mark.programs),
        ([CLIENT], {"SEMAPHORE_LIMIT": "many"}, ["SEMAPHORE_LIMIT", "many", "allowed"]),
        pytest.param(
            [],
            {"NODEPASS_URL": f"{SERVER}?tls=0 sever://127.0.0.1:1/127.0.0.1:2"},
            ["sever", "allowed"],
            marks=pytest.mark.programs,
        ),
        (["top", "nonsense"], {}, ["nonsense", "allowed"]),
    ],
    ids=["a URL", "a flag", "a variable", "the second of two URLs", "an endpoint"],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], env: Environment, parts: list[str]) -> None:
    assert not refusals(run(*arguments, env=env), *parts)


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    crt, key = authority.local.crt, authority.issue().key
    assert not refusals(call(f"{SERVER}?tls=2&crt={crt}&key={key}"), str(crt), str(key))


def test_where_standard_error_is_closed_the_exit_status_is_the_same() -> None:
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', str(PROGRAM), "nonsense"]
    assert subprocess.run(command, env=scrubbed(), check=False, timeout=60).returncode == 2
