"""Names whose addresses change, and name servers that do not answer, while a tunnel is up."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from tests.faults.test_dead_link import Place, place
from tests.support.names import ClientWithNames, NameServer
from tests.support.sockets import Address, connect, datagram_socket, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, assert_connected

__all__ = ["place"]

HOSTS = "127.0.0.1 localhost\n{} moving.example\n"
ONE, TWO, THREE = "127.0.0.11", "127.0.0.12", "127.0.0.13"


class Service(Target):
    """A target on a port that another one has at another address."""

    def __init__(self, host: str, port: int) -> None:
        self._listener = socket.create_server((host, port))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((host, port))
        self.udp.settimeout(10)
        self.address: Address = (host, port)


def is_served(visitors: Address, service: Target) -> bool:
    """Whether a visitor's session reaches this service."""
    # What is accepted may be an attempt of the client itself, to find out whether the target is back.
    failures = contextlib.suppress(OSError, AssertionError)
    with failures, connect(visitors) as visitor, service.accept(timeout=1) as accepted:
        assert_connected(visitor, accepted)
        return True
    service.drain()
    return False


def is_heard(flow: socket.socket, service: Target) -> bool:
    """Whether a datagram of this flow reaches this service, and its answer comes back."""
    flow.send(b"question")
    service.udp.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        payload, sender = service.udp.recvfrom(100)
        service.udp.sendto(payload, sender)
        return flow.recv(100) == payload
    return False


def is_refused(visitors: Address) -> bool:
    """Whether a visitor is reset."""
    with contextlib.suppress(ConnectionResetError), connect(visitors) as visitor:
        visitor.recv(1)
        return False
    return True


@pytest.mark.programs("mount namespaces")
def test_a_target_that_moves_is_followed_by_visitors_and_by_flows_that_exist(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """First the old address refuses. Then another service answers there, which is found out after 30 s at most."""
    hosts = tmp_path / "hosts"
    hosts.write_text(HOSTS.format(ONE))
    first = stack.enter_context(Target(ONE))
    port = first.address[1]
    server = stack.enter_context(OurServer())
    client = ClientWithNames(hosts, server.tunnel_address, ("moving.example", port), env=CALM)
    stack.enter_context(client)
    client.wait_until_connected()
    flow = stack.enter_context(datagram_socket())
    flow.connect(server.visitor_address)
    until(lambda: is_heard(flow, first))
    assert is_served(server.visitor_address, first)

    second = stack.enter_context(Service(TWO, port))
    hosts.write_text(HOSTS.format(TWO))
    first.close()
    until(lambda: is_served(server.visitor_address, second))
    until(lambda: is_heard(flow, second))
    client.wait_for("name.changed", host="moving.example", addresses=TWO)
    client.wait_for("flow.moved", target=f"{TWO}:{port}")

    third = stack.enter_context(Service(THREE, port))
    hosts.write_text(HOSTS.format(THREE))
    client.wait_for("name.changed", addresses=THREE, timeout=60)
    assert is_served(server.visitor_address, third)
    assert is_heard(flow, third)


@pytest.mark.programs("network namespaces")
def test_silent_name_servers_delay_no_reconnect_no_visitor_and_no_end(place: Place, tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    names = place.on_client(NameServer)
    target = place.on_client(Target)

    def start_client() -> OurClient:
        service = ("service.example", target.address[1])
        return ClientWithNames(resolv, first.tunnel_address, service, place="/etc/resolv.conf", env=CALM)

    with contextlib.ExitStack() as stack:
        first = place.network.client.inside(lambda: stack.enter_context(OurServer()))
        client = place.on_client(start_client)
        client.wait_until_connected()
        place.network.client.inside(lambda: until(lambda: is_served(first.visitor_address, target)))
        names.silent = True
    mark = client.mark()
    tunnel = f"127.0.0.1:{first.tunnel_address[1]}"
    second = place.on_client(lambda: OurServer(tunnel=tunnel))
    client.wait_until_connected(after=mark)
    assert place.network.client.inside(lambda: is_served(second.visitor_address, target))

    target.close()
    asked = names.asked
    until(lambda: place.network.client.inside(lambda: is_refused(second.visitor_address)) and names.asked > asked)
    began = time.monotonic()
    assert place.network.client.inside(lambda: is_refused(second.visitor_address))
    assert client.stop() == 0
    assert time.monotonic() - began < 4, "glibc waits for 5 s at least"


@pytest.mark.programs("network namespaces")
def test_a_client_whose_names_have_never_been_resolved_says_so_and_ends_in_time(place: Place, tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 127.0.0.1\n")
    names = place.on_client(NameServer)
    names.silent = True
    server = place.on_client(OurServer)
    service = ("service.example", 9)
    client = place.on_client(
        lambda: ClientWithNames(resolv, server.tunnel_address, service, place="/etc/resolv.conf", env=CALM)
    )
    client.wait_until_connected()
    assert place.network.client.inside(lambda: is_refused(server.visitor_address))
    client.wait_for("name.failed", host="service.example")
    client.wait_for("target.unreachable", reason="timeout")
    assert client.stop() == 0
