"""SIGUSR2: a new process takes over, and no session or visitor is lost; else the old one goes on, and says why."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.handover import end, hand_over, is_running
from tests.support.load import load
from tests.support.process import REPOSITORY, Environment, Nodepass
from tests.support.scrape import get
from tests.support.sockets import PATIENCE, Address, connect, datagram_socket, is_over, receive_exactly, until
from tests.support.systemd import NotifySocket
from tests.support.target import Echo, Target
from tests.support.tunnel import CALM, OurClient, OurServer, Pair, Tunnel, assert_connected, open_tunnel

OURS = Pair("ours", "ours", 0)
VISITORS_AT_ONCE = 4
KEY = "0c7e4c0a1c4f4f2fb6d2a1b3c5d7e9f00c7e4c0a1c4f4f2fb6d2a1b3c5d7e9f0"


@pytest.fixture
def tunnel(authority: Authority) -> Iterator[Tunnel]:
    with open_tunnel(OURS, authority) as tunnel:
        yield tunnel


def end_of(tunnel: Tunnel, side: str) -> Nodepass:
    return tunnel.our_server if side == "server" else tunnel.our_client


@pytest.mark.parametrize("side", ["server", pytest.param("client", marks=pytest.mark.programs)])
def test_sessions_go_on_in_the_old_process_and_begin_in_the_new_one(
    tunnel: Tunnel, stack: contextlib.ExitStack, side: str
) -> None:
    run = end_of(tunnel, side)
    with tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        new = hand_over(stack, run)
        assert_connected(visitor, service)
        tunnel.assert_works()
        assert run.is_running
    assert run.process.wait(PATIENCE) == 0
    assert is_running(new)
    tunnel.assert_works()
    end(new, signal.SIGTERM)


WAYS: dict[str, tuple[int, str, Environment]] = {
    "two ports": (0, "", {}),
    "one port, several clients": (0, "", {"DATA_PORT": "tunnel", "CLIENTS": "2"}),
    "TLS": (1, "", {}),
    "TLS, a key and a name": (2, "name=web", {"TUNNEL_KEY": KEY}),
}


@pytest.mark.parametrize(
    "way", [next(iter(WAYS)), *(pytest.param(way, marks=pytest.mark.programs) for way in [*WAYS][1:])]
)
def test_no_visitor_notices_that_either_end_hands_over(
    stack: contextlib.ExitStack, authority: Authority, way: str
) -> None:
    tls, query, env = WAYS[way]
    echo = stack.enter_context(Echo())
    own = {**CALM, **env, "SSL_CERT_FILE": str(authority.crt)}
    server = stack.enter_context(OurServer(tls, authority.local, query=query, env=own, log="info"))
    client_env = {name: text for name, text in own.items() if name not in ("DATA_PORT", "CLIENTS")}
    client = OurClient(server.tunnel_address, echo.address, query=query, env=client_env, log="info")
    stack.enter_context(client).wait_until_connected()
    processes: dict[str, int | None] = {"server": None, "client": None}
    with load(lambda: ask(server.visitor_address), VISITORS_AT_ONCE) as found:
        for side in ("server", "client", "client", "server"):
            run: Nodepass = server if side == "server" else client
            processes[side] = hand_over(stack, run, processes[side])
            served = len(found.requests)
            until(lambda served=served: len(found.requests) > served + VISITORS_AT_ONCE)  # type: ignore[misc]
    assert found.failed() == []
    assert not server.find("launch.unknown") + client.find("launch.unknown") + server.find("visitor.unserved")


def ask(address: Address) -> str:
    """What a visitor hears who says hello."""
    with connect(address) as visitor:
        visitor.sendall(b"hello")
        return receive_exactly(visitor, 5).decode()


@pytest.mark.programs
def test_a_process_that_cannot_start_again_goes_on_and_says_why(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    files = authority.issue()
    server = stack.enter_context(OurServer(2, files))
    good = Path(files.key).read_bytes()
    Path(files.key).write_bytes(b"no key")
    server.send(signal.SIGUSR2)
    assert files.key.name in server.wait_for("process.handover_failed")["error"]
    target = stack.enter_context(Target())
    client = OurClient(server.tunnel_address, target.address, env={**CALM, "SSL_CERT_FILE": str(authority.crt)})
    stack.enter_context(client).wait_until_connected()
    Tunnel(server, client, target).assert_works()
    Path(files.key).write_bytes(good)
    hand_over(stack, server)
    Tunnel(server, client, target).assert_works()


@pytest.mark.programs
def test_a_client_whose_new_process_is_not_accepted_keeps_its_place(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY)
    env = {**CALM, "HANDSHAKE_TIMEOUT": "1s"}
    server = stack.enter_context(OurServer(1, env={**env, "TUNNEL_KEY": KEY}))
    target, place = stack.enter_context(Target()), tmp_path / "metrics"
    own = {"TUNNEL_KEY_FILE": str(key_file), "METRICS_LISTEN": f"unix:{place}"}
    client = OurClient(server.tunnel_address, target.address, query="", env={**env, **own})
    stack.enter_context(client).wait_until_connected()
    until(lambda: get(place, "/readyz").status == 200)
    key_file.write_text(KEY[::-1])
    client.send(signal.SIGUSR2)
    # Meanwhile the new process, which has no server, does not answer.
    statuses = {200}
    until(lambda: statuses.add(get(place, "/readyz").status) or client.find("process.handover_failed"))
    assert statuses == {200}
    assert "no handshake" in client.wait_for("process.handover_failed")["error"]
    Tunnel(server, client, target).assert_works()
    for _ in range(20):  # more than the pool had: it is filled again
        Tunnel(server, client, target).assert_works()


def test_sigterm_shortens_what_the_old_process_has(
    stack: contextlib.ExitStack, authority: Authority, tmp_path: Path
) -> None:
    env = {**CALM, "SHUTDOWN_TIMEOUT": "100ms", "STATE_DIRECTORY": str(tmp_path), "TRAFFIC_LIMIT": "1MB/month"}
    tunnel = stack.enter_context(open_tunnel(OURS, authority, server_env=env))
    server = tunnel.our_server
    visitor, service = stack.enter_context(tunnel.session())
    assert_connected(visitor, service)
    new = hand_over(stack, server)
    mark = server.mark()
    server.send(signal.SIGUSR2)
    assert str(new) in server.wait_for("process.handover_refused", after=mark)["error"]
    move(visitor, service, 20_000)
    server.send(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    assert is_over(visitor)
    until(lambda: any(count_traffic(file) > 20_000 for file in tmp_path.glob("traffic-*.json")))
    tunnel.assert_works()


@pytest.mark.programs
def test_drain_timeout_cuts_what_is_left(stack: contextlib.ExitStack, authority: Authority) -> None:
    tunnel = stack.enter_context(open_tunnel(OURS, authority, client_env={**CALM, "DRAIN_TIMEOUT": "100ms"}))
    visitor, service = stack.enter_context(tunnel.session())
    assert_connected(visitor, service)
    hand_over(stack, tunnel.our_client)
    assert tunnel.our_client.wait_for("process.cut")["sessions"] == 1
    assert is_over(visitor)
    tunnel.assert_works()


def test_a_running_flow_keeps_its_source_at_the_client_and_goes_on_as_a_new_one_at_the_server(
    tunnel: Tunnel, stack: contextlib.ExitStack
) -> None:
    with datagram_socket() as visitor:
        visitor.connect(tunnel.visitor_address)

        def exchange() -> Address:
            visitor.send(b"question")
            asked, source = tunnel.target.udp.recvfrom(100)
            assert asked == b"question"
            tunnel.target.udp.sendto(b"answer", source)
            assert visitor.recv(100) == b"answer"
            return source

        first = exchange()
        hand_over(stack, tunnel.our_client)
        assert exchange() == first
        hand_over(stack, tunnel.our_server)
        tunnel.target.udp.sendto(b"late answer", first)
        assert visitor.recv(100) == b"late answer"
        second = exchange()
        assert second != first
        assert exchange() == second


@pytest.mark.programs
def test_listeners_at_paths_and_the_metrics_pass_to_the_new_process(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    place, target_path = tmp_path / "metrics", tmp_path / "target"
    url = f"server://127.0.0.1:0/unix:{target_path}?tls=0&udp=off"
    server = Nodepass(url, env={**CALM, "METRICS_LISTEN": f"unix:{place}"})
    stack.enter_context(server)
    tunnel = server.wait_for("server.listening")["tunnel_address"]
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(("127.0.0.1", int(tunnel.rpartition(":")[2])), target.address))
    client.wait_until_connected()
    identity = place.stat().st_ino, target_path.stat().st_ino
    hand_over(stack, server)
    assert server.process.wait(PATIENCE) == 0
    assert (place.stat().st_ino, target_path.stat().st_ino) == identity
    until(lambda: get(place, "/readyz").status == 200)
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(str(target_path))
        with target.accept() as service:
            assert_connected(visitor, service)


def test_traffic_is_counted_in_both_processes(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    file, env = tmp_path / "traffic-server-web.json", {**CALM, "STATE_DIRECTORY": str(tmp_path)}
    server = stack.enter_context(OurServer(query="name=web&traffic_limit=100kB/month", env=env))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0&name=web"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    with tunnel.session() as (visitor, service):
        move(visitor, service, 10_000)
        hand_over(stack, server)
        move(visitor, service, 20_000)  # by the old process
        with tunnel.session() as (other, other_service):
            move(other, other_service, 40_000)  # by the new one
    assert server.process.wait(PATIENCE) == 0
    until(lambda: count_traffic(file) == 70_000)


@pytest.mark.programs
def test_of_several_handovers_only_the_last_process_listens_and_counts_the_traffic_of_all(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    file, env = tmp_path / "traffic-server-web.json", {**CALM, "STATE_DIRECTORY": str(tmp_path)}
    server = stack.enter_context(OurServer(query="name=web&udp=off&traffic_limit=100kB/month", env=env))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0&name=web"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    visitor, service = stack.enter_context(tunnel.session())
    move(visitor, service, 10_000)
    second = hand_over(stack, server)
    third = hand_over(stack, server, second)
    move(visitor, service, 20_000)  # by the first process, when the second one has no sessions
    visitor.close()
    service.close()
    assert server.process.wait(PATIENCE) == 0
    until(lambda: count_traffic(file) == 30_000)
    until(lambda: not is_running(second))
    visitor, service = stack.enter_context(tunnel.session())
    fourth = hand_over(stack, server, third)
    end(fourth)
    assert is_running(third)  # with the session
    for address in (server.tunnel_address, server.visitor_address):
        with pytest.raises(ConnectionRefusedError):
            connect(address)


def count_traffic(file: Path) -> int:
    """The bytes in a state file of TRAFFIC_LIMIT."""
    return sum(json.loads(file.read_text())["bytes"].values()) if file.exists() else 0


def move(source: socket.socket, sink: socket.socket, size: int) -> None:
    """Bytes through a session, until they have arrived."""
    source.sendall(bytes(size))
    receive_exactly(sink, size)


@pytest.mark.parametrize("pair", [Pair("ours", "v1", 0), Pair("v1", "ours", 0)], ids=str)
@pytest.mark.programs
def test_a_peer_of_wire_v1_comes_back_to_the_new_process(
    stack: contextlib.ExitStack, authority: Authority, pair: Pair
) -> None:
    tunnel = stack.enter_context(open_tunnel(pair, authority))
    run: Nodepass = tunnel.our_server if pair.server == "ours" else tunnel.our_client
    with tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        hand_over(stack, run)
        assert_connected(visitor, service)
    tunnel.assert_works()


def test_systemd_is_told_the_new_main_process(stack: contextlib.ExitStack) -> None:
    notified = stack.enter_context(NotifySocket())
    server = stack.enter_context(
        OurServer(env={**CALM, "NOTIFY_SOCKET": notified.address, "WATCHDOG_USEC": "60000000", "START_TIMEOUT": "1m"})
    )
    notified.wait_for("READY=1")
    notified.forget()
    new = hand_over(stack, server)
    notified.wait_for(f"MAINPID={new}")
    notified.wait_for("READY=1")
    notified.wait_for("WATCHDOG=1")
    assert server.process.wait(PATIENCE) == 0
    assert "STOPPING=1" not in notified.heard
    assert not any(each.startswith("EXTEND_TIMEOUT_USEC") for each in notified.heard)  # START_TIMEOUT has had its time


@pytest.mark.programs
@pytest.mark.parametrize("side", ["server", "client"])
def test_the_old_process_needs_no_file_of_its_program(
    stack: contextlib.ExitStack, authority: Authority, tmp_path: Path, side: str
) -> None:
    """A package that raises takes the place of the installed one: no new process starts then, and the old one works."""
    package, program = copy_program(tmp_path)
    env = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    target = stack.enter_context(Target())
    server = OurServer(1, env=env)
    server.program = program if side == "server" else server.program
    stack.enter_context(server)
    client = OurClient(server.tunnel_address, target.address, query="", env=env)
    client.program = program if side == "client" else client.program
    stack.enter_context(client).wait_until_connected()
    tunnel = Tunnel(server, client, target)
    run = end_of(tunnel, side)
    visitor, service = stack.enter_context(tunnel.session())
    replace_by_one_that_raises(package)
    run.send(signal.SIGUSR2)
    run.wait_for("process.handover_failed")
    run.send(signal.SIGHUP)
    run.wait_for("process.reloading")
    run.send(signal.SIGUSR1)
    run.wait_for("process.bugs")
    tunnel.assert_works()
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
    put_back(package)
    hand_over(stack, run)
    replace_by_one_that_raises(package)
    assert_connected(visitor, service)
    run.send(signal.SIGTERM)
    visitor.close()
    assert run.process.wait(PATIENCE) == 0
    assert not run.find_crashes()


def copy_program(root: Path) -> tuple[Path, tuple[str, ...]]:
    """A package of one's own, and the command that runs it."""
    for name in ("bin", "nodepass"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    return root / "nodepass", (str(root / "bin" / "nodepass"),)


def replace_by_one_that_raises(package: Path) -> None:
    package.rename(package.with_suffix(".good"))
    package.mkdir()
    for name in ("__init__", "__main__"):
        (package / f"{name}.py").write_text("raise SystemExit('this program is broken')\n")


def put_back(package: Path) -> None:
    shutil.rmtree(package)
    package.with_suffix(".good").rename(package)
