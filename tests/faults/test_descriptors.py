"""Descriptors run out: said once a second at most, without a busy loop, and all is well as soon as there are some."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.attack import Attack
from tests.support.proc import cpu_seconds
from tests.support.process import Environment, Nodepass
from tests.support.sockets import Address, connect, format_address, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_tunnel import SECRET

WATCHED = 1.5
"""Seconds for which the program has no descriptor."""

EXHAUSTED = re.compile(re.escape(os.strerror(errno.EMFILE)))
"""What the kernel says when there is none."""

FEW = 300
"""Descriptors of a process."""

KEYED: Environment = {**CALM, "TUNNEL_KEY": SECRET, "POOL_GET_TIMEOUT": "500ms"}


@contextlib.contextmanager
def no_descriptors(run: Nodepass) -> Iterator[None]:
    """Let the process open nothing."""
    limits = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir(f"/proc/{run.pid}/fd")}
    lowest_free = min(set(range(len(taken) + 1)) - taken)
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
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


def serves(tunnel: Tunnel) -> bool:
    """Whether a visitor is served, once those that have waited and left are through."""
    tunnel.target.drain()
    try:
        with connect(tunnel.visitor_address, 1) as visitor, tunnel.target.accept(1) as service:
            assert_connected(visitor, service)
    except (OSError, AssertionError):
        return False
    return True


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
        lines = run.find(after=mark, error=EXHAUSTED)
        assert lines
        for event, count in Counter(entry.event for entry in lines).items():
            assert count <= passed + 2, f"it floods the log: {event} {count} times"
        assert not run.find_crashes(mark)


@pytest.mark.programs
@pytest.mark.parametrize("port", ["visitor", "tunnel", "data"])
def test_a_server_without_descriptors_bears_who_comes_to_its(tunnel: Tunnel, port: str) -> None:
    server = tunnel.our_server
    with no_descriptors(server), contextlib.suppress(TimeoutError):
        assert_bears_it(server, getattr(server, f"{port}_address"))
    until(lambda: serves(tunnel), what="does not recover")
    assert not server.find("client.disconnected")


@pytest.mark.programs
def test_a_client_without_descriptors_bears_launches_and_fills_its_pool_again(tunnel: Tunnel) -> None:
    client = tunnel.our_client
    with no_descriptors(client):
        assert_bears_it(client, tunnel.visitor_address)
    until(lambda: serves(tunnel), what="does not recover")
    assert not client.find("server.disconnected")


@pytest.mark.programs
def test_a_client_that_has_no_descriptor_for_its_server_tries_again(
    stack: contextlib.ExitStack, tunnel: Tunnel
) -> None:
    client, server = tunnel.our_client, tunnel.our_server
    mark = client.mark()
    server.kill()
    client.wait_for("server.disconnected", after=mark)
    address = format_address(server.tunnel_address)
    with no_descriptors(client):
        again = stack.enter_context(OurServer(tunnel=address, env=KEYED, log="info"))
        client.wait_for("server.unreachable", after=mark, error=EXHAUSTED)
    client.wait_until_connected(after=mark)
    Tunnel(again, client, tunnel.target).assert_works()


@pytest.mark.programs
def test_strangers_do_not_take_the_descriptors_that_visitors_need(stack: contextlib.ExitStack) -> None:
    """Silent ones come to each port, more than there are descriptors; as many visitors as may be are served."""
    env = {**KEYED, "HANDSHAKE_TIMEOUT": "60s", "POOL_GET_TIMEOUT": "60s"}
    server = OurServer(1, env=env, log="info")
    server.prefix = ("/bin/sh", "-c", f'ulimit -n {FEW}; exec "$0" "$@"')
    target = stack.enter_context(Target())
    stack.enter_context(server)
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env, log="info"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    sessions = server.wait_for("process.limits", files=FEW)["sessions"]
    attacks = [
        stack.enter_context(Attack(address, 2 * FEW, b"", "hold"))
        for address in (server.tunnel_address, server.data_address)
    ]
    until(lambda: all(attack.report().opened == 2 * FEW for attack in attacks), what="nobody attacks")
    for _ in range(sessions):
        assert_connected(*stack.enter_context(tunnel.session()))
    assert not server.find(error=EXHAUSTED) + server.find("client.disconnected")
