"""A link that goes dead without a word: both ends notice in time, recover by themselves, and a client that
comes back meanwhile is not kept waiting by its own ghost.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest

from tests.support.process import Environment
from tests.support.sockets import Address, connect, datagram_socket, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server
from tests.support.v1_stream import is_readable
from tests.support.v2_network import SERVER, Namespace, Network
from tests.support.v2_tunnel import SECRET
from tests.support.wire2.talk import dial

INTERVAL = 0.3
"""Seconds between heartbeats."""

LATE = 10.0
"""Seconds that a busy machine may add, also to the start of our program."""

NOTICED = 3 * INTERVAL + LATE
"""Seconds within which a dead link is found."""

ABOUT = 2 * NOTICED
"""Seconds that are about the same: for wire v1, where TCP has to find it."""

SERVED = 2.0 + LATE
"""Seconds within which a client that reappears is served: far fewer than SLOW's heartbeats would take."""

QUICK: Environment = {"REPORT_INTERVAL": f"{INTERVAL * 1000:.0f}ms", "SERVICE_COOLDOWN": "500ms"}
SLOW: Environment = {"REPORT_INTERVAL": "30s", "SERVICE_COOLDOWN": "500ms"}
"""With these it is never a heartbeat that finds somebody dead."""

pytestmark = pytest.mark.programs("network namespaces")

Client = OurClient | V1Client
ClientFactory = Callable[[Address, Address], Client]
Made = TypeVar("Made", bound=AbstractContextManager[object])


class Place:
    """Starts things in the namespaces of a network and ends them with the test."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.network = stack.enter_context(Network())
        self._stack = stack

    def on_server(self, make: Callable[[], Made]) -> Made:
        """Start something on the server's machine."""
        return self._start(self.network.server, make)

    def on_client(self, make: Callable[[], Made]) -> Made:
        """Start something on the client's machine."""
        return self._start(self.network.client, make)

    def _start(self, namespace: Namespace, make: Callable[[], Made]) -> Made:
        def start() -> Made:
            made = make()
            self._stack.enter_context(made)
            return made

        return namespace.inside(start)

    def assert_works(self, server: OurServer | V1Server, target: Target) -> None:
        """Carry a few bytes both ways, for a visitor on the server's machine."""
        visitor = self.network.server.inside(lambda: connect(server.visitor_address))
        with visitor, target.accept() as service:
            assert_connected(visitor, service)


@pytest.fixture
def place(stack: contextlib.ExitStack) -> Place:
    return Place(stack)


def our_server(env: Environment) -> Callable[[], OurServer]:
    """Our program as a server that listens at SERVER, for clients and for visitors."""
    return lambda: OurServer(tunnel=f"{SERVER}:0", target=f"{SERVER}:0", env=env)


class ReachableV1Server(V1Server):
    """A v1 server that listens at SERVER; no datagrams."""

    def _listen(self, port: int = 0) -> socket.socket:
        return self.workers.own(socket.create_server((SERVER, port), backlog=1024))

    def _receive_datagrams(self) -> None:
        """None come."""


def left(began: float, limit: float) -> float:
    """Seconds that are left of a time limit."""
    return max(0.01, began + limit - time.monotonic())


def test_both_ends_notice_a_dead_link_and_recover_when_it_returns(place: Place) -> None:
    env = {**QUICK, "TUNNEL_KEY": SECRET}
    server, target = place.on_server(our_server(env)), place.on_client(Target)
    client = place.on_client(lambda: OurClient(server.tunnel_address, target.address, env=env))
    client.wait_until_connected()
    place.assert_works(server, target)
    marks = server.mark(), client.mark()
    began = time.monotonic()
    place.network.pull()
    server.wait_for("client.disconnected", after=marks[0], timeout=left(began, NOTICED), reason="silent")
    client.wait_for("server.disconnected", after=marks[1], timeout=left(began, NOTICED), reason="silent")
    place.network.mend()
    client.wait_until_connected(after=marks[1])
    server.wait_for_client(after=marks[0])
    place.assert_works(server, target)


def test_our_server_notices_a_dead_link_to_a_v1_client(place: Place) -> None:
    server = place.on_server(our_server(QUICK))
    target = place.on_client(Target)
    client = place.on_client(lambda: V1Client(server.tunnel_address, target.address))
    client.wait_until_full()
    place.assert_works(server, target)
    mark = server.mark()
    place.network.pull()
    server.wait_for("client.disconnected", after=mark, timeout=ABOUT)
    place.network.mend()


def test_our_client_notices_a_dead_link_to_a_v1_server_and_recovers(place: Place) -> None:
    server = place.on_server(lambda: ReachableV1Server(heartbeat=INTERVAL))
    target = place.on_client(Target)
    client = place.on_client(lambda: OurClient(server.tunnel_address, target.address, env=QUICK))
    client.wait_until_connected()
    place.assert_works(server, target)
    mark = client.mark()
    place.network.pull()
    client.wait_for("server.disconnected", after=mark, timeout=ABOUT)
    place.network.mend()
    client.wait_until_connected(after=mark)
    place.assert_works(server, target)


def ours(tunnel: Address, target: Address) -> Client:
    return OurClient(tunnel, target, env=SLOW)


CLIENTS: dict[str, ClientFactory] = {"our client": ours, "a v1 client": V1Client}
FOLLOWERS = [("our client", "our client"), ("a v1 client", "a v1 client")]


def become_the_client(server: OurServer, client: Client, after: int = 0, within: float = 20.0) -> None:
    """Wait until the server has a client, and that client has a full pool.

    One that still filled it when its machine moves would do so from its new address, as if it were the one after it.
    """
    began = time.monotonic()
    server.wait_for_client(after, within)
    if isinstance(client, OurClient):
        client.wait_for("pool.added", timeout=left(began, within), idle=16, capacity=16)
    else:
        client.wait_until_full()


def assert_follower_is_served_at_once(place: Place, server: OurServer, kind: str) -> None:
    """Check that a client which comes now takes the place of the one that the server still has."""
    mark = server.mark()
    target = place.on_client(Target)
    began = time.monotonic()
    client = place.on_client(lambda: CLIENTS[kind](server.tunnel_address, target.address))
    become_the_client(server, client, mark, left(began, SERVED))
    place.assert_works(server, target)
    assert time.monotonic() - began < SERVED


@pytest.mark.parametrize(("first", "second"), FOLLOWERS)
def test_a_client_that_reappears_from_the_same_address_is_served_at_once(place: Place, first: str, second: str) -> None:
    """Its machine has lost its power, say: to the server the old control connection looks alive."""
    server, target = place.on_server(our_server(SLOW)), place.on_client(Target)
    ghost = place.on_client(lambda: CLIENTS[first](server.tunnel_address, target.address))
    become_the_client(server, ghost)
    place.network.replace_client()
    assert_follower_is_served_at_once(place, server, second)


def test_a_v1_client_that_reappears_is_not_turned_away_for_its_own_ghost(place: Place) -> None:
    """Its machine answers the probe with a reset: that is no sign of life."""
    server, target = place.on_server(our_server(SLOW)), place.on_client(Target)
    ghost = place.on_client(lambda: V1Client(server.tunnel_address, target.address))
    become_the_client(server, ghost)
    place.network.replace_client()
    with place.network.client.inside(lambda: dial(server.tunnel_address)) as talk:
        assert talk.read_line() == b"//%d#0" % server.data_address[1]


@pytest.mark.parametrize(("first", "second"), FOLLOWERS)
def test_a_client_whose_machine_moved_to_another_address_is_served_at_once(
    place: Place, first: str, second: str
) -> None:
    """What is sent to the old address is lost without a word, so that only silence tells that nobody is there."""
    server, target = place.on_server(our_server(SLOW)), place.on_client(Target)
    ghost = place.on_client(lambda: CLIENTS[first](server.tunnel_address, target.address))
    become_the_client(server, ghost)
    place.network.move_client()
    assert_follower_is_served_at_once(place, server, second)


def test_a_visitor_who_goes_on_sending_datagrams_reaches_the_client_that_took_over(place: Place) -> None:
    """The lane of the client that is gone takes bytes and brings them nowhere; the visitor never pauses."""
    env = {**SLOW, "TUNNEL_KEY": SECRET}
    server, target = place.on_server(our_server(env)), place.on_client(Target)
    ghost = place.on_client(lambda: OurClient(server.tunnel_address, target.address, env=env))
    ghost.wait_until_connected()
    with place.network.server.inside(lambda: datagram_socket(SERVER)) as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        assert target.udp.recv(100) == b"hello"
        place.network.move_client()
        place.on_client(lambda: OurClient(server.tunnel_address, target.address, env=env)).wait_until_connected()

        def arrives() -> bool:
            visitor.sendto(b"again", server.visitor_address)
            return is_readable(target.udp)

        until(arrives)
