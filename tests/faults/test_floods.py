"""Strangers by the hundred and the thousand: who behaves is served meanwhile, and what they take up is bounded.

The visitors' times are compared with the same tunnel's before the attack, on the same machine: what is looked for is a
wait for somebody else's handshake or turn, not the noise of a busy machine. The strict number, 50 ms for 99 of 100
visitors, is measured where nothing else runs (`soak`).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from nodepass.server.pending import PER_NETWORK, PER_PORT
from tests.support.attack import Attack, Then
from tests.support.proc import resident_bytes
from tests.support.process import Environment, Nodepass
from tests.support.sockets import Address, connect, free_port, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel
from tests.support.v2_tunnel import SECRET

VISITORS = 100
SERVED = 0.05
"""Seconds to the first byte for a visitor, whatever strangers do."""

POOL = 32
"""Data connections at most."""

QUICKLY = 2500
"""Peers of an attack that wants to be over soon: more than twice of what a server lets wait."""

MEMORY = 96 << 20
"""Bytes that strangers may cost."""

PATIENT: Environment = {"HANDSHAKE_TIMEOUT": "5s", "MAX_POOL_CAPACITY": str(POOL)}
KEYED: Environment = {**PATIENT, "TUNNEL_KEY": SECRET}
ONE_PORT: Environment = {**KEYED, "DATA_PORT": "tunnel"}


def client_hello() -> bytes:
    """The first flight of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="nodepass").do_handshake()
    return outgoing.read()


HELLO = b"//hello?v=2&nonce=" + b"0" * 32 + b"&client=" + b"0" * 16 + b"&name=\n"
LAUNCHES = b"//deadbeef#1\n" * 5000


@dataclass(frozen=True)
class Flood:
    """Who floods which port of what server with what."""

    port: str
    count: int
    words: bytes
    then: Then = "hold"
    env: Environment | None = None
    tls: int = 0


FLOODS = {
    "10,000 silent ones at the tunnel port": Flood("tunnel", 10_000, b""),
    "10,000 silent ones at the tunnel port of a server with a key": Flood("tunnel", 10_000, b"", env=KEYED),
    "10,000 silent ones at the data port": Flood("data", 10_000, b"", env=KEYED, tls=1),
    "10,000 silent ones at the one port": Flood("tunnel", 10_000, b"", env=ONE_PORT, tls=1),
    "some that drip": Flood("tunnel", 300, b"/", "drip", KEYED),
    "some that drip into a TLS handshake": Flood("data", 300, b"\x16", "drip", KEYED, 1),
    "random bytes": Flood("tunnel", 100, os.urandom(4096), "pour"),
    "random bytes at the data port": Flood("data", 100, os.urandom(4096), "pour", KEYED, 1),
    "HTTP requests": Flood("tunnel", 100, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "pour"),
    "TLS at a plain port": Flood("tunnel", 300, client_hello(), env=KEYED),
    "half of a TLS handshake": Flood("data", 500, client_hello(), env=KEYED, tls=1),
    "a megabyte without a newline": Flood("tunnel", 20, b"a" * (1 << 20), "pour", KEYED),
    "endless heartbeats": Flood("tunnel", 20, b"\n" * 65536, "pour"),
    "endless heartbeats behind a hello": Flood("tunnel", 20, HELLO + b"\n" * 65536, "pour", KEYED),
    "launches": Flood("tunnel", 20, LAUNCHES, "pour", KEYED),
    "guessed proofs": Flood("data", 100, bytes(32), "pour", KEYED),
    "resets": Flood("tunnel", 100, b"", "reset"),
    "resets behind a hello": Flood("tunnel", 100, HELLO, "reset"),
    "resets behind a challenge": Flood("tunnel", 100, HELLO, "reset", KEYED),
    "resets within a TLS handshake": Flood("data", 100, client_hello(), "reset", KEYED, 1),
    "resets on the data port": Flood("data", 100, b"", "reset"),
}

LIKE_OTHERS = (
    "some that drip",
    "random bytes",
    "endless heartbeats",
    "launches",
    "resets",
    "resets behind a hello",
    "resets on the data port",
)
"""Those that differ little from another; they are measured with all of them where nothing else runs."""


def start(stack: contextlib.ExitStack, flood: Flood) -> Tunnel:
    """A tunnel, and its client at 127.0.0.1, where no attacker comes from."""
    env = flood.env or PATIENT
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(flood.tls, env=env, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env, log="info"))
    client.wait_until_connected()
    return Tunnel(server, client, target)


def time_visitors(address: Address, target: Target, number: int = VISITORS) -> list[float]:
    """Seconds from the attempt to connect to the target's first byte, for one visitor after another, sorted."""
    times = []
    for _ in range(number):
        began = time.monotonic()
        with connect(address) as visitor, target.accept() as service:
            service.sendall(b"!")
            assert visitor.recv(1) == b"!"
            times.append(time.monotonic() - began)
    return sorted(times)


def assert_as_fast(during: list[float], before: list[float]) -> None:
    """That no visitor has waited for an attacker's handshake, which takes PATIENT's seconds, even on a busy machine."""
    assert during[len(during) // 2] < 10 * SERVED + 10 * before[len(before) // 2]
    assert during[-1] < 60 * SERVED + 10 * before[-1]


@pytest.mark.programs
@pytest.mark.parametrize("name", [name for name in FLOODS if name not in LIKE_OTHERS])
def test_who_behaves_is_served_during(stack: contextlib.ExitStack, name: str) -> None:
    flood = FLOODS[name]
    tunnel = start(stack, flood)
    server = tunnel.our_server
    before = time_visitors(tunnel.visitor_address, tunnel.target)
    descriptors, memory = server.settled_descriptors(), resident_bytes(server.pid)
    address = server.data_address if flood.port == "data" else server.tunnel_address
    count = min(flood.count, QUICKLY)
    with Attack(address, count, flood.words, flood.then) as attack:
        until(lambda: attack.report().opened, what="nobody attacks")
        during: list[float] = []
        while attack.report().opened < count or not during:
            during += time_visitors(tunnel.visitor_address, tunnel.target)
            assert server.count_descriptors() < descriptors + PER_PORT + PER_NETWORK
        assert resident_bytes(server.pid) < memory + MEMORY
    assert_as_fast(sorted(during), before)
    server.wait_for_descriptors(descriptors + POOL)
    assert not server.find("client.disconnected") + server.find("accept.failed") + server.find_crashes()
    tunnel.assert_works()
    assert server.stop() == 0


@pytest.mark.soak
@pytest.mark.parametrize("name", FLOODS)
def test_99_of_100_visitors_are_served_within_50_ms_during(stack: contextlib.ExitStack, name: str) -> None:
    flood = FLOODS[name]
    tunnel = start(stack, flood)
    server = tunnel.our_server
    before = time_visitors(tunnel.visitor_address, tunnel.target, 1000)
    memory = resident_bytes(server.pid)
    with Attack(
        server.data_address if flood.port == "data" else server.tunnel_address, flood.count, flood.words, flood.then
    ) as attack:
        until(lambda: attack.report().opened, what="nobody attacks")
        during = time_visitors(tunnel.visitor_address, tunnel.target, 1000)
        grown = (resident_bytes(server.pid) - memory) >> 20
    words = [f"{1000 * times[len(times) * part // 100]:.1f}" for times in (before, during) for part in (50, 99)]
    print(f"\n| {name} | {' | '.join(words)} | {grown} |")
    assert during[len(during) * 99 // 100] < SERVED


@pytest.mark.programs
@contextlib.contextmanager
def flooding_client(tunnel: Address, line: bytes) -> Iterator[None]:
    """A client that repeats this line without an end once it has its offer, written by a process of its own."""
    with connect(tunnel) as sock:
        sock.sendall(HELLO)
        assert sock.recv(1000).endswith(b"#0\n")
        pour = f"import os\nwhile True: os.write({sock.fileno()}, {line!r} * 5000)"
        with subprocess.Popen([sys.executable, "-c", pour], pass_fds=[sock.fileno()]) as process:
            yield
            process.kill()


@pytest.mark.programs
@pytest.mark.parametrize("line", [b"//beat?ok=1\n", b"//deadbeef#1\n"], ids=["heartbeats", "launches"])
def test_a_client_that_floods_its_server_does_not_keep_up_the_other_tunnels(
    stack: contextlib.ExitStack, line: bytes
) -> None:
    port = free_port(4)
    urls = [f"server://127.0.0.1:{first}/127.0.0.1:{first + 1}?tls=0&log=info" for first in (port, port + 2)]
    server = stack.enter_context(Nodepass(*urls, env=PATIENT))
    server.wait_for("server.listening", tunnel=f"server:{port + 2}")
    target = stack.enter_context(Target())
    stack.enter_context(OurClient(("127.0.0.1", port), target.address, env=PATIENT)).wait_until_connected()
    before = time_visitors(("127.0.0.1", port + 1), target)
    memory = resident_bytes(server.pid)
    with flooding_client(("127.0.0.1", port + 2), line):
        server.wait_for("client.connected", tunnel=f"server:{port + 2}")
        during = time_visitors(("127.0.0.1", port + 1), target, 3 * VISITORS)
        assert resident_bytes(server.pid) < memory + MEMORY
    assert_as_fast(during, before)
    assert server.stop() == 0


def open_silent(stack: contextlib.ExitStack, address: Address, network: int, number: int) -> list[socket.socket]:
    """Connections that say nothing, from several addresses of 127.0.<network>.0/24."""
    sources = [(f"127.0.{network}.{1 + each % 5}", 0) for each in range(number)]
    return [stack.enter_context(socket.create_connection(address, 20, source_address=source)) for source in sources]


def count_dropped(*peers: socket.socket) -> int:
    """How many of these silent peers' connections the server has closed."""
    poll = select.poll()
    for peer in peers:
        poll.register(peer, select.POLLIN)
    return len(poll.poll(0))


@pytest.mark.programs
@pytest.mark.parametrize("port", ["tunnel", "data"])
def test_of_too_many_silent_ones_one_of_the_largest_network_is_dropped(stack: contextlib.ExitStack, port: str) -> None:
    tunnel = start(stack, Flood(port, 0, b"", env={**KEYED, "HANDSHAKE_TIMEOUT": "60s"}, tls=1))
    server = tunnel.our_server
    address = server.data_address if port == "data" else server.tunnel_address
    server.settled_descriptors()  # the client's own connections are pending, too, while it fills its pool
    alone = open_silent(stack, address, 9, 1)
    first = open_silent(stack, address, 1, PER_NETWORK + 1)
    until(lambda: count_dropped(*first) == 1)
    others = [peer for network in (2, 3) for peer in open_silent(stack, address, network, PER_NETWORK)]
    fewer = open_silent(stack, address, 4, PER_NETWORK - 1)
    assert not count_dropped(*alone, *others, *fewer)
    last = open_silent(stack, address, 5, 1)
    until(lambda: count_dropped(*first, *others) == 2)
    assert not count_dropped(*alone, *fewer, *last)
    tunnel.assert_works()


UNFINISHED = {
    "silence": b"",
    "the beginning of a hello": b"//hello?v=",
    "a hello and no proof": HELLO,
    "a line without an end": b"a",
    "the beginning of a TLS handshake": b"\x16\x03",
    "half of a TLS handshake": client_hello(),
}


@pytest.mark.programs
@pytest.mark.parametrize("port", ["tunnel", "data"])
def test_handshake_timeout_holds_however_slowly_bytes_come(stack: contextlib.ExitStack, port: str) -> None:
    """The time runs from the beginning and does not begin anew with each byte."""
    tunnel = start(stack, Flood(port, 0, b"", env={**KEYED, "HANDSHAKE_TIMEOUT": "500ms"}, tls=1))
    server = tunnel.our_server
    address = server.data_address if port == "data" else server.tunnel_address
    began = time.monotonic()
    peers = [stack.enter_context(connect(address)) for _ in UNFINISHED]
    for peer, words in zip(peers, UNFINISHED.values(), strict=True):
        peer.sendall(words)

    def is_closed(peer: socket.socket) -> bool:
        try:
            peer.send(b"/")  # which completes nothing
        except OSError:
            return True
        return False

    until(lambda: not [peer for peer in peers if not is_closed(peer)])
    assert time.monotonic() - began < 10
    tunnel.assert_works()
