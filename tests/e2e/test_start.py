"""Starting: addresses of every form, ports, several URLs in one process, and ports that are taken."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.command import call
from tests.support.process import REPOSITORY, Nodepass, run, scrubbed
from tests.support.sockets import (
    Address,
    connect,
    datagram_socket,
    format_address,
    free_port,
    has_ipv6,
)
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, assert_connected
from tests.support.v1_client import V1Client

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")

SETTINGS = (
    "SEMAPHORE_LIMIT",
    "MIN_POOL_CAPACITY",
    "MAX_POOL_CAPACITY",
    "UDP_DATA_BUF_SIZE",
    "UDP_READ_TIMEOUT",
    "REPORT_INTERVAL",
    "RELOAD_INTERVAL",
    "SERVICE_COOLDOWN",
    "SHUTDOWN_TIMEOUT",
    "HANDSHAKE_TIMEOUT",
    "POOL_GET_TIMEOUT",
    "DATA_PORT",
)


def test_help_names_every_setting_its_flag_and_its_default() -> None:
    done = call("--help")
    assert done.code == 0
    for name in SETTINGS:
        assert name in done.output
        assert "--" + name.lower().replace("_", "-") in done.output
    for default in ("1024", "16", "8192", "1h", "5s"):
        assert default in done.output


def test_urls_may_come_from_the_environment() -> None:
    urls = "server://127.0.0.1:0/127.0.0.1:0?tls=0 server://127.0.0.1:0/127.0.0.1:0?tls=1"
    with Nodepass(env={"NODEPASS_URL": urls}) as both:
        both.wait_for("server.listening", tls=0)
        both.wait_for("server.listening", tls=1)


def test_a_url_on_the_command_line_wins_over_the_environment() -> None:
    done = call("client://nowhere", env={"NODEPASS_URL": "server://127.0.0.1:0/127.0.0.1:0"})
    assert done.code == 2
    assert "nowhere" in done.errors


def test_the_program_runs_through_a_symbolic_link_and_tells_its_version(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(REPOSITORY / "bin" / "nodepass")
    second.symlink_to(first)
    command = [str(second), "--version"]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, check=True, cwd=tmp_path)
    assert re.fullmatch(rb"nodepass \d+\.\d+\S*\n", done.stdout)


@pytest.mark.parametrize("taken", ["tunnel", pytest.param("target", marks=pytest.mark.programs)])
def test_a_port_in_use_ends_it_with_one_line(stack: contextlib.ExitStack, taken: str) -> None:
    holder = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    busy = format_address(holder.getsockname())
    tunnel, target = (busy, "127.0.0.1:0") if taken == "tunnel" else ("127.0.0.1:0", busy)
    done = run(f"server://{tunnel}/{target}?tls=0")
    assert_unbindable(done.code, done.errors, busy, "in use")


@pytest.mark.programs
def test_a_udp_port_in_use_ends_it_with_one_line(stack: contextlib.ExitStack) -> None:
    holder = stack.enter_context(datagram_socket())
    busy = format_address(holder.getsockname())
    done = run(f"server://127.0.0.1:0/{busy}?tls=0")
    assert_unbindable(done.code, done.errors, busy, "in use")


@pytest.mark.programs
def test_an_address_of_another_machine_ends_it_with_one_line() -> None:
    done = run("server://192.0.2.1:10101/127.0.0.1:0?tls=0")
    assert_unbindable(done.code, done.errors, "192.0.2.1:10101", "assign")


def assert_unbindable(code: int, errors: str, address: str, reason: str) -> None:
    assert code == 1
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if address in line]
    assert len(lines) == 1, errors
    assert reason in lines[0]


def assert_tunnel_works(stack: contextlib.ExitStack, server: OurServer, host: str) -> None:
    """Lead a client of ours to the server at the host, and visitors and the target as well."""
    target = stack.enter_context(Target(host))
    client = stack.enter_context(OurClient((host, server.tunnel_address[1]), target.address))
    client.wait_until_connected()
    visit(target, (host, server.visitor_address[1]))
    with datagram_socket(host) as visitor:
        visitor.sendto(b"question", (host, server.visitor_address[1]))
        question, asker = target.udp.recvfrom(100)
        target.udp.sendto(question + b" answered", asker)
        assert visitor.recv(100) == b"question answered"
    assert client.stop() == 0


def visit(target: Target, address: Address) -> None:
    with connect(address) as visitor, target.accept() as service:
        assert_connected(visitor, service)


@needs_ipv6
def test_a_tunnel_over_ipv6(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(1, tunnel="[::1]:0", target="[::1]:0"))
    assert_tunnel_works(stack, server, "::1")


@pytest.mark.programs
@needs_ipv6
def test_an_address_without_a_host_is_every_address_of_both_families(
    stack: contextlib.ExitStack,
) -> None:
    first = free_port(2)
    server = stack.enter_context(OurServer(tunnel=f":{first}", target=f":{first + 1}"))
    for host in ("127.0.0.1", "::1"):
        mark = server.mark()
        assert_tunnel_works(stack, server, host)
        server.wait_for("client.disconnected", after=mark)


@pytest.mark.programs
def test_the_target_may_be_a_name(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(tunnel="localhost:0", target="localhost:0"))
    target = stack.enter_context(Target())
    address = ("localhost", target.address[1])
    client = stack.enter_context(OurClient(("localhost", server.tunnel_address[1]), address))
    client.wait_until_connected()
    visit(target, ("localhost", server.visitor_address[1]))


def test_data_port_fixes_the_data_port_and_its_flag_wins_over_its_variable(stack: contextlib.ExitStack) -> None:
    port, other = free_port(), free_port()
    server = stack.enter_context(OurServer(env={"DATA_PORT": str(other)}, flags=("--data-port", str(port))))
    assert server.data_address[1] == port
    client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
    client.connect()
    assert client.data_address[1] == port


@pytest.mark.programs
def test_data_port_as_a_range_takes_the_first_free_port(stack: contextlib.ExitStack) -> None:
    first = free_port(3)
    stack.enter_context(socket.create_server(("127.0.0.1", first)))
    server = stack.enter_context(OurServer(flags=("--data-port", f"{first}-{first + 2}")))
    assert server.data_address[1] in (first + 1, first + 2)


@pytest.mark.programs
def test_a_data_port_in_use_ends_it_with_one_line(stack: contextlib.ExitStack) -> None:
    holder = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    port = holder.getsockname()[1]
    done = run("server://127.0.0.1:0/127.0.0.1:0?tls=0", env={"DATA_PORT": str(port)})
    assert done.code == 1
    assert "Traceback" not in done.errors
    assert len([line for line in done.lines if str(port) in line]) == 1


def test_a_whole_tunnel_runs_in_one_process(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    tunnel, visitors = ("127.0.0.1", free_port()), ("127.0.0.1", free_port())
    both = stack.enter_context(
        Nodepass(
            f"server://{format_address(tunnel)}/{format_address(visitors)}?tls=1",
            f"client://{format_address(tunnel)}/{format_address(target.address)}",
            env=CALM,
        )
    )
    both.wait_for("server.connected")
    visit(target, visitors)
    assert both.stop() == 0


@pytest.mark.programs
def test_a_url_whose_server_is_absent_does_not_harm_the_other(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer())
    absent = f"client://127.0.0.1:{free_port()}/127.0.0.1:9"
    present = "client://{}/{}".format(*map(format_address, (server.tunnel_address, target.address)))
    both = stack.enter_context(Nodepass(absent, present, env=CALM))
    both.wait_for("server.unreachable")
    both.wait_for("server.connected")
    for _ in range(3):
        visit(target, server.visitor_address)
    assert both.stop() == 0
