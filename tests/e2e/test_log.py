"""The log: its formats, levels, priorities for the journal, colours on a terminal, the dump on SIGUSR1."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.log import Entry
from tests.support.process import Environment, Nodepass, Output
from tests.support.sockets import Address, connect, free_port, is_over, is_refused, until
from tests.support.tunnel import CALM, OurServer, Pair, Tunnel, assert_connected, open_tunnel
from tests.support.v1_client import V1Client

TIMED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARN|ERROR|FATAL) +\S")
ESCAPE = "\x1b["
ID = re.compile(r"^[0-9a-f]{8}$")
TEXT: Environment = {"LOG_FORMAT": "text"}


@contextlib.contextmanager
def served(kind: type[Nodepass], port: int, output: Output = "pipe", env: Environment = TEXT) -> Iterator[Nodepass]:
    """A server without TLS at this port; as text its log has no name for the line that says that it listens."""
    with kind(f"server://127.0.0.1:{port}/127.0.0.1:0?log=debug", env=env, output=output) as server:
        until(lambda: accepts(("127.0.0.1", port)))
        yield server


def accepts(address: Address) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        connect(address).close()
        return True
    return False


FORGED = "nodepass forged"


def log_of(port: int, output: Output = "pipe", env: Environment = TEXT, kind: type[Nodepass] = Nodepass) -> list[str]:
    """What such a server says until it stops: a warning, an information, at debug who connected, and each of what a
    peer has sent on a line of its own.
    """
    with served(kind, port, output, env) as server:
        for version in ("9", f"9%0A{FORGED}", f"\x1b[31m9\r{FORGED}"):
            with connect(("127.0.0.1", port)) as peer:
                peer.sendall(f"//hello?v={version}&nonce={'0' * 32}\n".encode())
                while not is_over(peer):
                    pass
        assert server.stop() == 0
        assert not any(line.startswith(FORGED) for line in server.lines)
        assert output == "terminal" or all(line.isprintable() for line in server.lines), server.lines
        return server.lines


class Unset(Nodepass):
    """A run without LOG_FORMAT."""

    prefix = ("env", "-u", "LOG_FORMAT")


def test_as_text_which_is_the_default_every_line_has_a_time_a_level_and_the_tunnel() -> None:
    """Also where a journal reads something else."""
    port = free_port()
    lines = log_of(port, env={"JOURNAL_STREAM": "1:1"}, kind=Unset)
    assert all(TIMED.match(line) for line in lines), lines
    assert any(f" server:{port} " in line for line in lines)
    assert not any(ESCAPE in line for line in lines)


def test_lines_for_the_journal_have_priorities_and_no_times() -> None:
    port = free_port()
    lines = log_of(port, "journal")
    assert all(re.match(r"^<[0-7]>(nodepass|server:\d+) \S", line) for line in lines), lines
    assert not any(re.search(r"\d\d:\d\d:\d\d", line) for line in lines), lines
    assert any(line.startswith(f"<6>server:{port} ") for line in lines)
    assert any(line.startswith(f"<4>server:{port} ") for line in lines)
    assert not any(ESCAPE in line for line in lines)


@pytest.mark.programs
def test_a_terminal_gets_colours() -> None:
    assert any(ESCAPE in line for line in log_of(free_port(), "terminal"))


def test_as_json_every_line_is_an_object_with_an_event_and_its_fields() -> None:
    port = free_port()
    lines = [json.loads(line) for line in log_of(port, env={"LOG_FORMAT": "json"})]
    for each in lines:
        assert list(each)[:5] == ["time", "level", "tunnel", "event", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", each["time"])
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", each["event"])
    (listening,) = [each for each in lines if each["event"] == "server.listening"]
    assert listening["level"] == "info"
    assert listening["tunnel"] == f"server:{port}"
    assert listening["tunnel_address"] == f"127.0.0.1:{port}"
    assert listening["tls"] == 0


@pytest.mark.programs
def test_json_for_the_journal_has_priorities_before_the_objects() -> None:
    lines = log_of(free_port(), "journal", {"LOG_FORMAT": "json"})
    assert all(re.match(r'^<[0-7]>\{"time": ', line) for line in lines), lines
    priorities = {json.loads(line[3:])["level"]: line[:3] for line in lines}
    assert priorities.items() >= {("info", "<6>"), ("warn", "<4>")}


@pytest.mark.parametrize(
    ("level", "shown"),
    [pytest.param("debug", {"debug", "info", "warn"}, marks=pytest.mark.programs), ("warn", {"warn"})],
)
def test_a_level_shows_itself_and_what_is_worse_and_nothing_else(level: str, shown: set[str]) -> None:
    """A server without TLS warns of it, says at info that it listens, and at debug what its pool does."""
    port = free_port()
    url = f"server://127.0.0.1:{port}/127.0.0.1:0?log={level}"
    with Nodepass(url, env=CALM) as server:
        until(lambda: accepts(("127.0.0.1", port)))
        with V1Client(("127.0.0.1", port)) as client:
            client.wait_until_full()
        assert server.stop() == 0
        seen = {entry["level"] for entry in server.entries}
    assert seen == shown


@pytest.mark.programs
def test_the_most_verbose_level_of_several_urls_wins(stack: contextlib.ExitStack) -> None:
    both = stack.enter_context(
        Nodepass(
            "server://127.0.0.1:0/127.0.0.1:0?tls=1&log=error",
            "server://127.0.0.1:0/127.0.0.1:0?tls=1&log=info",
        )
    )
    until(lambda: len(both.find("server.listening", level="info")) == 2)


@pytest.fixture(scope="module")
def started(authority: Authority) -> Iterator[Tunnel]:
    """A tunnel whose processes have no other."""
    with open_tunnel(Pair("ours", "ours", 2), authority) as tunnel:
        yield tunnel


def test_a_session_is_one_line_at_its_start_and_one_at_its_end(started: Tunnel) -> None:
    runs = (started.our_server, started.our_client)
    marks = [run.mark() for run in runs]
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
    ids = set()
    for run, begin, mark in zip(runs, ("visitor.connected", "target.connected"), marks, strict=True):
        end = run.wait_for("session.closed", after=mark)
        assert (end["up"], end["down"], end["outcome"]) == (4, 4, "completed")
        assert [entry.event for entry in lines_of_session(run, end, mark)] == [begin, "session.closed"]
        ids.add(end["session"])
    assert len(ids) == 1, "both sides log a session under the same id"


def lines_of_session(run: Nodepass, line: Entry, mark: int) -> list[Entry]:
    assert ID.match(line["session"])
    return run.find(session=line["session"], level="debug", after=mark)


def test_sessions_are_not_in_the_log_at_info(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(log="info", env={**CALM, "POOL_GET_TIMEOUT": "10ms"}))
    assert is_refused(lambda: connect(server.visitor_address))
    server.wait_for("visitor.unserved", reason="no_client")
    assert not server.find(level="debug")


def test_sigusr1_dumps_statistics_and_greenlets(started: Tunnel) -> None:
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        for run in 2 * [started.our_server, started.our_client]:
            mark = run.mark()
            run.send(signal.SIGUSR1)
            report = run.wait_for("tunnel.report", after=mark, level="info")
            assert report["sessions"] == 1
            assert report["counters"]["tcp_sessions"] >= 1
            run.wait_for("process.greenlets", after=mark, level="debug", line=re.compile("Greenlet"))
            assert run.wait_for("process.bugs", after=mark, bugs=0, path="")["greenlets"] > 1
        assert_connected(visitor, service)


def test_log_lines_name_the_tunnel_and_show_no_key_or_certificate(started: Tunnel) -> None:
    port = started.our_server.tunnel_address[1]
    started.our_client.wait_for("server.connected", tunnel=f"client:{port}", level="info")
    started.our_server.wait_for("client.connected", tunnel=f"server:{port}", level="info")
    started.assert_works()
    for run in (started.our_server, started.our_client):
        run.send(signal.SIGUSR1)
        run.wait_for("process.bugs")
        assert not [line for line in run.lines if "PRIVATE" in line or "-----BEGIN" in line]
