"""Which client a server of ours serves: the same one again at once, another one only from an incumbent that is dead."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.process import Environment
from tests.support.sockets import abort, connect, is_silent
from tests.support.target import Target
from tests.support.tunnel import OurClient, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.wire2 import lines
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide, GoodbyeError
from tests.support.wire2.middle import Forwarder
from tests.support.wire2.ours import Member, OurClients, spare_servers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.talk import Rejected, Talk, dial

PROBE = 1.0
"""Seconds that an incumbent has to show life."""

MARGIN = 6.0
"""Seconds that a loaded machine may add."""

SLOW: Environment = {"REPORT_INTERVAL": "30s", "SERVICE_COOLDOWN": "300ms"}
"""With these no heartbeat finds anybody dead during a test, or keeps anybody alive."""

ANY = re.compile("")

KEYS = {"without a key": "", "with a key": SECRET}


@pytest.fixture(params=KEYS)
def secret(request: pytest.FixtureRequest) -> str:
    return KEYS[request.param]


@pytest.fixture(scope="module")
def open_servers() -> Iterator[Iterator[Member]]:
    with spare_servers(16, "tls=0", env=SLOW, is_keyed=False) as servers:
        yield servers


@pytest.fixture(scope="module")
def keyed_servers() -> Iterator[Iterator[Member]]:
    with spare_servers(16, "tls=0", env={**SLOW, "TUNNEL_KEY": SECRET}, is_keyed=True) as servers:
        yield servers


@pytest.fixture
def open_server(open_servers: Iterator[Member]) -> Member:
    return next(open_servers)


@pytest.fixture
def keyed_server(keyed_servers: Iterator[Member]) -> Member:
    return next(keyed_servers)


@pytest.fixture
def server(secret: str, request: pytest.FixtureRequest) -> Member:
    found: Member = request.getfixturevalue("keyed_server" if secret else "open_server")
    return found


@contextlib.contextmanager
def connected(server: Member, secret: str, **given: object) -> Iterator[ClientSide]:
    with ClientSide(server.tunnel_address, secret=secret, name=server.name, **given) as client:  # type: ignore[arg-type]
        client.connect()
        yield client


@contextlib.contextmanager
def answering(client: ClientSide) -> Iterator[list[str]]:
    """Let a client answer heartbeats, in a thread; what it is told at the end."""
    told: list[str] = []

    def answer() -> None:
        try:
            client.hear_launch(timeout=30)
        except GoodbyeError as goodbye:
            told.append(str(goodbye))
        except OSError:
            told.append("")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield told
    finally:
        with contextlib.suppress(OSError):
            client.talk.sock.shutdown(2)
        thread.join(30)


def what_is_left(talk: Talk) -> list[bytes]:
    """The lines of a connection up to its end, which has to come."""
    return talk.rest().splitlines()


def test_the_same_client_takes_its_place_again_at_once(server: Member, secret: str) -> None:
    """And is not asked for a sign of life before: the old connection may be dead without a word."""
    with connected(server, secret) as old:
        identity, talk = old.open_data()
        visitor = connect(server.visitor_address)
        assert old.hear_launch().host == identity
        began = time.monotonic()
        with visitor, connected(server, secret, identity=old.identity) as new:
            assert time.monotonic() - began < PROBE
            assert b"//beat" not in b"".join(what_is_left(old.talk))
            visitor.sendall(b"runs on")
            assert talk.receive_exactly(7) == b"runs on"
            identity, talk = new.open_data()
            with connect(server.visitor_address):
                assert new.hear_launch().host == identity
        server.wait_for("client.returned", incumbent=ANY)
    server.wait_for("client.disconnected", reason="returned")


def test_the_old_control_connection_has_ended_before_the_new_offer_is_written(server: Member, secret: str) -> None:
    with connected(server, secret) as old, connected(server, secret, identity=old.identity):
        old.talk.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            what_is_left(old.talk)


def test_data_connections_of_the_old_connection_are_closed(server: Member, secret: str) -> None:
    with connected(server, secret) as old:
        _, idle = old.open_data()
        with connected(server, secret, identity=old.identity):
            assert idle.rest() == b""


def test_another_client_is_busy_while_the_incumbent_answers(server: Member, secret: str) -> None:
    with connected(server, secret) as incumbent, answering(incumbent) as told:
        began = time.monotonic()
        with ClientSide(server.tunnel_address, secret=secret, name=server.name, demand=incumbent.tls) as other:
            with pytest.raises(Rejected, match="busy"):
                other.connect()
            assert other.talk.is_ended_by_peer()
        assert time.monotonic() - began < PROBE + MARGIN
        assert not told
        server.wait_for("client.rejected", level="warn", reason="busy")
        assert not server.find("client.disconnected")


def test_another_client_replaces_an_incumbent_that_gives_no_sign_of_life(server: Member, secret: str) -> None:
    with connected(server, secret) as silent:
        identity, talk = silent.open_data()
        visitor = connect(server.visitor_address)
        assert silent.hear_launch().host == identity
        with visitor, connected(server, secret) as other:
            left = what_is_left(silent.talk)
            assert left[0].startswith(b"//beat?idle=")
            assert left[-1] == b"//bye?reason=replaced"
            visitor.sendall(b"runs on")
            assert talk.receive_exactly(7) == b"runs on"
            identity, _ = other.open_data()
            with connect(server.visitor_address):
                assert other.hear_launch().host == identity
        server.wait_for("client.replaced", level="warn")
    server.wait_for("client.disconnected", reason="silent", error=re.compile("replaced"))


def test_a_newcomer_that_is_gone_by_then_changes_nothing(server: Member, secret: str) -> None:
    with connected(server, secret) as incumbent:
        with ClientSide(server.tunnel_address, secret=secret, name=server.name, demand=incumbent.tls) as other:
            other.begin()
            if secret:
                other.hear_challenge()
                other.authenticate()
            incumbent.take_beat(incumbent.talk.hear())
        assert incumbent.talk.is_silent(PROBE + 0.3), "it was replaced for a client that has gone"
        incumbent.talk.say("//beat?ok=1")
        identity, _ = incumbent.open_data()
        with connect(server.visitor_address):
            assert incumbent.hear_launch().host == identity
        assert not server.find("client.disconnected")


def all_at_once(clients: list[ClientSide]) -> list[str]:
    """Connect all of them at the same time; what each is told: an offer, an error's token, or nothing."""
    told = [""] * len(clients)

    def connect_one(number: int) -> None:
        try:
            clients[number].connect()
        except Rejected as rejected:
            told[number] = str(rejected)
        except OSError:
            told[number] = "ended"
        else:
            told[number] = "offer"

    threads = [threading.Thread(target=connect_one, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_of_many_connections_of_one_client_one_keeps_the_place(server: Member, secret: str) -> None:
    """A client that comes again before its last attempt has ended."""
    with contextlib.ExitStack() as stack:
        made = [
            ClientSide(server.tunnel_address, secret=secret, name=server.name, identity="0" * 16) for _ in range(12)
        ]
        clients = [stack.enter_context(client) for client in made]
        told = all_at_once(clients)
        assert "offer" in told
        assert set(told) <= {"offer", "ended", "busy"}, told
        alive = [client for client, what in zip(clients, told, strict=True) if what == "offer" and is_alive(client)]
        assert len(alive) == 1
        identity, _ = alive[0].open_data()
        with connect(server.visitor_address):
            assert alive[0].hear_launch().host == identity


def is_alive(client: ClientSide) -> bool:
    """Whether the server still keeps its control connection."""
    return client.talk.is_silent(0.3)


def test_of_many_newcomers_one_replaces_a_silent_incumbent(server: Member, secret: str) -> None:
    with connected(server, secret) as incumbent, contextlib.ExitStack() as stack:
        made = [ClientSide(server.tunnel_address, secret=secret, name=server.name) for _ in range(4)]
        told = all_at_once([stack.enter_context(client) for client in made])
        assert "offer" in told
        assert set(told) <= {"offer", "ended", "busy", "key-required"}, told
        assert what_is_left(incumbent.talk)[-1] == b"//bye?reason=replaced"
        alive = [client for client, what in zip(made, told, strict=True) if what == "offer" and is_alive(client)]
        assert len(alive) <= 1


def test_without_a_key_another_address_is_another_client(open_server: Member) -> None:
    """Whoever has read a hello could say `client=` as well."""
    server = open_server
    with connected(server, "") as incumbent, answering(incumbent) as told:
        copy = ClientSide(server.tunnel_address, identity=incumbent.identity, source="127.0.0.2")
        with copy, pytest.raises(Rejected, match="busy"):
            copy.connect()
        assert not told


def test_with_a_key_the_same_client_may_come_from_another_address(keyed_server: Member) -> None:
    with connected(keyed_server, SECRET) as old:
        began = time.monotonic()
        with connected(keyed_server, SECRET, identity=old.identity, source="127.0.0.2"):
            assert time.monotonic() - began < PROBE
            old.talk.rest()


def test_a_client_that_does_not_prove_the_key_takes_no_place(keyed_server: Member) -> None:
    with connected(keyed_server, SECRET) as incumbent:
        wrong = ClientSide(
            keyed_server.tunnel_address,
            secret="another secret that is long",
            name=keyed_server.name,
            identity=incumbent.identity,
        )
        with wrong, pytest.raises(Rejected, match="key-mismatch"):
            wrong.connect()
        assert incumbent.talk.is_silent(0.2)


@pytest.mark.parametrize(
    "secret", ["with a key", pytest.param("without a key", marks=pytest.mark.programs)], indirect=True
)
def test_our_second_client_says_that_another_one_is_connected_and_comes_again(secret: str, server: Member) -> None:
    env = {**SLOW, "TUNNEL_KEY": secret} if secret else SLOW
    where = {"": (server.tunnel_address, f"tls=0&name={server.name}")}
    with (
        Target() as target,
        OurClients(where, target.address, env=env) as first,
        contextlib.ExitStack() as stack,
    ):
        first.wait_for("server.connected")
        second = stack.enter_context(OurClients(where, target.address, env=env))
        second.wait_for("server.rejected", level="error", reason="busy")
        server.wait_for("client.rejected", level="warn", reason="busy")
        assert not first.find("server.disconnected")
        mark = second.mark()
        first.stop()
        second.wait_for("server.connected", after=mark)
        with connect(server.visitor_address) as visitor, target.accept() as service:
            assert_connected(visitor, service)


def test_our_client_comes_back_to_its_own_place(open_server: Member) -> None:
    """What is left of a connection that was cut on the way does not keep it out."""
    server = open_server
    with Target() as target, Cut(server.tunnel_address) as way:
        client = OurClient(way.address, target.address, env=SLOW)
        with client:
            client.wait_until_connected()
            mark = client.mark()
            way.cut()
            client.wait_until_connected(after=mark)
            server.wait_for("client.returned")
            assert not client.find("server.rejected")


class Cut(Forwarder):
    """A forwarder whose near side can be cut while its far side stays as it is: the server is not told."""

    def forward(self, near: socket.socket) -> None:
        far = self.workers.own(connect(self._behind))
        far.settimeout(None)
        self.workers.spawn(lambda: pump(far, near))
        pump(near, far)

    def cut(self) -> None:
        """End every connection of the client, and no connection to the server."""
        for sock in self.near:
            abort(sock)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Copy, and tell the other side nothing of an end."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)


@pytest.mark.parametrize("newcomer", ["silent", "hello"])
def test_a_v1_client_is_protected_by_the_acknowledgements_of_tcp(open_server: Member, newcomer: str) -> None:
    server = open_server
    with (
        Target() as target,
        V1Client(server.tunnel_address, target.address) as first,
    ):
        first.wait_until_full()
        with dial(server.tunnel_address) as second:
            if newcomer == "hello":
                second.say(lines.make_hello())
            assert second.rejection(PROBE + MARGIN) == "busy"
        Tunnel(server, first, target).assert_works()
        assert first.connects == 1


def test_sessions_of_a_client_that_lost_its_place_run_on(open_server: Member) -> None:
    server = open_server
    with Target() as target, connected(server, "") as first:
        identity, talk = first.open_data()
        with connect(server.visitor_address) as visitor:
            assert first.hear_launch().host == identity
            with V2Client(server.tunnel_address, target.address) as second:
                second.wait_until_full()
                Tunnel(server, second, target).assert_works()
                visitor.sendall(b"ping")
                assert talk.receive_exactly(4) == b"ping"
                assert is_silent(visitor, 0.05)
