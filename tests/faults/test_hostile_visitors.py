"""Visitors that mean no good: to a tunnel each is a session, so they may fill it up to SEMAPHORE_LIMIT.

What they take is bounded, the other tunnels of the two processes do not notice, and once they have gone their own
tunnel serves as before.
"""

from __future__ import annotations

import contextlib
import os

import pytest

from tests.faults.test_floods import HELLO, assert_as_fast, client_hello, time_visitors
from tests.faults.test_restart import Greeter, serves
from tests.support.attack import Attack, Then
from tests.support.proc import resident_bytes
from tests.support.process import Environment, Nodepass
from tests.support.sockets import format_address, free_port, until
from tests.support.target import Target

SESSIONS = 200
POOL = 32
SPARE = 32
"""Descriptors beside those of sessions and pools."""

MEMORY = 32 << 20
"""Bytes that they may cost either process: a session that goes on keeps next to nothing."""

ENV: Environment = {
    "SEMAPHORE_LIMIT": str(SESSIONS),
    "MAX_POOL_CAPACITY": str(POOL),
    "POOL_GET_TIMEOUT": "1s",
}

FLOODS: dict[str, tuple[int, bytes, Then]] = {
    "silent ones": (1000, b"", "hold"),
    "a byte now and then": (100, b"/", "drip"),
    "random bytes": (10, os.urandom(4096), "pour"),
    "HTTP requests": (100, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "hold"),
    "TLS and what a client says": (100, client_hello() + HELLO, "hold"),
    "a megabyte": (50, b"a" * (1 << 20), "hold"),
    "resets": (20, b"", "reset"),
    "resets behind a word": (20, b"hello", "reset"),
}


def marked(name: str) -> object:
    """Who comes anew at once makes as much work as the machine can do: not for one that has something else to do."""
    return pytest.param(name, marks=pytest.mark.soak) if FLOODS[name][2] == "reset" else name


@pytest.mark.programs
@pytest.mark.parametrize("name", [marked(name) for name in FLOODS])
def test_hostile_visitors_are_noticed_by_no_other_tunnel(stack: contextlib.ExitStack, name: str) -> None:
    count, words, then = FLOODS[name]
    greeter, target = stack.enter_context(Greeter()), stack.enter_context(Target())
    port = free_port(4)
    doors = [("127.0.0.1", port + 1), ("127.0.0.1", port + 3)]
    tunnels = zip((port, port + 2), doors, (greeter.address, target.address), strict=True)
    pairs = [(f"127.0.0.1:{first}", format_address(door), format_address(to)) for first, door, to in tunnels]
    server = Nodepass(*(f"server://{first}/{door}?tls=0&log=info" for first, door, _ in pairs), env=ENV)
    client = Nodepass(*(f"client://{first}/{to}?log=info" for first, _, to in pairs), env=ENV)
    runs = stack.enter_context(server), stack.enter_context(client)
    for first in (port, port + 2):
        server.wait_for("client.connected", tunnel=f"server:{first}")
    before = time_visitors(doors[1], target)
    memory = [resident_bytes(run.pid) for run in runs]
    with Attack(doors[0], count, words, then, sources=20) as attack:
        during: list[float] = []
        while attack.report().opened < count or not during:
            during += time_visitors(doors[1], target, 30)
            assert all(run.count_descriptors() < 2 * (SESSIONS + POOL + POOL) + SPARE for run in runs)
        assert all(resident_bytes(run.pid) < held + MEMORY for run, held in zip(runs, memory, strict=True))
    assert_as_fast(sorted(during), before)
    until(lambda: serves(doors[0]), what="serves nobody when they have gone")
    assert not server.find("client.disconnected") + server.find("accept.failed") + server.find_crashes()
    assert not client.find("server.disconnected") + client.find_crashes()
    assert [run.stop() for run in (client, server)] == [0, 0]
