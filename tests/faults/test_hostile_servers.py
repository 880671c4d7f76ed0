"""A server that floods its client: the other tunnels of that process go on, and what it takes up stays bounded."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

import pytest

from tests.faults.test_floods import assert_as_fast, time_visitors
from tests.support.proc import count_connections, resident_bytes
from tests.support.process import Environment, Nodepass
from tests.support.sockets import PATIENCE, until
from tests.support.target import Target
from tests.support.tunnel import OurServer
from tests.support.v1_server import V1Server, random_id
from tests.support.wire2.server import V2Server

MEMORY = 32 << 20
"""Bytes that a flood may cost; 50,000 greenlets would take four times as much."""

PATIENT: Environment = {"HANDSHAKE_TIMEOUT": "20s"}


def launches(kind: int) -> bytes:
    """Of ids that were never given to anybody, each another one."""
    return b"".join(b"//%08x#%d\n" % (number, kind) for number in range(50_000))


BEAT = b"//beat?idle=0\n"

FLOODS: dict[str, Callable[[], bytes]] = {
    "launches for TCP": lambda: launches(1),
    "launches for a datagram": lambda: launches(2),
    "launches for a lane": lambda: launches(3),
    "launches for one and the same id": lambda: b"//deadbeef#3\n" * 50_000,
    "heartbeats": lambda: BEAT * 5000,
    "heartbeats of v1": lambda: b"\n" * 50_000,
    "signals that nobody knows": lambda: b"//later#9\n" * 50_000,
    "rubbish": lambda: b"\xff\0\xfe\n" * 50_000,
    "a megabyte without a newline": lambda: b"a" * (1 << 20) + b"\n",
}


class Mute(V2Server):
    """Takes data connections and gives them no id, so that each launch may still find its own; sends no heartbeats."""

    def __init__(self) -> None:
        super().__init__(heartbeat=None, announced=60)

    def admit(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.recv(1)


@pytest.mark.programs
@pytest.mark.parametrize("name", FLOODS)
def test_a_server_that_floods_its_client_does_not_keep_up_the_other_tunnels(
    stack: contextlib.ExitStack, name: str
) -> None:
    flooding, target = stack.enter_context(Mute()), stack.enter_context(Target())
    server = stack.enter_context(OurServer(env=PATIENT, log="info"))
    ports = flooding.tunnel_address[1], server.tunnel_address[1]
    urls = [f"client://127.0.0.1:{port}/127.0.0.1:{target.address[1]}?log=info" for port in ports]
    client = stack.enter_context(Nodepass(*urls, env=PATIENT))
    server.wait_for_client()
    until(lambda: flooding.connects, what="the flooding server has no client")
    before = time_visitors(server.visitor_address, target)
    memory, answers = resident_bytes(client.pid), flooding.answers
    words = FLOODS[name]() + BEAT  # the answer to this last heartbeat tells that all has been read
    answers += words.count(BEAT)
    flooding.workers.spawn(lambda: flooding.write(words))
    during: list[float] = []
    began = time.monotonic()
    while flooding.answers < answers:
        during += time_visitors(server.visitor_address, target, 10)
        assert time.monotonic() - began < PATIENCE, "it does not get to the end of it"
    assert resident_bytes(client.pid) < memory + MEMORY
    if during:
        assert_as_fast(sorted(during), before)
    assert flooding.connects == 1
    assert not client.find("server.disconnected") + client.find_crashes()
    assert client.stop() == 0


POOL = 8
"""Data connections at most."""


class Talkative(V1Server):
    """Sends a byte behind each id and never launches."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def admit(self, sock: socket.socket) -> None:
        with self._changed:
            self.taken += 1
        sock.sendall(random_id() + b"!")


@pytest.mark.programs
def test_bytes_before_the_launch_do_not_take_the_clients_descriptors(stack: contextlib.ExitStack) -> None:
    """Such connections are part of the pool, and each is replaced when its launch is overdue, not at a report."""
    hostile, target = stack.enter_context(Talkative()), stack.enter_context(Target())
    server = stack.enter_context(OurServer())
    ports = hostile.tunnel_address[1], server.tunnel_address[1]
    urls = [f"client://127.0.0.1:{port}/127.0.0.1:{target.address[1]}?log=info" for port in ports]
    env: Environment = {"MIN_POOL_CAPACITY": "2", "MAX_POOL_CAPACITY": str(POOL), "REPORT_INTERVAL": "60s"}
    client = stack.enter_context(Nodepass(*urls, env=env))
    server.wait_for_client()

    def has_replaced_them() -> bool:
        done = hostile.taken > 2 * POOL
        assert count_connections(client.pid, hostile.data_address[1]) <= POOL
        return done

    until(has_replaced_them)
    time_visitors(server.visitor_address, target, 10)
    assert client.stop() == 0
