"""Data connections: whose they are, what either end proves on them, and what is closed."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator

import pytest
from OpenSSL import SSL

from tests.support.certificates import Authority
from tests.support.log import loud
from tests.support.process import Environment
from tests.support.sockets import PATIENCE, connect, is_silent, until
from tests.support.tunnel import CALM, OurServer
from tests.support.v1_client import V1Client
from tests.support.wire2 import lines
from tests.support.wire2.client_side import ClientSide, Prove
from tests.support.wire2.ours import Member, OurServers, Place, spare_servers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.server_side import Terms
from tests.support.wire2.stage import attached
from tests.support.wire2.talk import Talk, dial
from tests.support.wire2.tls import client_context

ELSEWHERE = "127.0.0.2"
IDENTITY = lines.make_client()
GOOD = 3
TLS = {"clear": 0, "tls": 1, "verified": 2}
GUARDED: Environment = {**CALM, "HANDSHAKE_TIMEOUT": "1500ms"}
KEYED: Environment = {**GUARDED, "TUNNEL_KEY": SECRET}
ONE_PORT: Environment = {"DATA_PORT": "tunnel"}


@pytest.fixture(scope="module")
def keyed(authority: Authority) -> Iterator[OurServers]:
    queries = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls"}
    with OurServers(queries, authority.local, env=KEYED) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def keyed_one_port(authority: Authority) -> Iterator[OurServers]:
    queries = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls"}
    with OurServers(queries, authority.local, env={**KEYED, **ONE_PORT}) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def shared(authority: Authority) -> Iterator[OurServers]:
    """Two tunnels on one tunnel port, without a key and without TLS."""
    queries = {"": "tls=0", "web": "tls=0&name=web"}
    with OurServers(queries, authority.local, env=GUARDED, shares_port=True) as running:
        yield running
        assert not running.find_crashes()


@contextlib.contextmanager
def led(servers: OurServers, label: str, **given: object) -> Iterator[tuple[Place, ClientSide]]:
    """A client with the key that a test leads, connected."""
    right = {"identity": IDENTITY, "secret": SECRET, "name": label, "demand": TLS.get(label, 0)}
    with ClientSide(servers[label].tunnel, **{**right, **given}) as client:  # type: ignore[arg-type]
        client.connect()
        yield servers[label], client


in_the_clear_and_inside_tls = pytest.mark.parametrize("label", ["clear", "tls"])


def assert_only_these_serve(place: Place, client: ClientSide, good: dict[str, Talk]) -> None:
    """Send as many visitors as there are good data connections: each must be served by one of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(len(good)):
            visitor = stack.enter_context(connect(place.visitors))
            visitor.sendall(b"hello")
            launch = client.hear_launch()
            assert launch.fragment == "1"
            assert launch.host in good, "a data connection that proved nothing was launched"
            talk = good.pop(launch.host)
            assert talk.receive_exactly(5) == b"hello"
            talk.write(b"world")
            assert visitor.recv(5) == b"world"


def assert_serves(place: Place, client: ClientSide) -> None:
    """Check that the right data connections of this client serve visitors, and no others."""
    assert_only_these_serve(place, client, dict(client.open_data() for _ in range(GOOD)))


@in_the_clear_and_inside_tls
def test_an_id_comes_with_its_proof_and_the_right_answer_enters_the_pool(keyed: OurServers, label: str) -> None:
    with led(keyed, label) as (place, client):
        assert client.sid is None, "two ports, one tunnel and one client need no sid"
        assert_serves(place, client)  # each id's proof is checked


def bad_proofs(client: ClientSide, other: bytes) -> dict[str, Prove]:
    """Ways to get the proof of a data connection wrong; `other` is the id of another one."""
    agreed = client.agreement
    return {
        "zeros": lambda *_: bytes(32),
        "one bit off": lambda *what: bytes([client.prove(*what)[0] ^ 1]) + client.prove(*what)[1:],
        "backwards": lambda *what: client.prove(*what)[::-1],
        "of another connection": lambda _, channel: client.prove(other, channel),
        "of another channel": lambda identity, _: client.prove(identity, "00" * 32),
        "of the control connection": lambda *_: bytes.fromhex(agreed.client_proof()),
        "the id's proof sent back": agreed.id_proof,
        "in hex": lambda *what: client.prove(*what).hex().encode()[:32],
        "the session key": lambda *_: agreed.session_key(),
    }


@in_the_clear_and_inside_tls
def test_a_wrong_proof_never_enters_the_pool_and_is_closed(keyed: OurServers, label: str) -> None:
    mark = keyed.mark()
    with led(keyed, label) as (place, client):
        first, _ = client.open_data()
        bad = [client.open_data(prove)[1] for prove in bad_proofs(client, first.encode()).values()]
        if label == "tls":
            bad.append(client.open_data(lambda identity, _: client.prove(identity, ""))[1])
            bad.append(client.open_data(lambda identity, _: client.prove(identity, client.talk.channel))[1])
        for talk in bad:
            assert talk.rest() == b""
        keyed.wait_in(label, "data.rejected", after=mark, level="warn")
    with led(keyed, label) as (place, client):
        assert_serves(place, client)


@in_the_clear_and_inside_tls
def test_a_proof_that_is_absent_or_cut_short_never_enters_the_pool(keyed: OurServers, label: str) -> None:
    with led(keyed, label) as (place, client):
        silent = [client.open_data(lambda *_: b"")[1] for _ in range(2)]
        short = [client.open_data(lambda *what: client.prove(*what)[:31])[1] for _ in range(2)]
        assert_serves(place, client)
        for talk in silent + short:
            assert talk.rest() == b""  # HANDSHAKE_TIMEOUT is over


@in_the_clear_and_inside_tls
def test_a_proof_in_two_pieces_is_right(keyed: OurServers, label: str) -> None:
    with led(keyed, label) as (place, client):
        identity, talk = client.open_data(lambda *what: client.prove(*what)[:10])
        assert talk.is_silent(0.1)
        talk.write(client.prove(identity.encode(), talk.channel)[10:])
        assert_only_these_serve(place, client, {identity: talk})


def test_a_proof_of_an_earlier_control_connection_is_worthless(keyed: OurServers) -> None:
    with led(keyed, "clear") as (_, earlier):
        pass
    with led(keyed, "clear") as (place, client):
        assert earlier.agreement.session_key() != client.agreement.session_key()
        _, replayed = client.open_data(earlier.agreement.data_proof)
        assert replayed.rest() == b""
        assert_serves(place, client)


def test_bytes_behind_the_proof_never_pass_for_a_good_connection(keyed: OurServers) -> None:
    """An idle data connection on which its client speaks is dead: visitors go to the others."""
    with led(keyed, "clear") as (place, client):
        client.open_data(lambda *what: client.prove(*what) + b"x")
        assert_serves(place, client)


def test_with_a_key_data_connections_may_come_from_another_address(keyed: OurServers) -> None:
    for label in TLS.keys() & keyed.places.keys():
        with led(keyed, label) as (place, client):
            assert_only_these_serve(place, client, dict([client.open_data(source=ELSEWHERE)]))


# Whose a data connection is


def test_one_port_and_shared_ports_have_a_sid_that_is_never_the_same(
    keyed_one_port: OurServers, shared: OurServers
) -> None:
    sids = set()
    for servers, label in ((keyed_one_port, "clear"), (keyed_one_port, "tls"), (shared, ""), (shared, "web")):
        for _ in range(2):
            with led(servers, label, secret=SECRET if servers is keyed_one_port else "") as (place, client):
                assert client.is_mux == (servers is keyed_one_port)
                assert int(client.offer.host) == place.data[1]
                assert client.sid
                sids.add(client.sid)
                assert_serves(place, client)
    assert len(sids) == 8


STRANGE_LINES: dict[str, Callable[[ClientSide], bytes]] = {
    "an unknown sid": lambda _: b"//data?sid=" + b"0" * 32 + b"\n",
    "no sid": lambda _: b"//data\n",
    "an empty sid": lambda _: b"//data?sid=\n",
    "half a sid": lambda client: f"//data?sid={client.sid[:16]}\n".encode(),  # type: ignore[index]
    "a sid in upper case": lambda client: f"//data?sid={client.sid.upper()}x\n".encode(),  # type: ignore[union-attr]
    "a line that goes on": lambda client: f"//database?sid={client.sid}\n".encode(),
    "a long line": lambda client: f"//data?sid={client.sid}&x=".encode().ljust(600, b"y") + b"\n",
    "a carriage return": lambda client: f"//data?sid={client.sid}\r\n".encode(),
    "silence": lambda _: b"",
    "half a line": lambda client: f"//data?sid={client.sid}".encode(),
}


@pytest.mark.parametrize(("label", "ports"), [("clear", "one"), ("tls", "one"), ("clear", "two")])
def test_a_data_connection_that_is_no_client_s_is_closed(
    keyed_one_port: OurServers, shared: OurServers, label: str, ports: str
) -> None:
    servers, name = (keyed_one_port, label) if ports == "one" else (shared, "web")
    with led(servers, name, secret=SECRET if ports == "one" else "") as (place, client):
        talks = {strange: client.dial_data() for strange in STRANGE_LINES}
        for strange, talk in talks.items():
            talk.write(STRANGE_LINES[strange](client))
        assert_serves(place, client)
        told = {strange: talk.rest() for strange, talk in talks.items()}
        silent = told.pop("silence")  # in the clear it may have been taken for a control connection's
        assert silent in (b"", b"//error?reason=key-required\n", b"//%d#0\n" % place.data[1])
        allowed = (b"", b"//error?reason=key-required\n") if ports == "one" else (b"",)
        assert [strange for strange, said in told.items() if said not in allowed] == []


def test_the_sid_of_an_earlier_control_connection_is_unknown(keyed_one_port: OurServers) -> None:
    with led(keyed_one_port, "tls") as (_, earlier):
        pass
    with led(keyed_one_port, "tls") as (place, client):
        talk = client.dial_data()
        talk.say(f"//data?sid={earlier.sid}")
        assert talk.rest() == b""
        assert_serves(place, client)


def test_a_sid_reaches_its_own_tunnel_only(shared: OurServers) -> None:
    with led(shared, "", secret="") as (place, plain), led(shared, "web", secret="") as (other, web):
        assert place.tunnel == other.tunnel
        mine = dict(plain.open_data() for _ in range(GOOD))
        its = dict(web.open_data() for _ in range(GOOD))
        assert_only_these_serve(place, plain, mine)
        assert_only_these_serve(other, web, its)


def test_a_sid_with_more_parameters_is_understood(shared: OurServers) -> None:
    with led(shared, "web", secret="") as (place, client):
        talk = client.dial_data()
        talk.say(f"//data?sid={client.sid}&colour=blue&sid=0")
        assert_only_these_serve(place, client, {client.hear_id(talk).decode(): talk})


def test_a_line_in_the_clear_before_tls_is_closed(keyed_one_port: OurServers) -> None:
    """The first byte of everything is TLS: a firewall sees nothing else."""
    with led(keyed_one_port, "tls") as (place, client):
        with dial(client.data_address) as talk:
            talk.say(f"//data?sid={client.sid}")
            assert talk.rest() in (b"", b"//tls\n")
        assert_serves(place, client)


@pytest.mark.programs
def test_a_full_pool_closes_what_comes() -> None:
    env = {**GUARDED, "MIN_POOL_CAPACITY": "1", "MAX_POOL_CAPACITY": "2", "DATA_PORT": "tunnel"}
    with OurServers({"": "tls=0"}, env=env) as servers, led(servers, "", secret="") as (place, client):
        talks = [client.dial_data() for _ in range(40)]
        for talk in talks:
            talk.say(f"//data?sid={client.sid}")
        servers.wait_for("data.rejected", reason="pool_full")
        until(lambda: any(talk.is_ended() for talk in talks))
        with connect(place.visitors):
            client.hear_launch()


@pytest.fixture(scope="module", params=["0", "tunnel"], ids=["two ports", "one port"])
def port_and_servers(request: pytest.FixtureRequest) -> Iterator[tuple[str, Iterator[Member]]]:
    with spare_servers(2, "tls=0", env={**CALM, "DATA_PORT": request.param}, is_keyed=False) as servers:
        yield request.param, servers


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_without_a_key_data_connections_from_another_address_are_refused(
    port_and_servers: tuple[str, Iterator[Member]], kind: str
) -> None:
    port, server = port_and_servers[0], next(port_and_servers[1])
    with contextlib.ExitStack() as stack:
        if kind == "v1":
            client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
            client.connect()
            line, address = b"", client.data_address
            client.open_data()
        else:
            side = stack.enter_context(ClientSide(server.tunnel_address))
            side.connect()
            line, address = (f"//data?sid={side.sid}\n".encode() if side.sid else b""), side.data_address
            side.open_data()
        with (
            contextlib.suppress(ConnectionResetError, BrokenPipeError),  # as it is closed at once
            socket.create_connection(address, PATIENCE, (ELSEWHERE, 0)) as foreign,
        ):
            foreign.sendall(line)
            foreign.settimeout(5)
            said = Talk(foreign).rest() if line or port == "0" else b""
            assert said == b""
        if line or port == "0":
            server.wait_for("data.rejected", reason="wrong_address", peer=re.compile(rf"^{ELSEWHERE}:"))
        visitor = stack.enter_context(connect(server.visitor_address))
        assert is_silent(visitor, 0.05), "the data connection of the client itself does not serve"


def test_tls_below_1_3_gets_no_id(keyed: OurServers) -> None:
    with led(keyed, "tls") as (place, client):
        old = dial(client.data_address)
        client.made.append(old)
        with contextlib.suppress(ConnectionError):  # in the handshake, or behind it
            old.become_client(client_context(highest=SSL.TLS1_2_VERSION))
            assert old.secure.version == "TLSv1.2"
            assert old.rest() == b""
        assert_serves(place, client)


@pytest.mark.programs
def test_a_foreign_address_is_refused_before_tls() -> None:
    """It costs a handshake less than an attacker's ClientHello."""
    with OurServer(1) as server, ClientSide(server.tunnel_address, demand=1) as client:
        client.connect()
        with pytest.raises(ConnectionError):
            client.dial_data(ELSEWHERE)
        server.wait_for("data.rejected", reason="wrong_address", peer=re.compile(rf"^{ELSEWHERE}:"))
        client.open_data()


# Our client


@pytest.mark.parametrize(
    ("tls", "has_sid"), [pytest.param(0, False, marks=pytest.mark.programs), (1, True)], ids=["without sid", "with sid"]
)
def test_our_client_opens_data_connections_to_the_letter(authority: Authority, tls: int, has_sid: bool) -> None:
    terms = Terms(tls, authority.local, SECRET, has_sid=has_sid)
    with attached(terms, f"tls={tls}") as (side, data, _):
        channels = {side.talk.channel}
        for _ in range(3):
            _, talk = side.admit(data.accept_socket())
            assert talk.is_silent(0.02)
            channels.add(talk.channel)
        assert len(channels) == (4 if tls else 1)


@pytest.mark.parametrize("tls", [0, pytest.param(1, marks=pytest.mark.programs)])
def test_our_client_closes_a_data_connection_whose_id_has_a_wrong_proof(authority: Authority, tls: int) -> None:
    with attached(Terms(tls, authority.local, SECRET), f"tls={tls}") as (side, data, clients):
        agreed = side.agreement
        lies: list[Callable[[bytes, str], bytes]] = [
            lambda *_: bytes(32),
            lambda _, channel: agreed.id_proof(b"00000000", channel),
            lambda identity, _: agreed.id_proof(identity, "00" * 32),
            agreed.data_proof,
        ]
        if tls:
            lies.append(lambda identity, _: agreed.id_proof(identity, ""))
            lies.append(lambda identity, _: agreed.id_proof(identity, side.talk.channel))
        for forge in lies:
            talk = side.begin_data(data.accept_socket())
            identity = b"deadbeef"
            side.give_id(talk, identity, forge(identity, talk.channel))
            assert talk.rest() == b"", "a proof was written to a server that has none"
        side.admit(data.accept_socket())  # and goes on with the next
        clients.wait_for("data.dial_failed", level=loud)


@pytest.mark.programs
def test_our_client_closes_the_newer_of_two_data_connections_with_one_id() -> None:
    with attached(Terms(secret=SECRET), "tls=0") as (side, data, client):
        first = side.begin_data(data.accept_socket())
        side.check_proof(first, side.give_id(first, b"deadbeef"))
        client.wait_for("pool.added", id="deadbeef")
        second = side.begin_data(data.accept_socket())
        side.give_id(second, b"deadbeef")
        assert len(second.rest()) in (0, 32)
        assert first.is_silent(0.05), "the older one was closed"


BAD_IDS = {"no hex": b"zzzzzzzz", "upper case": b"DEADBEEF", "bytes": b"\xff" * 8, "a line": b"ab\ncd\0ef"}


def test_our_client_closes_a_data_connection_with_a_bad_id() -> None:
    with attached(Terms()) as (side, data, clients):
        for identity in BAD_IDS.values():
            talk = side.begin_data(data.accept_socket())
            talk.write(identity)
            assert talk.rest() == b""
        clients.wait_for("data.dial_failed", level="warn", reason="protocol")


@pytest.mark.programs
def test_our_client_does_not_go_on_in_the_clear_where_tls_was_offered(authority: Authority) -> None:
    with attached(Terms(1, authority.local), "tls=1") as (side, data, clients):
        for line in (b"deadbeef", b"//error?reason=no-tls\n", b"//9#0\n"):
            talk = Talk(data.accept_socket())
            assert talk.first_byte() == b"\x16"
            talk.write(line)
            talk.end()
            with contextlib.suppress(ConnectionError):
                talk.rest()
        side.admit(data.accept_socket())
        clients.wait_for("data.dial_failed", level=loud)


@pytest.mark.parametrize("query", ["tls=2", pytest.param("", marks=pytest.mark.programs)], ids=["demanded", "adopted"])
def test_our_client_verifies_each_data_connection_with_tls_2(authority: Authority, query: str) -> None:
    """Each is judged in its own handshake."""
    env = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    with attached(Terms(2, authority.local), query, env) as (side, data, clients):
        side.terms = Terms(2, authority.issue("elsewhere.example"))
        with pytest.raises(ConnectionError):
            side.admit(data.accept_socket())
        side.terms = Terms(2, authority.local)
        side.admit(data.accept_socket())
        clients.wait_for("data.dial_failed", level="error", check="name")
