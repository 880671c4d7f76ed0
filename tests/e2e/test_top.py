"""`nodepass top`: as text, on a terminal, and where there is nothing to look at."""

from __future__ import annotations

import contextlib
import http.server
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodepass.tools import top_scrape
from nodepass.tools.top_scrape import NoAnswer, Source, take
from nodepass.tools.top_table import Watch, plain, sparkline
from tests.support.command import call
from tests.support.process import PROGRAM, REPOSITORY, Nodepass, run, scrubbed
from tests.support.scrape import WATCHED, metrics_of
from tests.support.sockets import format_address, is_over, receive_exactly
from tests.support.target import Target
from tests.support.terminal import LEAVES, Terminal
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel

FAST = ("--interval", "100ms")
ADDRESSLESS = "server://127.0.0.1:0/127.0.0.1:0?tls=0"


@pytest.fixture(scope="module")
def tunnel() -> Iterator[Tunnel]:
    with contextlib.ExitStack() as stack:
        target, server = stack.enter_context(Target()), stack.enter_context(OurServer(env=WATCHED))
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=WATCHED))
        client.wait_until_connected()
        server.wait_for_client()
        yield Tunnel(server, client, target)


@pytest.fixture
def endpoint(tunnel: Tunnel) -> str:
    return format_address(metrics_of(tunnel.our_server))


def cells(output: str) -> list[dict[str, str]]:
    """The rows of a plain table, by title."""
    head, *rows = (re.split(r" {2,}", line.strip()) for line in output.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_once_prints_a_table_that_a_script_can_read(tunnel: Tunnel, endpoint: str) -> None:
    done = run("top", "--once", *FAST, endpoint)
    assert (done.code, done.errors) == (0, "")
    (row,) = cells(done.output)
    assert row["TUNNEL"] == f"server:{tunnel.our_server.tunnel_address[1]}"
    assert row["STATE"] == "ready"
    assert row["PEER"] == "127.0.0.1"
    assert row["SECURITY"] == "none"
    assert re.fullmatch(r"\d+/\d+", row["POOL"])
    assert row["UP/S"] == "0 B"
    assert "\x1b" not in done.output


def test_rates_are_those_between_two_looks(tunnel: Tunnel, endpoint: str) -> None:
    with tunnel.session() as (visitor, service):
        looking = subprocess.Popen(
            [str(PROGRAM), "top", "--once", "--interval", "1s", endpoint],
            env=scrubbed(),
            stdout=subprocess.PIPE,
            text=True,
        )
        while looking.poll() is None:
            visitor.sendall(b"x" * 1000)
            receive_exactly(service, 1000)
        output, _ = looking.communicate()
    (row,) = cells(output)
    assert row["TCP"] == "1"
    assert row["UP/S"].endswith("B")
    assert row["UP/S"] != "0 B"
    assert row["DOWN/S"] == "0 B"


def test_with_interval_0_one_look_has_no_rates(tunnel: Tunnel) -> None:
    done = call("top", "--once", "--interval", "0", f"http://{format_address(metrics_of(tunnel.our_client))}/metrics")
    (row,) = cells(done.output)
    assert row["PEER"] == format_address(tunnel.our_server.tunnel_address)
    assert row["RTT"] == "-"  # the server measures it
    assert row["UP/S"] == "-"


@pytest.mark.programs
def test_a_unix_socket_is_looked_at_by_its_path(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "m.sock"
    with Nodepass(ADDRESSLESS, env={**CALM, "METRICS_LISTEN": f"unix:{path}"}) as process:
        process.wait_for("server.listening")
        for text in (f"unix:{path}", str(path)):
            (row,) = cells(call("top", "--once", *FAST, text).output)
            assert (row["STATE"], row["PEER"]) == ("down", "-")


def test_without_a_terminal_tables_follow_each_other(endpoint: str) -> None:
    with subprocess.Popen(
        [str(PROGRAM), "top", *FAST, endpoint], env=scrubbed(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as looking:
        assert looking.stdout
        assert looking.stderr
        heads = 0
        while heads < 2:
            heads += b"tunnels ready" in looking.stdout.readline()
        looking.send_signal(signal.SIGINT)
        assert looking.wait(20) == 0
        assert looking.stderr.read() == b""


@pytest.mark.programs
def test_a_reader_that_leaves_ends_it_quietly(endpoint: str) -> None:
    with subprocess.Popen(
        [str(PROGRAM), "top", *FAST, endpoint], env=scrubbed(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as looking:
        assert looking.stdout
        assert looking.stderr
        looking.stdout.readline()
        looking.stdout.close()
        assert looking.stderr.read() == b""
        assert looking.wait(20) == 0


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for text in (f"127.0.0.1:{port}", str(tmp_path / "not.sock")):
        done = call("top", text)
        assert done.code == 1
        assert len(done.lines) == 1
        assert text in done.errors


class _Other(http.server.BaseHTTPRequestHandler):
    """Somebody else's metrics, and a page that is none."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        bodies = {"/metrics": b"# TYPE other counter\nother_total 1\n", "/page": b"<html>{}</html>\n"}
        self.wfile.write(bodies.get(self.path, b"\xff\xfe\x00"))

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Not on standard error."""


def test_somebody_else_there_is_one_line() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server.socket):
        for path in ("", "/page", "/noise"):
            done = call("top", "--once", f"127.0.0.1:{server.server_address[1]}{path}")
            assert done.code == 1
            assert len(done.lines) == 1
            assert "not an endpoint of nodepass" in done.errors
        server.shutdown()


@pytest.mark.programs
def test_what_is_not_installed_is_named_in_one_line(tmp_path: Path, endpoint: str) -> None:
    env = {"PYTHONPATH": str(tmp_path)}
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module named rich', name='rich')")
    with Terminal("top", endpoint, env=env) as terminal:
        assert terminal.wait() == 2
        terminal.wait_for("pip install rich, or use --plain")
    assert run("top", "--once", *FAST, endpoint, env=env).code == 0
    (tmp_path / "prometheus_client.py").write_text("raise ModuleNotFoundError('No module', name='prometheus_client')")
    done = run("top", "--once", endpoint, env=env)
    assert (done.code, len(done.lines)) == (2, 1)
    assert "pip install prometheus-client" in done.errors


def test_a_terminal_shows_tunnels_and_is_left_as_it_was(tunnel: Tunnel, endpoint: str) -> None:
    with Terminal("top", *FAST, endpoint) as terminal:
        terminal.wait_for(rf"server:{tunnel.our_server.tunnel_address[1]} +ready +127\.0\.0\.1")
        terminal.wait_for(r"UP\+DOWN")
        with tunnel.session() as (visitor, service):
            visitor.sendall(b"x" * 100_000)
            receive_exactly(service, 100_000)
            terminal.wait_for("█")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.wait() == 0
        assert LEAVES in terminal.raw
        assert "Traceback" not in terminal.raw
        assert "KeyboardInterrupt" not in terminal.raw
        assert terminal.is_as_before


@pytest.mark.programs
@pytest.mark.parametrize(
    "ending",
    ["q", "\x03", signal.SIGTERM],
    ids=["q", "Ctrl-C", "SIGTERM"],
)
def test_every_way_to_end_it_leaves_the_terminal_in_order(endpoint: str, ending: str | signal.Signals) -> None:
    with Terminal("top", *FAST, endpoint) as terminal:
        terminal.wait_for("tunnels ready")
        if isinstance(ending, str):
            terminal.press(ending)
        else:
            terminal.process.send_signal(ending)
        assert terminal.wait() == 0
        assert LEAVES in terminal.raw
        assert terminal.is_as_before


@pytest.mark.programs
def test_an_endpoint_that_goes_away_is_waited_for(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "m.sock"
    env = {**CALM, "METRICS_LISTEN": f"unix:{path}"}
    with Nodepass(ADDRESSLESS, env=env) as first:
        first.wait_for("server.listening")
        with Terminal("top", *FAST, str(path)) as terminal:
            terminal.wait_for("0 of 1 tunnels ready")
            first.kill()
            text = terminal.wait_for("retrying")
            assert str(path) in text
            terminal.forget()
            with Nodepass(ADDRESSLESS, env=env) as second:
                second.wait_for("server.listening")
                terminal.wait_for("q: quit")
                terminal.press("q")
                assert terminal.wait() == 0


@pytest.mark.programs
def test_any_size_of_terminal_will_do(endpoint: str) -> None:
    with Terminal("top", *FAST, endpoint, lines=24, columns=100) as terminal:
        terminal.wait_for("tunnels ready")
        for lines, columns in ((3, 20), (1, 1), (5, 40), (50, 400)):
            terminal.resize(lines, columns)
            terminal.forget()
            terminal.wait_for(r"\S" if columns < 20 else "nodepass")  # it draws on
        terminal.press("q")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.raw


def test_what_an_endpoint_says_cannot_command_the_terminal() -> None:
    body = (
        b'# TYPE nodepass_build_info gauge\nnodepass_build_info{version="\x1b[2J"} 1\n'
        b'# TYPE nodepass_ready gauge\nnodepass_ready{tunnel="[red]\x1b]0;x\x07"} 1\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                is_over(sock)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        done = call("top", "--once", "--interval", "0", f"127.0.0.1:{port}")
        thread.join()
    assert done.code == 0
    assert "[red]?]0;x?" in done.output
    assert "\x1b" not in done.output


NUMBERS = ["1.7e308", "-1.7e308", "+Inf", "-Inf", "NaN", "1e18"]


@pytest.mark.parametrize("first", NUMBERS)
def test_no_number_of_an_endpoint_ends_it(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """Sums and rates of the largest ones would be infinite."""
    for second in NUMBERS:
        show(monkeypatch, (first, second))


def show(monkeypatch: pytest.MonkeyPatch, numbers: tuple[str, str]) -> None:
    """Show an endpoint whose families have one of these numbers and then the other."""
    watch = Watch()
    names = (
        'bytes_total{direction="up",',
        'sessions_total{outcome="reset",',
        "round_trip_seconds{",
        "pool_idle_connections{",
    )
    for number in numbers:
        body = f"nodepass_build_info 1\nprocess_cpu_seconds_total {number}\n"
        body += "".join(f'nodepass_{name}tunnel="a",n="{each}"}} {number}\n' for name in names for each in range(3))
        monkeypatch.setattr(Source, "fetch", lambda _, body=body: body)
        scrape = take(Source("", 0))
        scrape.taken = 0.0
        watch.add(scrape)
    assert plain(watch.rows())
    assert watch.headline()
    assert sparkline(watch.history("a"), 10) is not None


def test_an_answer_of_more_than_4_mib_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that the library calls
            with contextlib.suppress(ConnectionError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(top_scrape.LARGEST + 1))

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    monkeypatch.setattr(top_scrape, "LARGEST", 1 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Large) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(NoAnswer, match="an answer of more than 1 MiB"):
            take(Source("127.0.0.1", server.server_address[1]))
        server.shutdown()


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_an_answer_that_comes_in_drops_is_given_up(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    monkeypatch.setattr(top_scrape, "TIMEOUT", 0.5)
    left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(head)
                while not left.wait(0.05):  # far sooner than a read would be given up
                    sock.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            with pytest.raises(top_scrape.NoAnswer, match=r"no complete answer within 0\.5 s"):
                top_scrape.Source("127.0.0.1", listener.getsockname()[1]).fetch()
        finally:
            left.set()
            thread.join()


def test_it_needs_nothing_of_the_daemon() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "import nodepass.tools.top, sys; print(*sys.modules)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not {"gevent", "OpenSSL", "rich", "prometheus_client"} & set(shown)
