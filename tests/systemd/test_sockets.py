"""Sockets that systemd, played by the test, passes: which address they are taken for, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
from collections.abc import Sequence

import pytest

from tests.support.process import run
from tests.support.sockets import connect, datagram_socket, format_address, free_port, has_ipv6
from tests.support.systemd import Activated, NamedSocket, NotifySocket
from tests.support.target import Target, bind_pair
from tests.support.tunnel import BRISK, CALM, OurClient, assert_connected, listening

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")

UNIT = "nodepass@web.socket"
"""The name that systemd gives where the unit gives none."""


def listener(stack: contextlib.ExitStack, host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A TCP listener as systemd opens it; without a host on all addresses, IPv4 and IPv6."""
    family = socket.AF_INET if "." in host else socket.AF_INET6
    opened = socket.create_server((host, port), family=family, dualstack_ipv6=not host)
    return stack.enter_context(opened)


def receiver(stack: contextlib.ExitStack) -> socket.socket:
    """A UDP socket as systemd opens it."""
    opened = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    opened.bind(("127.0.0.1", 0))
    return opened


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


class Ports:
    """A tunnel socket and a target's two."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.tunnel = listener(stack)
        self.target, self.datagrams = (stack.enter_context(each) for each in bind_pair("127.0.0.1"))

    def named(self, tunnel: str = UNIT, target: str = UNIT) -> list[NamedSocket]:
        return [(tunnel, self.tunnel), (target, self.target), (target, self.datagrams)]

    @property
    def url(self) -> str:
        return f"server://127.0.0.1:{port_of(self.tunnel)}/127.0.0.1:{port_of(self.target)}?tls=0&log=debug"


def start(stack: contextlib.ExitStack, sockets: Sequence[NamedSocket], *urls: str, **env: str) -> Activated:
    return stack.enter_context(Activated(sockets, *urls, env={**CALM, **env}))


def complain(sockets: Sequence[NamedSocket], *urls: str, **env: str) -> tuple[int, str]:
    """How a run ends that is refused: its status and its one line."""
    with Activated(sockets, *urls, env={**CALM, **env}) as server:
        code = server.wait()
        return code, server.lines[-1]


@pytest.mark.parametrize(
    "names",
    [pytest.param((UNIT, UNIT), marks=pytest.mark.programs), ("tunnel", "target")],
    ids=["by-address", "by-name"],
)
def test_visitors_who_came_before_the_start_are_served_by_tcp_and_udp(
    stack: contextlib.ExitStack, names: tuple[str, str]
) -> None:
    ports, target = Ports(stack), stack.enter_context(Target())
    visitor = stack.enter_context(connect(ports.target.getsockname()))
    asking = stack.enter_context(datagram_socket())
    asking.sendto(b"early", ports.datagrams.getsockname())
    client = stack.enter_context(OurClient(ports.tunnel.getsockname(), target.address))
    start(stack, ports.named(*names), ports.url)
    client.wait_until_connected()
    assert_connected(visitor, stack.enter_context(target.accept()))
    asked, flow = target.udp.recvfrom(100)
    assert asked == b"early"
    target.udp.sendto(b"answer", flow)
    assert asking.recv(100) == b"answer"


@pytest.mark.programs
def test_a_restart_leaves_the_sockets_open_and_serves_who_came_meanwhile(stack: contextlib.ExitStack) -> None:
    ports, target = Ports(stack), stack.enter_context(Target())
    client = stack.enter_context(OurClient(ports.tunnel.getsockname(), target.address))
    first = start(stack, ports.named(), ports.url)
    client.wait_until_connected()
    assert first.stop() == 0
    visitor = stack.enter_context(connect(ports.target.getsockname()))
    start(stack, ports.named(), ports.url)
    assert_connected(visitor, stack.enter_context(target.accept()))


@pytest.mark.programs
def test_a_name_gives_port_0_a_meaning(stack: contextlib.ExitStack) -> None:
    ports = Ports(stack)
    data = listener(stack)
    named = [("data", data), *ports.named("tunnel", "target")]
    server = start(stack, named, "server://:0/127.0.0.1:0?tls=0")
    assert [port for _, port in listening(server)] == [port_of(each) for each in (ports.tunnel, data, ports.target)]


@pytest.mark.programs
def test_a_data_port_of_a_range_is_the_one_that_was_passed(stack: contextlib.ExitStack) -> None:
    ports, first = Ports(stack), free_port(3)
    data = listener(stack, port=first + 2)
    server = start(stack, [*ports.named(), (UNIT, data)], ports.url, DATA_PORT=f"{first}-{first + 2}")
    assert listening(server)[1][1] == first + 2


def test_several_urls_each_take_their_own_and_what_is_not_passed_is_opened_all_the_same(
    stack: contextlib.ExitStack,
) -> None:
    one, two, half = Ports(stack), Ports(stack), Ports(stack)
    opened = f"127.0.0.1:{free_port()}"
    target = format_address(half.target.getsockname())
    passed = [*two.named(), *half.named()[1:], *one.named()]
    server = start(stack, passed, one.url, two.url, f"server://{opened}/{target}?tls=0")
    for ports in (one, two):
        where = [format_address(each.getsockname()) for each in (ports.tunnel, ports.target)]
        server.wait_for("server.listening", tunnel_address=where[0], target_address=where[1])
    server.wait_for("server.listening", tunnel_address=opened, target_address=target)


@pytest.mark.programs
@needs_ipv6
def test_a_url_without_a_host_takes_the_addresses_of_the_socket_unit(stack: contextlib.ExitStack) -> None:
    port = free_port()
    both = [(UNIT, listener(stack, "127.0.0.1", port)), (UNIT, listener(stack, "::1", port))]
    server = start(stack, both, f"server://:{port}/127.0.0.1:0?tls=0")
    addresses = server.wait_for("server.listening")["tunnel_address"]
    assert f"127.0.0.1:{port}" in addresses
    assert f"[::1]:{port}" in addresses


@pytest.mark.programs
@needs_ipv6
def test_a_socket_of_all_addresses_is_not_for_a_url_that_names_one(stack: contextlib.ExitStack) -> None:
    port = free_port()
    sockets = [(UNIT, listener(stack, "", port))]
    code, line = complain(sockets, f"server://127.0.0.1:{port}/127.0.0.1:0?tls=0")
    assert code == 1
    for part in (f"127.0.0.1:{port}", os.strerror(errno.EADDRINUSE), f"[::]:{port} (tcp, {UNIT})"):
        assert part in line


@pytest.mark.programs
def test_a_socket_that_fits_no_url_is_refused(stack: contextlib.ExitStack) -> None:
    """Also where its name fits a role."""
    sock = receiver(stack)
    code, line = complain([("tunnel", sock)], "server://127.0.0.1:0/127.0.0.1:0?tls=0")
    assert code == 2
    assert f"127.0.0.1:{port_of(sock)} (udp, tunnel)" in line


def test_a_socket_is_not_taken_for_another_role_than_its_name(stack: contextlib.ExitStack) -> None:
    ports = Ports(stack)
    code, line = complain(ports.named("target", UNIT), ports.url)
    assert code == 1
    assert f"127.0.0.1:{port_of(ports.tunnel)} (tcp, target)" in line


@pytest.mark.programs
def test_a_client_s_process_refuses_sockets(stack: contextlib.ExitStack) -> None:
    passed = listener(stack)
    code, line = complain([(UNIT, passed)], "client://127.0.0.1:9/127.0.0.1:9")
    assert code == 2
    assert f"127.0.0.1:{port_of(passed)} (tcp, {UNIT})" in line


@pytest.mark.programs
def test_a_socket_that_cannot_be_listened_on_is_refused(stack: contextlib.ExitStack) -> None:
    ends = [stack.enter_context(each) for each in socket.socketpair()]
    code, line = complain([(UNIT, ends[0])], "server://127.0.0.1:0/127.0.0.1:0?tls=0")
    assert code == 2
    assert "AF_UNIX" in line
    connected = stack.enter_context(connect(listener(stack).getsockname()))
    code, line = complain([(UNIT, connected)], "server://127.0.0.1:0/127.0.0.1:0?tls=0")
    assert code == 2
    assert "Accept=no" in line


@pytest.mark.programs
def test_what_is_no_socket_is_refused() -> None:
    reading, writing = os.pipe()
    with open(reading), open(writing):
        server = Activated([], "server://127.0.0.1:0/127.0.0.1:0?tls=0")
        server.descriptors = (reading,)
        with server:
            assert server.wait() == 2
    assert re.search(r"LISTEN_FDS: descriptor 3\b", server.lines[-1])


def test_sockets_for_another_process_are_left_alone() -> None:
    env = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "nonsense"}
    done = run("server://127.0.0.1:0/256.0.0.1:0?tls=0", env=env)
    assert "256.0.0.1" in done.lines[-1]


@pytest.mark.programs
def test_the_options_that_matter_are_set_on_what_was_passed(stack: contextlib.ExitStack) -> None:
    """They are those of the socket, which the test holds as well."""
    ports = Ports(stack)
    listening(start(stack, ports.named(), ports.url))
    for each in (ports.tunnel, ports.target):
        assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert ports.datagrams.getsockopt(socket.IPPROTO_IP, 8)  # IP_PKTINFO


@pytest.mark.programs
def test_a_queue_that_systemd_made_longer_than_the_program_may_stays_so(stack: contextlib.ExitStack) -> None:
    if os.geteuid():
        pytest.skip("only root may make a queue longer than net.core.rmem_max")
    ports = Ports(stack)
    ports.datagrams.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
    before = ports.datagrams.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert before >= 8 << 20
    listening(start(stack, ports.named(), ports.url))
    assert ports.datagrams.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before


@pytest.mark.programs
def test_a_loop_that_ended_keeps_the_watchdog_waiting_and_is_named(stack: contextlib.ExitStack) -> None:
    """Whoever shares a socket can end it for all: then nobody is let in any more, and only a restart helps."""
    ports, notified = Ports(stack), stack.enter_context(NotifySocket())
    server = start(stack, ports.named(), ports.url, **BRISK, NOTIFY_SOCKET=notified.address)
    notified.wait_for("READY=1")
    ports.target.shutdown(socket.SHUT_RDWR)
    server.wait_for("tunnel.unhealthy", level="error", error=re.compile("accept visitors"))
    notified.forget()
    with pytest.raises(AssertionError, match="no 'WATCHDOG=1' within"):
        notified.wait_for("WATCHDOG=1", 1)
