"""A process of the fork server is like one that is executed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import ForkServer, Started
from tests.support.process import scrubbed
from tests.support.sockets import PATIENCE

MODULE = "tests.support.itself"
ENVIRONMENT = scrubbed({"TUNNEL_KEY": "a key"})


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    made = ForkServer(scrubbed())
    yield made
    made.close()


@pytest.fixture
def serving(server: ForkServer) -> Iterator[Started]:
    """The program, serving."""
    with open(os.devnull, "w") as nowhere:
        streams = nowhere.fileno(), nowhere.fileno()
        process = server.start("nodepass.__main__", ["server://127.0.0.1:0/127.0.0.1:0"], ENVIRONMENT, streams)
    yield process
    process.kill()
    process.wait(PATIENCE)


def outcome(server: ForkServer | None, status: int) -> tuple[int, dict[str, Any], str]:
    """The exit status, what the program wrote of itself, and its error output; executed without a server."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process: Started
        if server:
            streams = output.fileno(), errors.fileno()
            process = server.start(MODULE, [str(status), "more"], ENVIRONMENT, streams)
        else:
            command = [sys.executable, "-m", MODULE, str(status), "more"]
            process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
        code = process.wait(PATIENCE)
        for each in (output, errors):
            each.seek(0)
        return code, json.load(output), errors.read().decode()


@pytest.mark.parametrize("status", [0, 3, -9])
def test_it_has_what_an_executed_one_has_and_ends_like_it(server: ForkServer, status: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))  # the fork server was started with another
    try:
        forked = outcome(server, status)
        assert forked == outcome(None, status)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert forked[0] == status
    assert forked[1]["limit"] == [soft - 1, hard]


def test_its_exit_status_is_there_again_and_again_and_none_while_it_runs(serving: Started) -> None:
    assert serving.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        serving.wait(0.01)
    serving.kill()
    assert [serving.wait(PATIENCE), serving.poll(), serving.wait()] == [-9, -9, -9]
    serving.kill()  # there is nothing to end


def test_it_shares_no_buffer_with_another(serving: Started) -> None:
    """Or bytes of one process would come out of the other."""
    maps = Path(f"/proc/{serving.pid}/maps").read_text().splitlines()
    assert any("rw-p" in line for line in maps)
    assert not [line for line in maps if "rw-s" in line]
