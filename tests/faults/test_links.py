"""Links that fail and come back: for a while, one way only, or with the server at another address."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.test_dead_link import INTERVAL, NOTICED, Place, left, place
from tests.support.names import ClientWithNames
from tests.support.process import Environment
from tests.support.sockets import connect, receive_exactly
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_network import CABLE, CLIENT, SERVER, Network

__all__ = ["place"]

NOWHERE = "02:00:00:00:00:01"
"""An Ethernet address that nobody has: what is sent there is lost without a word."""

HEARTBEAT = 5.0
"""Seconds, as REPORT_INTERVAL's default has it."""

in_a_network = pytest.mark.programs("network namespaces")


def start(place: Place, env: Environment) -> tuple[OurServer, OurClient, Target]:
    """A tunnel over the cable, connected."""
    server = place.on_server(lambda: OurServer(tunnel=f"{SERVER}:0", target=f"{SERVER}:0", env=env))
    target = place.on_client(Target)
    client = place.on_client(lambda: OurClient(server.tunnel_address, target.address, env=env))
    client.wait_until_connected()
    place.assert_works(server, target)
    return server, client, target


@in_a_network
def test_a_link_that_was_down_for_a_moment_has_lost_nothing_that_a_session_was_told(place: Place) -> None:
    """With default settings three seconds are not noticed."""
    server, client, target = start(place, {})
    with place.network.server.inside(lambda: connect(server.visitor_address)) as visitor, target.accept() as service:
        visitor.settimeout(120)
        service.settimeout(120)
        assert_connected(visitor, service)
        mark = client.mark()
        place.network.pull()
        began = time.monotonic()
        sender = threading.Thread(target=visitor.sendall, args=(bytes(4 << 20),))
        sender.start()
        service.sendall(b"!")
        time.sleep(left(began, 3))
        place.network.mend()
        place.assert_works(server, target)
        assert receive_exactly(service, 4 << 20) == bytes(4 << 20)
        assert visitor.recv(1) == b"!"
        sender.join()
    assert not client.find("server.disconnected", after=mark)


@in_a_network
@pytest.mark.soak
def test_a_link_that_was_down_for_long_leaves_the_sessions_that_were_idle(place: Place) -> None:
    """Thirty seconds are noticed: the client reconnects. Where bytes wait for an acknowledgement, see test_vanished."""
    server, client, target = start(place, {})
    with place.network.server.inside(lambda: connect(server.visitor_address)) as visitor, target.accept() as service:
        assert_connected(visitor, service)
        marks = server.mark(), client.mark()
        place.network.pull()
        began = time.monotonic()
        client.wait_for("server.disconnected", after=marks[1], timeout=left(began, 4 * HEARTBEAT))
        server.wait_for("client.disconnected", after=marks[0], timeout=left(began, 4 * HEARTBEAT))
        print(f"\nnoticed after {time.monotonic() - began:.1f} s")
        time.sleep(left(began, 30))
        place.network.mend()
        mended = time.monotonic()
        client.wait_until_connected(after=marks[1])
        place.assert_works(server, target)
        print(f"visitors served {time.monotonic() - mended:.1f} s after the link was back")
        assert_connected(visitor, service)


def lose_what_the_server_sends(network: Network) -> Callable[[], None]:
    return lose(network, "server", CLIENT)


def lose_what_the_client_sends(network: Network) -> Callable[[], None]:
    return lose(network, "client", SERVER)


def lose(network: Network, sender: str, to: str) -> Callable[[], None]:
    """Have everything lost that one end sends to the other; what undoes it."""
    namespace = network.server if sender == "server" else network.client
    namespace.ip("neighbour", "replace", to, "lladdr", NOWHERE, "dev", CABLE, "nud", "permanent")
    return lambda: namespace.ip("neighbour", "delete", to, "dev", CABLE)


@in_a_network
@pytest.mark.parametrize("lose_one_way", [lose_what_the_server_sends, lose_what_the_client_sends])
def test_a_link_that_loses_one_direction_is_noticed_by_both_ends(
    place: Place, lose_one_way: Callable[[Network], Callable[[], None]]
) -> None:
    server, client, target = start(place, {"REPORT_INTERVAL": f"{INTERVAL * 1000:.0f}ms", "SERVICE_COOLDOWN": "500ms"})
    marks = server.mark(), client.mark()
    began = time.monotonic()
    mend = lose_one_way(place.network)
    client.wait_for("server.disconnected", after=marks[1], timeout=left(began, 2 * NOTICED))
    server.wait_for("client.disconnected", after=marks[0], timeout=left(began, 2 * NOTICED))
    mend()
    client.wait_until_connected(after=marks[1])
    server.wait_for_client(after=marks[0])
    place.assert_works(server, target)


@pytest.mark.programs("mount namespaces")
def test_a_client_finds_a_server_whose_name_has_got_another_address(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.11 moving.example\n")
    target = stack.enter_context(Target())
    with OurServer(tunnel="127.0.0.11:0") as server:
        port = server.tunnel_address[1]
        client = ClientWithNames(hosts, ("moving.example", port), target.address, env=CALM)
        stack.enter_context(client)
        client.wait_until_connected()
        Tunnel(server, client, target).assert_works()
    mark = client.mark()
    hosts.write_text("127.0.0.12 moving.example\n")
    began = time.monotonic()
    moved = stack.enter_context(OurServer(tunnel=f"127.0.0.12:{port}"))
    client.wait_until_connected(after=mark, server=f"127.0.0.12:{port}")
    print(f"\nconnected to the new address after {time.monotonic() - began:.1f} s, its start included")
    Tunnel(moved, client, target).assert_works()
