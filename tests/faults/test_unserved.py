"""A visitor who could not be served must not take that for an answer of no bytes: he is reset, also before he has
said anything, as the visitor of a service that speaks first has not.
"""

from __future__ import annotations

import contextlib
import queue
import socket
from collections.abc import Callable

import pytest

from tests.support.process import Nodepass
from tests.support.sockets import connect, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer
from tests.support.v1_server import V1Server


@pytest.fixture
def server(stack: contextlib.ExitStack) -> OurServer:
    """A server without a client."""
    return stack.enter_context(OurServer(env={**CALM, "POOL_GET_TIMEOUT": "2s", "SHUTDOWN_TIMEOUT": "100ms"}))


def test_a_visitor_without_a_data_connection_is_reset(server: OurServer) -> None:
    with pytest.raises(ConnectionResetError), connect(server.visitor_address) as visitor:
        visitor.recv(1)


@pytest.mark.parametrize(
    "end", [Nodepass.stop, pytest.param(Nodepass.kill, marks=pytest.mark.programs)], ids=["stopped", "killed"]
)
def test_a_visitor_who_waits_when_the_server_ends_is_reset(
    server: OurServer, end: Callable[[Nodepass], object]
) -> None:
    before = server.settled_descriptors()
    with connect(server.visitor_address) as visitor:
        until(lambda: server.count_descriptors() > before, what="the visitor is not let in")
        end(server)
        with pytest.raises(ConnectionResetError):
            visitor.recv(1)


def test_a_client_that_is_killed_before_a_launch_has_begun_does_not_look_like_an_answer(
    stack: contextlib.ExitStack,
) -> None:
    """The launch may be on its way, so an idle data connection must not end as a session in good order does."""
    ready: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def give_id(sock: socket.socket) -> None:
        sock.sendall(b"deadbeef")
        ready.put(sock)

    server = stack.enter_context(V1Server(handle_data=give_id))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    data = ready.get(timeout=20)
    client.wait_for("pool.added", id="deadbeef")
    client.kill()
    with pytest.raises(ConnectionResetError):
        data.recv(1)
