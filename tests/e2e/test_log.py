"""The log: levels, times, priorities for the journal, colours on a terminal, the dump on SIGUSR1."""

from __future__ import annotations

import contextlib
import re
import signal

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.process import Nodepass, Output
from tests.support.sockets import Address, connect, free_port, is_over, until
from tests.support.tunnel import BRISK, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client

TIMED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARN|ERROR|FATAL) +\S")
LEVEL = re.compile(r"^\S+ \S+ (DEBUG|INFO|WARN|ERROR|FATAL) ")
ESCAPE = "\x1b["
ID = r"\[[0-9a-f]{8}\]"


def log_of(output: Output, stack: contextlib.ExitStack) -> list[str]:
    """What a server without TLS says at start: a warning and an information at least."""
    server = stack.enter_context(Nodepass("server://127.0.0.1:0/127.0.0.1:0?log=debug", output=output))
    server.wait_for("listening")
    server.wait_for("tls")
    server.stop()
    return server.lines


def test_every_line_has_a_time_and_a_level(stack: contextlib.ExitStack) -> None:
    lines = log_of("pipe", stack)
    assert all(TIMED.match(line) for line in lines), lines
    assert not any(ESCAPE in line for line in lines)


def test_lines_for_the_journal_have_priorities_and_no_times(stack: contextlib.ExitStack) -> None:
    lines = log_of("journal", stack)
    assert all(re.match(r"^<[0-7]>\D", line) for line in lines), lines
    assert not any(re.search(r"\d\d:\d\d:\d\d", line) for line in lines), lines
    assert any(line.startswith("<6>") and "listening" in line for line in lines)
    assert any(line.startswith("<4>") for line in lines)
    assert not any(ESCAPE in line for line in lines)


def test_a_journal_that_reads_something_else_changes_nothing(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(Nodepass("server://127.0.0.1:0/127.0.0.1:0?tls=1", env={"JOURNAL_STREAM": "1:1"}))
    server.wait_for("listening")
    assert all(TIMED.match(line) for line in server.lines)


def test_a_terminal_gets_colours(stack: contextlib.ExitStack) -> None:
    assert any(ESCAPE in line for line in log_of("terminal", stack))


LEVELS = ("debug", "info", "warn", "error")


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_shows_itself_and_what_is_worse_and_nothing_else(level: str) -> None:
    """A server without TLS warns of it, says at info that it listens, and at debug what its pool does."""
    port = free_port()
    url = f"server://127.0.0.1:{port}/127.0.0.1:0?log={level}"
    with Nodepass(url, env=BRISK) as server:
        until(lambda: accepts(("127.0.0.1", port)))
        with V1Client(("127.0.0.1", port)) as client:
            client.wait_until_full()
        assert server.stop() == 0
        seen = {name.lower() for line in server.lines for name in LEVEL.findall(line)}
    assert seen == set(LEVELS[LEVELS.index(level) : -1])


def accepts(address: Address) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        connect(address).close()
        return True
    return False


def test_the_most_verbose_level_of_several_urls_wins(stack: contextlib.ExitStack) -> None:
    both = stack.enter_context(
        Nodepass(
            "server://127.0.0.1:0/127.0.0.1:0?tls=1&log=error",
            "server://127.0.0.1:0/127.0.0.1:0?tls=1&log=info",
        )
    )
    until(lambda: len(both.find("INFO.*listening")) == 2)


def test_a_session_is_one_line_at_its_start_and_one_at_its_end(our_tunnel: Tunnel) -> None:
    runs = (our_tunnel.our_server, our_tunnel.our_client)
    marks = [run.mark() for run in runs]
    with our_tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
    ids = []
    for run, mark in zip(runs, marks, strict=True):
        until(lambda run=run, mark=mark: len(session_lines(run, mark)) >= 2, what=f"{run!r}")  # type: ignore[misc]
        lines = session_lines(run, mark)
        ids.append({re.findall(ID, line)[0] for line in lines})
        assert "4" in lines[-1], "the bytes of the session"
    assert ids[0] & ids[1], "both sides log a session under the same id"


def session_lines(run: Nodepass, mark: int) -> list[str]:
    return run.find(f"DEBUG.*{ID}", after=mark)


def test_sessions_are_not_in_the_log_at_info(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(log="info", env={**BRISK, "POOL_GET_TIMEOUT": "10ms"}))
    with connect(server.visitor_address) as visitor:
        assert is_over(visitor)
    server.wait_for("no data connection")
    assert not server.find("DEBUG")


@pytest.mark.parametrize("name", ["server", "client"])
def test_sigusr1_dumps_statistics_and_greenlets(tunnel: TunnelFactory, name: str) -> None:
    started = tunnel(tls=1)
    run = started.our_server if name == "server" else started.our_client
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        for _ in range(2):
            mark = run.mark()
            run.send(signal.SIGUSR1)
            run.wait_for("greenlet", after=mark)
            run.wait_for("pool|idle", after=mark)
        assert_connected(visitor, service)


def test_log_lines_name_the_tunnel(stack: contextlib.ExitStack) -> None:
    port = free_port()
    server = stack.enter_context(OurServer(1, tunnel=f"127.0.0.1:{port}"))
    client = stack.enter_context(OurClient(server.tunnel_address, ("127.0.0.1", 9)))
    client.wait_for(rf"INFO +client\S*:{port} .*connected to")
    server.wait_for(rf"INFO +server\S*:{port} .*client connected")


def test_keys_and_certificates_never_appear_in_the_log(tunnel: TunnelFactory) -> None:
    started = tunnel(tls=2)
    started.assert_works()
    for run in (started.our_server, started.our_client):
        run.send(signal.SIGUSR1)
        run.wait_for("greenlet")
        assert not run.find("PRIVATE|-----BEGIN")
