"""Visitors and services that send all they can and read nothing: what both ends of the tunnel keep for them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable

import pytest
import yaml

from tests.support import cgroup
from tests.support.proc import resident_bytes
from tests.support.process import REPOSITORY
from tests.support.target import Target
from tests.support.tunnel import STEADY, OurClient, OurServer, Tunnel, assert_connected

pytestmark = pytest.mark.programs

COMPOSE = REPOSITORY / "contrib" / "docker" / "compose.yaml"
SESSIONS = 100
PER_SESSION = 64 << 10
"""Bytes that a stopped direction may cost, both ends together."""

BATCHES = 2 << 20
"""Bytes that large batches of TLS may cost besides, at each end."""

OWN_BUFFERS = 8 << 10
"""Bytes of the buffers of the sockets of these tests, of which there are many."""

QUIET = 1.0
"""Seconds in which nothing moves any more."""


def open_sessions(stack: contextlib.ExitStack, tunnel: Tunnel, count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Visitor and service of each; a byte has gone both ways."""
    sessions = [stack.enter_context(tunnel.session()) for _ in range(count)]
    for session in sessions:
        assert_connected(*session)
        for sock in session:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, OWN_BUFFERS)
    return sessions


def pour(senders: Iterable[socket.socket]) -> None:
    """Send until no sender can send any more."""
    senders = list(senders)
    for each in senders:
        each.setblocking(False)
    moved = time.monotonic()
    while time.monotonic() < moved + QUIET:
        for each in senders:
            with contextlib.suppress(BlockingIOError):
                each.send(bytes(1 << 16))
                moved = time.monotonic()


@pytest.mark.parametrize("tls", [0, 1])
def test_a_hundred_visitors_that_read_nothing_cost_64_kib_each(stack: contextlib.ExitStack, tls: int) -> None:
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(tls, env=STEADY))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=STEADY))
    client.wait_until_connected()
    sessions = open_sessions(stack, Tunnel(server, client, target), SESSIONS)
    before = [resident_bytes(end.pid) for end in (server, client)]
    pour(service for _, service in sessions)
    grown = [resident_bytes(end.pid) - size for end, size in zip((server, client), before, strict=True)]
    print(f"tls={tls}: KiB for each session: {[size // SESSIONS >> 10 for size in grown]}")
    assert sum(grown) <= SESSIONS * PER_SESSION + 2 * tls * BATCHES


@pytest.mark.programs("memory cgroups")
@pytest.mark.parametrize("limited", ["server", "client"])
def test_the_example_for_containers_has_memory_for_as_many_sessions_as_it_allows(
    stack: contextlib.ExitStack, limited: str
) -> None:
    service = yaml.safe_load(COMPOSE.read_text())["services"][limited]
    size = int(service["mem_limit"].removesuffix("m")) << 20
    count = service["environment"]["SEMAPHORE_LIMIT"]
    group = stack.enter_context(cgroup.memory_cgroup(size))
    target = stack.enter_context(Target())
    env = {"SEMAPHORE_LIMIT": count, "POOL_GET_TIMEOUT": "60s"}
    server = OurServer(1, env=env, log="info")
    if limited == "server":
        server.prefix = group.prefix
    stack.enter_context(server)
    client = OurClient(server.tunnel_address, target.address, env=env, log="info")
    if limited == "client":
        client.prefix = group.prefix
    stack.enter_context(client)
    client.wait_until_connected()
    end = server if limited == "server" else client
    assert end.find("process.limits", memory=size, memory_sessions=lambda sessions: sessions >= int(count))
    sessions = open_sessions(stack, Tunnel(server, client, target), int(count))
    pour(sock for session in sessions for sock in session)
    assert (group.kills, end.is_running) == (0, True)
    print(f"{limited}: {group.needed / (1 << 20):.1f} MiB")
    assert group.needed <= size
