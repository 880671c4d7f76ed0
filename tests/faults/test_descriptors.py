"""Descriptors run out: said once a second at most, without a busy loop, and all is well as soon as there are some."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.proc import cpu_seconds
from tests.support.process import Environment, Nodepass
from tests.support.sockets import Address, connect, until
from tests.support.target import Target
from tests.support.tunnel import BRISK, OurClient, OurServer, Tunnel
from tests.support.v2_tunnel import SECRET

WATCHED = 1.5
"""Seconds for which the program has no descriptor."""

KEYED: Environment = {**BRISK, "TUNNEL_KEY": SECRET, "POOL_GET_TIMEOUT": "500ms"}


@contextlib.contextmanager
def no_descriptors(run: Nodepass, spare: int = 0) -> Iterator[None]:
    """Let the process have so many descriptors more than it has now."""
    limits = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (run.count_descriptors() + spare, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(run.pid, resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def tunnel(stack: contextlib.ExitStack) -> Tunnel:
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(env=KEYED, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=KEYED, log="info"))
    client.wait_until_connected()
    started = Tunnel(server, client, target)
    started.assert_works()
    return started


def assert_bears_it(run: Nodepass, address: Address) -> None:
    """That connections to an address are borne for a while, by a process that has no descriptor left."""
    mark, used, began = run.mark(), cpu_seconds(run.pid), time.monotonic()
    with contextlib.ExitStack() as stack:
        while time.monotonic() - began < WATCHED:
            with contextlib.suppress(OSError):
                stack.enter_context(connect(address, 1))
            time.sleep(0.02)
        passed = time.monotonic() - began
        assert cpu_seconds(run.pid) - used < passed / 2, "it spins"
        lines = run.find("too many open files", mark)
        assert lines
        for where in ("accept", "data connection", "target"):
            assert sum(f"{where}" in line for line in lines) <= passed + 2, "it floods the log"
        assert not run.find("traceback", mark)


@pytest.mark.parametrize("port", ["visitor", "tunnel", "data"])
def test_a_server_without_descriptors_bears_who_comes_to_its(tunnel: Tunnel, port: str) -> None:
    server = tunnel.our_server
    with no_descriptors(server), contextlib.suppress(TimeoutError):
        assert_bears_it(server, getattr(server, f"{port}_address"))
    tunnel.target.drain()
    tunnel.assert_works()
    assert not server.find("client disconnected")


def test_a_client_without_descriptors_bears_launches_and_fills_its_pool_again(tunnel: Tunnel) -> None:
    client = tunnel.our_client
    with no_descriptors(client):
        assert_bears_it(client, tunnel.visitor_address)
    tunnel.target.drain()

    def works() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            with socket.create_connection(tunnel.visitor_address, 1), tunnel.target.accept(1):
                return True
        return False

    until(works, what="does not recover")
    assert not client.find("disconnected")


def test_a_client_that_has_no_descriptor_for_its_server_tries_again(tunnel: Tunnel) -> None:
    client, server = tunnel.our_client, tunnel.our_server
    address = server.tunnel_address
    with no_descriptors(client):
        pass  # only to see that the limit can be set while it runs
    tunnel_port, visitor_port = address[1], server.visitor_address[1]
    mark = client.mark()
    server.kill()
    client.wait_for("disconnected", after=mark)
    limits = resource.prlimit(client.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(client.pid, resource.RLIMIT_NOFILE, (8, limits[1]))
    again = OurServer(tunnel=f"127.0.0.1:{tunnel_port}", target=f"127.0.0.1:{visitor_port}", env=KEYED, log="info")
    with again:
        client.wait_for("cannot reach the server .*too many open files", after=mark)
        resource.prlimit(client.pid, resource.RLIMIT_NOFILE, limits)
        client.wait_until_connected(after=mark)
        Tunnel(again, client, tunnel.target).assert_works()
