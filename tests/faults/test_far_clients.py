"""Floods while the client is far away: what is pending for several round trips is not dropped in favour of silence."""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodepass.server.pending import SHARE
from tests.support.delay_line import DelayLine
from tests.support.process import Environment, run
from tests.support.silent_flood import SilentFlood
from tests.support.sockets import Address, connect
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer
from tests.support.v2_network import SERVER, Namespace

ROUND_TRIP = 0.2
"""Seconds. A data connection with a key, under TLS, is pending for two of these."""

RATE = 4000
"""Silent connections per second."""

VISITORS, PAUSE = 100, 0.05
"""How many come during the flood, and the seconds between two."""

POOL: Environment = {"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "64"}
"""Far fewer idle connections than visitors, so that new ones must be made meanwhile."""

FILES = 2048
"""The server's open files, which lets 256 connections be pending: at 4,000/s each is dropped for another after 64 ms,
and even on a machine that is five times slower, before two round trips have passed."""

PENDING = FILES // SHARE
BEHIND = 64
"""How many connections of the flood may wait for the server to accept them: a machine can be too slow for the rate."""

FLOODS = {
    "five addresses": [f"127.0.{network}.1" for network in range(1, 6)],
    "one IPv6 network": [f"2001:db8::{host:x}" for host in range(1, 1000)],
}


@pytest.mark.programs("delay line")
@pytest.mark.parametrize("sources", FLOODS.values(), ids=FLOODS)
def test_every_visitor_is_served_during_a_silent_flood(stack: contextlib.ExitStack, sources: list[str]) -> None:
    line = stack.enter_context(DelayLine(ROUND_TRIP))
    line.server.ip("-6", "route", "add", "local", "2001:db8::/64", "dev", "lo")
    env = {**POOL, "TUNNEL_KEY": run("--generate-key").output.strip()}
    server = OurServer(1, tunnel="[::]:0", target=f"{SERVER}:0", log="info", env=env)
    server.prefix = ("/bin/sh", "-c", f'ulimit -n {FILES}; exec "$0" "$@"')
    line.server.inside(lambda: stack.enter_context(server))
    target = line.client.inside(lambda: stack.enter_context(Target()))
    client = OurClient((SERVER, server.tunnel_address[1]), target.address, log="info", env=env)
    line.client.inside(lambda: stack.enter_context(client))
    client.wait_until_connected()
    flooded = "::1" if ":" in sources[0] else "127.0.0.1", server.data_address[1]
    line.server.inside(lambda: stack.enter_context(SilentFlood(flooded, RATE, PENDING + BEHIND, sources)))
    server.wait_for("pending.dropped", port="data")
    with ThreadPoolExecutor(1) as visitors:
        visiting = visitors.submit(visit, line.server, server.visitor_address)
        serve(target)
        assert count_served(visiting.result()) == VISITORS
    server.wait_for("pending.dropped", port="data", after=server.mark())  # the flood lasted
    assert not server.find("client.disconnected") + server.find_crashes()


def visit(machine: Namespace, address: Address) -> list[socket.socket]:
    """Visitors that have asked for a byte, at a steady rate."""

    def come() -> list[socket.socket]:
        visitors = []
        for _ in range(VISITORS):
            visitors.append(connect(address))
            visitors[-1].sendall(b"?")
            time.sleep(PAUSE)
        return visitors

    return machine.inside(come)


def serve(target: Target) -> None:
    """Answer as many visitors as come to the target."""
    with contextlib.suppress(TimeoutError):
        for _ in range(VISITORS):
            with target.accept() as service:
                service.recv(1)
                service.sendall(b"!")


def count_served(visitors: list[socket.socket]) -> int:
    served = 0
    for visitor in visitors:
        with visitor, contextlib.suppress(OSError):
            served += visitor.recv(1) == b"!"
    return served
