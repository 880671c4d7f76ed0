"""Several targets, and Unix sockets on both ends, with the real program."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import call
from tests.support.process import Nodepass, run
from tests.support.scrape import get, metrics_of, scrape
from tests.support.sockets import connect, format_address, free_port, receive_all, until
from tests.support.tunnel import CALM, OurServer

ENV = {**CALM, "METRICS_LISTEN": "127.0.0.1:0"}


class Service:
    """Says its name to each connection; one that speaks HTTP waits for a request before."""

    def __init__(self, name: bytes, sock: socket.socket) -> None:
        self.name = name
        self._sock = sock
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._sock.accept()
                with peer, contextlib.suppress(OSError):  # a check may have left
                    if self.name.startswith(b"HTTP"):
                        peer.recv(1000)
                    peer.sendall(self.name)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join()


def tcp_service(stack: contextlib.ExitStack, name: bytes, port: int = 0) -> tuple[Service, str]:
    sock = socket.create_server(("127.0.0.1", port))
    service = Service(name, sock)
    text = format_address(sock.getsockname())
    stack.callback(service.close)
    return service, text


def unix_service(stack: contextlib.ExitStack, name: bytes, path: Path) -> tuple[Service, str]:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    service = Service(name, sock)
    stack.callback(service.close)
    return service, f"unix:{path}"


def visit(server: OurServer) -> bytes:
    with connect(server.visitor_address) as visitor:
        return receive_all(visitor)


def is_ready(end: Nodepass) -> bool:
    return get(metrics_of(end), "/readyz").status == 200


def test_sessions_pass_over_targets_that_are_gone_and_return_to_them(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """One of TCP and one Unix socket, and a target that has never been there; no visitor is lost but where all are."""
    first, place = tcp_service(stack, b"tcp")
    second, path = unix_service(stack, b"unix", tmp_path / "app.sock")
    never = f"127.0.0.1:{free_port()}"
    access = tmp_path / "access.log"
    server = stack.enter_context(OurServer(env=ENV))
    url = f"client://{format_address(server.tunnel_address)}/{never},{place},{path}"
    client = stack.enter_context(Nodepass(f"{url}?log=debug&spread=round&access_log={access}", env=ENV))
    server.wait_for_client()
    assert {visit(server) for _ in range(6)} == {b"tcp", b"unix"}
    client.wait_for("target.down", target=never, reason="unreachable", error=re.compile("Connection refused"))
    first.close()
    assert [visit(server) for _ in range(5)] == [b"unix"] * 5
    client.wait_for("target.down", target=place)
    states = {
        sample.labels["target"]: sample.value
        for sample in scrape(metrics_of(client))
        if sample.name == "nodepass_target_up"
    }
    assert states == {never: 0, place: 0, path: 1}
    assert is_ready(client)
    second.close()
    with pytest.raises(ConnectionResetError), connect(server.visitor_address) as visitor:
        visitor.recv(1)
    client.wait_for("target.down", target=path)
    server.wait_for("client.target_unreachable")
    with pytest.raises(ConnectionResetError), connect(server.visitor_address) as visitor:
        visitor.recv(1)
    server.wait_for("visitor.unserved", reason="target_down")
    assert get(metrics_of(client), "/readyz").body.rstrip().endswith("no target answers")
    unix_service(stack, b"again", tmp_path / "app.sock")
    server.wait_for("client.target_reachable")
    client.wait_for("target.up", target=path)
    assert visit(server) == b"again"
    until(lambda: is_ready(client) and is_ready(server))
    served = [json.loads(line) for line in access.read_text().splitlines()]
    completed = {(each["target"], each["dial"]) for each in served if each["outcome"] == "completed"}
    assert completed == {(place, "ok"), (path, "ok")}


def test_a_check_by_http_takes_a_target_out_before_a_visitor_finds_out(stack: contextlib.ExitStack) -> None:
    """Heartbeats are too rare to carry the news."""
    env = {**ENV, "REPORT_INTERVAL": "60s", "HEALTH_INTERVAL": "50ms"}
    _, place = tcp_service(stack, b"HTTP/1.1 503 Busy\r\n\r\n")
    server = stack.enter_context(OurServer(env=env))
    url = f"client://{format_address(server.tunnel_address)}/{place}?log=debug&health_check=http:/health"
    client = stack.enter_context(Nodepass(url, env=env))
    said = client.wait_for("target.down", target=place, reason="protocol")
    assert said["error"] == "HTTP status 503"
    server.wait_for("client.target_unreachable")
    assert not is_ready(server)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[Nodepass, Path]]:
    """A server that listens on a Unix socket, beside a stale one of an earlier run."""
    path = tmp_path / "visit,ors.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    place = str(path).replace(",", "%2C")
    url = f"server://127.0.0.1:0/unix:{place}?log=debug&udp=off&unix_mode=0600&access_log={tmp_path}/access.log&tls=0"
    with Nodepass(url, env=CALM) as server:
        yield server, path


def test_a_server_listens_on_a_unix_socket_and_removes_it(
    stack: contextlib.ExitStack, listening: tuple[Nodepass, Path], tmp_path: Path
) -> None:
    server, path = listening
    said = server.wait_for("server.listening")
    assert said["target_address"] == f"unix:{path}".replace(",", "%2C")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    _, place = unix_service(stack, b"hello", tmp_path / "app.sock")
    with Nodepass(f"client://{said['tunnel_address']}/{place}?udp=off", env=CALM):
        server.wait_for("client.connected")
        with socket.socket(socket.AF_UNIX) as visitor:
            visitor.settimeout(10)
            visitor.connect(str(path))
            assert receive_all(visitor) == b"hello"
        until((tmp_path / "access.log").read_text)
        visit = json.loads((tmp_path / "access.log").read_text())
        assert (visit["visitor"], visit["local"]) == (None, said["target_address"])
        checked = run("--check", f"server://127.0.0.1:0/{visit['local']}?udp=off&tls=0")
        assert "a process listens there" in checked.output
    server.stop()
    assert not path.exists()


@pytest.mark.programs
def test_a_check_tries_each_target(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    server = stack.enter_context(OurServer(env=CALM))
    _, good = tcp_service(stack, b"HTTP/1.1 200 OK\r\n\r\n")
    _, bad = unix_service(stack, b"HTTP/1.1 404 Not Found\r\n\r\n", tmp_path / "app.sock")
    gone = f"127.0.0.1:{free_port()}"
    url = f"client://{format_address(server.tunnel_address)}/{good},{bad},{gone}?health_check=http:/&tls=0"
    out = run("--check", url).output
    assert f"target address {good},{bad},{gone}" in out
    assert f"target {good}: reached, HEALTH_CHECK=http:/ has succeeded" in out
    assert f"target {bad}: reached, but HEALTH_CHECK=http:/ has failed: HTTP status 404" in out
    assert f"target {gone}: cannot be reached over TCP" in out


def test_a_unix_socket_with_udp_on_is_bad_input(tmp_path: Path) -> None:
    for role in ("server", "client"):
        done = call(f"{role}://127.0.0.1:1/unix:{tmp_path}/app.sock")
        assert done.code == 2
        assert "a Unix socket carries no datagrams; allowed: udp=off" in done.errors
