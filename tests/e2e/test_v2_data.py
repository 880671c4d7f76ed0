"""Who may bring data connections: with a key whoever proves each one, without a key the client's address only."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator

import pytest

from tests.support.sockets import PATIENCE, connect, is_silent
from tests.support.tunnel import OurServer, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v1_stream import PlainStream, Stream
from tests.support.v2_client import Prove, V2Client
from tests.support.v2_tunnel import KEYED, SECRET

GOOD = 3
ELSEWHERE = "127.0.0.2"
GUARDED = {**KEYED, "HANDSHAKE_TIMEOUT": "1500ms"}


def flipped(proof: bytes) -> bytes:
    return bytes([proof[0] ^ 1]) + proof[1:]


@pytest.fixture
def led(request: pytest.FixtureRequest) -> Iterator[tuple[OurServer, V2Client]]:
    """Our keyed server and a client with the key that a test leads."""
    server = OurServer(getattr(request, "param", 0), env=GUARDED)
    with server, V2Client(server.tunnel_address, secret=SECRET, automatic=False) as client:
        client.connect()
        yield server, client


in_the_clear_and_inside_tls = pytest.mark.parametrize("led", [0, 1], ids=["tls0", "tls1"], indirect=True)


def is_closed(stream: Stream) -> bool:
    """Wait for the server to end a data connection; False if it says something or keeps it."""
    try:
        return stream.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def assert_only_these_serve(server: OurServer, client: V2Client, good: dict[str, Stream]) -> None:
    """Send as many visitors as there are good data connections: each must be served by one of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(len(good)):
            visitor = stack.enter_context(connect(server.visitor_address))
            visitor.sendall(b"hello")
            identity, kind = client.next_launch()
            assert kind == 1
            assert identity in good, "a data connection that proved nothing was launched"
            stream = good.pop(identity)
            assert stream.recv(5) == b"hello"
            stream.send(b"world")
            assert visitor.recv(5) == b"world"


def bad_proofs(client: V2Client, other: bytes) -> dict[str, Prove]:
    """Ways to get the proof of a data connection wrong; `other` is the id of another one."""
    return {
        "zeros": lambda _: bytes(32),
        "one bit off": lambda identity: flipped(client.prove(identity)),
        "backwards": lambda identity: client.prove(identity)[::-1],
        "of another connection": lambda _: client.prove(other),
        "of the control connection": lambda _: bytes.fromhex(client.transcript.client_proof()),
        "in hex": lambda identity: client.prove(identity).hex().encode(),
        "the session key": lambda _: client.transcript.session_key(),
    }


@in_the_clear_and_inside_tls
def test_a_wrong_proof_never_enters_the_pool_and_is_closed(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    first, stream = client.open_data()
    bad = [client.open_data(prove=prove)[1] for prove in bad_proofs(client, first.encode()).values()]
    good = {first: stream, **dict(client.open_data() for _ in range(GOOD))}
    for refused in bad:
        assert is_closed(refused)
    assert_only_these_serve(server, client, good)
    assert not server.find_crashes()


@in_the_clear_and_inside_tls
def test_a_proof_that_is_absent_or_cut_short_never_enters_the_pool(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    silent = [client.open_data(prove=lambda _: b"")[1] for _ in range(3)]
    short = [client.open_data(prove=lambda identity: client.prove(identity)[:31])[1] for _ in range(3)]
    good = dict(client.open_data() for _ in range(GOOD))
    assert_only_these_serve(server, client, good)
    for stream in silent + short:
        assert is_closed(stream)  # HANDSHAKE_TIMEOUT is over


@in_the_clear_and_inside_tls
def test_a_proof_in_two_pieces_is_right(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    identity, stream = client.open_data(prove=lambda each: client.prove(each)[:10])
    if isinstance(stream, PlainStream):
        assert is_silent(stream.sock, 0.1)
    stream.send(client.prove(identity.encode())[10:])
    assert_only_these_serve(server, client, {identity: stream})


def test_a_proof_of_an_earlier_session_is_worthless(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    earlier = client.transcript
    client.disconnect()
    client.connect()
    assert earlier.session_key() != client.transcript.session_key()
    _, replayed = client.open_data(prove=earlier.data_proof)
    good = dict(client.open_data() for _ in range(GOOD))
    assert is_closed(replayed)
    assert_only_these_serve(server, client, good)


def test_bytes_behind_the_proof_never_pass_for_a_good_connection(led: tuple[OurServer, V2Client]) -> None:
    """An idle data connection on which its client speaks is dead: visitors go to the others."""
    server, client = led
    client.open_data(prove=lambda identity: client.prove(identity) + b"x")
    good = dict(client.open_data() for _ in range(GOOD))
    assert_only_these_serve(server, client, good)


def test_a_refused_proof_is_counted_and_logged(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    _, stream = client.open_data(prove=lambda _: bytes(32))
    assert is_closed(stream)
    server.wait_for("data.rejected", level="warn", reason="protocol")


def data_connection(client: V1Client, source: str) -> socket.socket:
    return socket.create_connection(client.data_address, PATIENCE, (source, 0))


@pytest.mark.parametrize("kind", [V1Client, V2Client], ids=["wire v1", "wire v2"])
@pytest.mark.parametrize("port", ["0", "tunnel"], ids=["two ports", "one port"])
def test_without_a_key_data_connections_from_another_address_are_refused(kind: type[V1Client], port: str) -> None:
    server = OurServer(env={"DATA_PORT": port})
    with server, kind(server.tunnel_address, automatic=False) as client:
        client.connect()
        with data_connection(client, ELSEWHERE) as foreign:
            if port == "tunnel":
                foreign.sendall(b"//data\n")
            assert is_closed(PlainStream(foreign))
        good = dict(client.open_data() for _ in range(GOOD))
        with connect(server.visitor_address) as visitor:
            identity, _ = client.next_launch()
            stream = good[identity]
            assert isinstance(stream, PlainStream)
            stream.sock.settimeout(PATIENCE)
            assert_connected(visitor, stream.sock)
        server.wait_for("data.rejected", level="warn", reason="wrong_address", peer=re.compile(rf"^{ELSEWHERE}:"))


def test_with_a_key_data_connections_may_come_from_another_address(led: tuple[OurServer, V2Client]) -> None:
    server, client = led
    foreign = data_connection(client, ELSEWHERE)
    stream = PlainStream(foreign)
    identity = stream.recv(8)
    stream.send(client.prove(identity))
    assert_only_these_serve(server, client, {identity.decode(): stream})
    foreign.close()
