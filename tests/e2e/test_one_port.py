"""`DATA_PORT=tunnel`: one port for everything, with peers of both versions, mapped ports and strangers."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.proc import count_connections
from tests.support.process import Environment
from tests.support.sockets import connect, is_over, reset
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Pair, Tunnel, assert_connected, open_tunnel
from tests.support.v1_client import V1Client
from tests.support.v2_tunnel import KEYED, SECRET, V2Pair, open_v2_tunnel
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.middle import Forwarder
from tests.support.wire2.ours import OurClients, OurServers

ONE_PORT: Environment = {"DATA_PORT": "tunnel"}
ENV: Environment = {**CALM, **ONE_PORT}
PAIRS = [V2Pair("ours", "ours", 1, True), V2Pair("ours", "v2", 2), V2Pair("v2", "ours", 0)]

STRANGERS = {
    "garbage": bytes(range(256)),
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: example.test\r\n\r\n",
    "a TLS record that is none": b"\x16\x03\x01\x00\x05hello",
    "half a line": b"//da",
    "a line that goes on": b"//database\n",
    "a data connection without a sid": b"//data\n",
    "a data connection of another server": b"//data?sid=" + b"0" * 32 + b"\n",
    "a long line": b"//hello?" + b"x" * 9000,
    "nothing": b"",
}


@pytest.fixture(scope="module", params=PAIRS, ids=str)
def one_port(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Tunnel]:
    """A v2 tunnel on one port, with every side and every TLS mode once."""
    with open_v2_tunnel(request.param, authority, ONE_PORT) as tunnel:
        yield tunnel


def assert_all_works(tunnel: Tunnel) -> None:
    """Carry more sessions than the pool holds, several at once, and a datagram."""
    with contextlib.ExitStack() as stack:
        for visitor, service in [stack.enter_context(tunnel.session()) for _ in range(10)]:
            assert_connected(visitor, service)
    for _ in range(10):
        tunnel.assert_works()
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


def test_a_v2_tunnel_works_on_one_port(one_port: Tunnel) -> None:
    assert_all_works(one_port)


def test_the_offer_names_the_tunnel_port_and_says_so() -> None:
    with OurServer(env=ENV) as server, ClientSide(server.tunnel_address) as client:
        client.connect()
        assert client.is_mux
        assert client.sid
        assert int(client.offer.host) == server.tunnel_address[1]


@pytest.mark.programs
def test_our_client_connects_nowhere_else(stack: contextlib.ExitStack) -> None:
    """The number in the signal is for v1: a v2 client follows the address at which it reached the server."""
    server = stack.enter_context(OurServer(env=ENV))
    target = stack.enter_context(Target())
    mapped = stack.enter_context(Forwarder(server.tunnel_address))
    client = stack.enter_context(OurClient(mapped.address, target.address))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    assert_all_works(tunnel)
    assert count_connections(client.pid, mapped.address[1]) > 1
    assert count_connections(client.pid, server.tunnel_address[1]) == 0


@pytest.mark.programs
def test_a_mapped_port_works_with_tls_and_a_key(stack: contextlib.ExitStack) -> None:
    env = {**KEYED, **ONE_PORT}
    server = stack.enter_context(OurServer(1, env=env))
    target = stack.enter_context(Target())
    mapped = stack.enter_context(Forwarder(server.tunnel_address))
    client = stack.enter_context(OurClient(mapped.address, target.address, query="tls=1", env=env))
    client.wait_until_connected()
    assert_all_works(Tunnel(server, client, target))


@pytest.mark.programs
def test_a_v1_client_on_one_port_comes_back(authority: Authority) -> None:
    with open_tunnel(Pair("ours", "v1", 1), authority, server_env=ENV) as tunnel:
        before = tunnel.v1_client.connects
        mark = tunnel.our_server.mark()
        tunnel.v1_client.disconnect()
        tunnel.our_server.wait_for("client.disconnected", after=mark)
        tunnel.our_server.wait_for_client(after=mark)
        assert_all_works(tunnel)
        assert tunnel.v1_client.connects > before


@pytest.mark.programs
def test_a_client_of_the_other_version_may_follow(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=ENV))
    target = stack.enter_context(Target())
    for kind in (V1Client, V2Client):
        mark = server.mark()
        with kind(server.tunnel_address, target.address) as client:
            client.wait_until_full()
            assert_all_works(Tunnel(server, client, target))
        server.wait_for("client.disconnected", after=mark)


@pytest.mark.programs
@pytest.mark.parametrize("env", [ENV, {**KEYED, **ONE_PORT}], ids=["without a key", "with a key"])
def test_strangers_on_the_tunnel_port_harm_nobody(stack: contextlib.ExitStack, env: Environment) -> None:
    server = stack.enter_context(OurServer(1, env={**env, "HANDSHAKE_TIMEOUT": "1s"}))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    staying = [talk_to(server, begin, stack) for begin in STRANGERS.values()]
    for begin in STRANGERS.values():
        talk_to(server, begin, stack).shutdown(socket.SHUT_WR)
        reset(talk_to(server, begin, stack))
    tunnel.assert_works()
    for stranger in staying:
        assert_is_closed(stranger)
    tunnel.assert_works()
    assert not server.find("client.disconnected") + server.find_crashes()


@pytest.mark.programs
def test_silent_strangers_by_the_hundred_do_not_keep_data_connections_out(stack: contextlib.ExitStack) -> None:
    """They may hold what they hold for HANDSHAKE_TIMEOUT: nobody who speaks waits for those who do not."""
    env = {**KEYED, **ONE_PORT, "HANDSHAKE_TIMEOUT": "60s"}
    server = stack.enter_context(OurServer(env=env))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tls=0", env=env))
    client.wait_until_connected()
    for _ in range(200):
        talk_to(server, b"", stack)
    assert_all_works(Tunnel(server, client, target))


def talk_to(server: OurServer, begin: bytes, stack: contextlib.ExitStack) -> socket.socket:
    """A stranger who has connected and begun in this way."""
    stranger = stack.enter_context(connect(server.tunnel_address))
    stranger.sendall(begin)
    return stranger


NAMES = ("a", "b", "c")


@pytest.mark.programs
def test_tunnels_of_many_names_share_a_tunnel_port_and_keep_apart(
    authority: Authority, stack: contextlib.ExitStack
) -> None:
    env = {**KEYED, **ONE_PORT, "SSL_CERT_FILE": str(authority.crt)}
    queries = {name: f"tls=2&name={name}" for name in NAMES}
    servers = stack.enter_context(OurServers(queries, authority.local, env=env, shares_port=True))
    assert len({servers[name].tunnel for name in NAMES}) == 1
    targets = {name: stack.enter_context(Target()) for name in NAMES}
    where = {name: (servers[name].tunnel, queries[name]) for name in NAMES}
    addresses = {name: target.address for name, target in targets.items()}
    clients = stack.enter_context(OurClients(where, addresses, env=env))
    for name in NAMES:
        clients.wait_in(name, "server.connected", wire=2, tls=2)
    for _ in range(10):
        for name in NAMES:
            with connect(servers[name].visitors) as visitor, targets[name].accept() as service:
                assert_connected(visitor, service)


def assert_is_closed(stranger: socket.socket) -> None:
    """Whatever a stranger is told, and it may be told why, in the end he is shown out."""
    while not is_over(stranger):
        pass


@pytest.mark.programs
def test_strangers_before_any_client_harm_nobody(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env={**KEYED, **ONE_PORT, "HANDSHAKE_TIMEOUT": "1s"}))
    for begin in STRANGERS.values():
        talk_to(server, begin, stack)
    target = stack.enter_context(Target())
    client = stack.enter_context(V2Client(server.tunnel_address, target.address, secret=SECRET))
    client.wait_until_full()
    assert_all_works(Tunnel(server, client, target))


@pytest.mark.programs
def test_silence_is_a_v1_client_after_a_quarter_of_a_second(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(env=ENV))
    began = time.monotonic()
    with connect(server.tunnel_address) as silent:
        assert silent.recv(100) == b"//%d#0\n" % server.tunnel_address[1]
    assert time.monotonic() - began >= 0.2
