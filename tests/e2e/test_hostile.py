"""Peers that break the rules: logged and survived, and the next visitor is served."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import socket
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.e2e.conftest import TunnelFactory
from tests.support.log import loud, one_of
from tests.support.process import Environment, Nodepass
from tests.support.sockets import abort, connect, is_over, reset, until
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, OurClient, OurClients, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server

EXHAUSTED = re.compile(re.escape(os.strerror(errno.EMFILE)))
"""What the kernel says when there are no descriptors."""

SMALL: Environment = {**CALM, "MIN_POOL_CAPACITY": "2"}

UNKNOWN_ID = b"//00000000#1\n"
OVER_LONG = b"//" + b"a" * 5000 + b"#1\n"

HARMLESS = {
    "an empty line": b"\n",
    "a line of blanks": b"  \t \r\n",
    "an unknown fragment": b"//deadbeef#99\n",
    "no fragment": b"//deadbeef\n",
    "a query": b"//deadbeef?x=1&y=2#77\n",
    "many empty lines": b"\n" * 10_000,
}

LOGGED = {
    "an unknown id": (UNKNOWN_ID, "launch.unknown"),
    "an unknown id for a datagram": (b"//00000000#2\n", "launch.unknown"),
    "an id that is no id": (b"//../../etc/passwd#1\n", "signal.malformed"),
    "no id": (b"//#1\n", "signal.malformed"),
    "bytes that are no text": (b"\xff\xfe\x00\x01//#1\n", "signal.malformed"),
    "text that is no URL": (b"//[half-an-ipv6#1\n", "signal.malformed"),
    "an over-long line": (OVER_LONG, "signal.over_long"),
    "an over-long line in pieces of a megabyte": (b"x" * (1 << 20) + b"\n", "signal.over_long"),
}


@pytest.fixture(scope="module")
def victims() -> Iterator[dict[str, Tunnel]]:
    """Clients of ours, one for each bad line, in one process; each with a v1 server that will say anything."""
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(V1Server()) for name in (*HARMLESS, *LOGGED)}
        target = stack.enter_context(Target())
        addresses = [server.tunnel_address for server in servers.values()]
        clients = stack.enter_context(OurClients(addresses, target.address, env=SMALL))
        for server in servers.values():
            clients.wait_for_tunnel(server.tunnel_address, "server.connected")
            until(lambda: server.connects, what="the server has not counted its client")  # noqa: B023  # called here
        yield {name: Tunnel(server, clients, target) for name, server in servers.items()}


@pytest.mark.parametrize("name", HARMLESS)
def test_our_client_passes_over(victims: dict[str, Tunnel], name: str) -> None:
    victim = victims[name]
    connects = victim.v1_server.connects
    victim.v1_server.write(HARMLESS[name])
    victim.assert_works()
    assert victim.v1_server.connects == connects


@pytest.mark.parametrize("name", LOGGED)
def test_our_client_logs_and_survives(victims: dict[str, Tunnel], name: str) -> None:
    victim, (line, event) = victims[name], LOGGED[name]
    assert isinstance(victim.client, OurClients)
    victim.v1_server.write(line)
    victim.client.wait_for_tunnel(victim.v1_server.tunnel_address, event, level="warn")
    assert max(map(len, victim.client.lines)) < 1500, "rubbish must not fill the log"
    victim.assert_works()


@pytest.mark.programs
def test_a_flood_of_launches_for_unknown_ids_is_survived(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V1Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=BRISK))
    client.wait_until_connected()
    before = client.settled_descriptors()
    server.write(UNKNOWN_ID * 5_000)
    client.wait_for("launch.unknown", level="warn")
    until(lambda: serves_soon(server, target), what="serves nobody after the flood")
    target.drain()  # of visitors that had to wait for longer than they were asked to
    client.wait_for_descriptors(before)


def serves_soon(server: V1Server | OurServer, target: Target) -> bool:
    """A launch that comes while the queue is full is dropped, or its visitor reset as soon as it comes: ask again."""
    try:
        with connect(server.visitor_address):
            target.accept(timeout=0.3).close()
    except (TimeoutError, ConnectionResetError):
        return False
    return True


@pytest.mark.programs
def test_a_control_connection_cut_in_the_middle_of_a_line_is_made_again(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(V1Server())
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    mark = client.mark()
    server.write(b"//dead")
    server.drop_client()
    client.wait_for("server.disconnected", after=mark, reason="closed")
    client.wait_until_connected(after=mark)
    Tunnel(server, client, target).assert_works()


GREETINGS = {
    "no port": b"//#0\n",
    "a port out of range": b"//99999#0\n",
    "an unknown TLS mode": b"//10101#7\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "rubbish": b"\xff\xff\xff\xff\n",
    "an over-long line": b"a" * 10_000,
    "silence": b"",
}


@pytest.mark.programs
def test_our_client_leaves_a_server_with_a_bad_greeting(stack: contextlib.ExitStack) -> None:
    servers = {name: stack.enter_context(V1Server(greeting=each, heartbeat=None)) for name, each in GREETINGS.items()}
    env = {**CALM, "HANDSHAKE_TIMEOUT": "300ms"}
    addresses = [server.tunnel_address for server in servers.values()]
    clients = stack.enter_context(OurClients(addresses, ("127.0.0.1", 9), env=env))
    for name, server in servers.items():
        reason = "timeout" if name == "silence" else one_of("protocol", "timeout")
        entry = clients.wait_for_tunnel(server.tunnel_address, "server.unreachable", level="warn", reason=reason)
        assert len(entry.line) < 1500
    assert clients.is_running
    assert not clients.find_crashes()


BAD_IDS = {"no hex": b"zzzzzzzz", "bytes": b"\xff" * 8, "too short": b"abc", "a line": b"ab\ncd\0ef"}


def every_second(bad: bytes) -> Callable[[], bytes]:
    """Make ids of data connections, of which every second one is bad."""
    numbers = count()
    return lambda: bad if (number := next(numbers)) % 2 else b"%08x" % number


@pytest.mark.programs
def test_our_client_drops_a_data_connection_with_a_bad_id(stack: contextlib.ExitStack) -> None:
    """The pool is filled with the others."""
    servers = [stack.enter_context(V1Server(make_id=every_second(bad))) for bad in BAD_IDS.values()]
    target = stack.enter_context(Target())
    env = {**CALM, "HANDSHAKE_TIMEOUT": "300ms"}
    addresses = [server.tunnel_address for server in servers]
    clients = stack.enter_context(OurClients(addresses, target.address, env=env))
    for server in servers:
        reason = one_of("protocol", "timeout")
        clients.wait_for_tunnel(server.tunnel_address, "data.dial_failed", level="warn", reason=reason)
        until(lambda: serves_soon(server, target), what="serves nobody")  # noqa: B023  # called here
    assert not clients.find_crashes()


@pytest.mark.programs
def test_one_id_for_every_data_connection_is_survived(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(V1Server(make_id=lambda: b"deadbeef"))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    until(lambda: serves_soon(server, target), what="serves nobody")
    assert client.count_descriptors() < 200
    assert not client.find_crashes()


TALK = {
    "nothing": b"",
    "another protocol": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "rubbish": b"\0\xff" * 2000,
    "a line without end": b"a" * 100_000,
}


def test_our_server_survives_strangers_on_the_tunnel_port(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer())
    for talk in [*TALK.values()] * 5:
        stranger = connect(server.tunnel_address)
        with contextlib.suppress(ConnectionError):
            stranger.sendall(talk)
        abort(stranger)
    reset(connect(server.tunnel_address))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    Tunnel(server, client, target).assert_works()
    assert not server.find_crashes()


@pytest.mark.parametrize("name", ["server", pytest.param("client", marks=pytest.mark.programs)])
def test_running_out_of_descriptors_is_survived_and_does_not_fill_the_log(tunnel: TunnelFactory, name: str) -> None:
    started = tunnel(server_env={**CALM, "POOL_GET_TIMEOUT": "500ms"})
    run: Nodepass = started.our_server if name == "server" else started.our_client
    limit = run.settled_descriptors() + 20
    _, hard = resource.prlimit(run.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(run.pid, resource.RLIMIT_NOFILE, (limit, hard))
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(connect(started.visitor_address))
        run.wait_for(level=loud, error=EXHAUSTED)
        until(lambda: run.count_descriptors() > limit - 5)
    started.target.drain()
    until(lambda: serves_soon(started.server, started.target), what="serves nobody afterwards")
    assert len(run.find(error=EXHAUSTED)) < 20


@pytest.mark.programs
def test_a_second_client_does_not_disturb_the_first(tunnel: TunnelFactory) -> None:
    started = tunnel()
    with V1Client(started.our_server.tunnel_address, pool=2) as second:
        with started.session() as (visitor, service):
            for _ in range(3):
                started.assert_works()
            visitor.sendall(b"x")
            assert service.recv(1) == b"x"
        assert second.idle == 0
    started.assert_works()


def test_a_client_that_talks_on_the_control_connection_is_survived(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(OurServer())
    target = stack.enter_context(Target())
    client = stack.enter_context(V1Client(server.tunnel_address, target.address))
    client.wait_until_full()
    client.write(b"rubbish\n" + OVER_LONG)
    until(lambda: serves_through(server, target), what="serves nobody after rubbish")
    assert not server.find_crashes()


def serves_through(server: OurServer, target: Target) -> bool:
    with connect(server.visitor_address) as visitor:
        try:
            with target.accept(timeout=0.5) as service:
                service.shutdown(socket.SHUT_WR)
                return is_over(visitor)
        except TimeoutError:
            return False
