"""A connection that says nothing may be a v1 client: it is on trial until its first data connection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from OpenSSL import SSL

from tests.support.certificates import Authority
from tests.support.sockets import connect, datagram_socket, is_silent
from tests.support.target import Target
from tests.support.tunnel import BRISK, CALM, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.wire2 import lines
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.ours import OurServers, Place
from tests.support.wire2.talk import Talk, dial
from tests.support.wire2.tls import client_context

HELLO_WAIT = 0.25
PATIENT = 1.5
"""Seconds of HANDSHAKE_TIMEOUT."""

INTERVAL = 0.1
"""Seconds of REPORT_INTERVAL: heartbeats show which connection is the client."""

BEAT = 0.2
"""Seconds between two heartbeats in BRISK."""

MARGIN = 6.0
ENV = {**CALM, "REPORT_INTERVAL": f"{INTERVAL * 1000:.0f}ms", "HANDSHAKE_TIMEOUT": f"{PATIENT * 1000:.0f}ms"}
QUERIES = {"clear": "tls=0", "tls": "tls=1"}

SOURCES = iter(f"127.0.{block}.{number}" for number in range(1, 255) for block in range(1, 9))
"""Each test comes from addresses of its own, because the server remembers which ones were late."""


@pytest.fixture(scope="module")
def two_ports(authority: Authority) -> Iterator[OurServers]:
    with OurServers(QUERIES, authority.local, env=ENV) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def one_port(authority: Authority) -> Iterator[OurServers]:
    with OurServers(QUERIES, authority.local, env={**ENV, "DATA_PORT": "tunnel"}) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(params=["two ports", "one port"])
def servers(request: pytest.FixtureRequest, two_ports: OurServers, one_port: OurServers) -> OurServers:
    return two_ports if request.param == "two ports" else one_port


each = pytest.mark.parametrize("label", QUERIES)


def on_trial(place: Place, source: str) -> Talk:
    """A connection that has said nothing and got the v1 line."""
    talk = dial(place.tunnel, source)
    line = talk.read_line()
    assert line.startswith(b"//%d#" % place.data[1]), line
    return talk


def open_v1_data(place: Place, source: str, tls: bool) -> Talk:
    """A v1 data connection that has got its id."""
    talk = dial(place.data, source)
    if tls:
        talk.become_client(client_context(alpn=()))
    assert len(bytes.fromhex(talk.receive_exactly(8).decode())) == 4
    return talk


@each
def test_a_silent_connection_holds_no_place_and_hears_no_heartbeat(servers: OurServers, label: str) -> None:
    place, source = servers[label], next(SOURCES)
    with on_trial(place, source) as trial, contextlib.ExitStack() as stack:
        assert trial.is_silent(3 * INTERVAL)
        client = stack.enter_context(ClientSide(place.tunnel))
        mark = servers.mark()
        began = time.monotonic()
        client.connect()
        assert time.monotonic() - began < 1, "the silent connection was asked for a sign of life"
        servers.wait_in(label, "client.connected", after=mark, wire=2)
        assert not servers.find_in(label, "client.connected", after=mark, wire=1)


@each
def test_any_number_may_be_on_trial(servers: OurServers, label: str) -> None:
    place = servers[label]
    with contextlib.ExitStack() as stack:
        talks = [stack.enter_context(dial(place.tunnel, next(SOURCES))) for _ in range(20)]
        for talk in talks:
            assert talk.read_line().startswith(b"//%d#" % place.data[1])


def test_a_trial_ends_after_the_handshake_s_timeout(two_ports: OurServers, one_port: OurServers) -> None:
    with contextlib.ExitStack() as stack:
        places = [servers[label] for servers in (two_ports, one_port) for label in QUERIES]
        trials = [stack.enter_context(on_trial(place, next(SOURCES))) for place in places]
        began = time.monotonic()
        assert [trial.rest() for trial in trials] == [b""] * len(trials)
        assert time.monotonic() - began < PATIENT + MARGIN


@each
def test_the_first_data_connection_makes_the_youngest_trial_of_its_address_the_client(
    servers: OurServers, two_ports: OurServers, label: str
) -> None:
    """On one port without TLS a second silent connection of an address is a data connection."""
    servers = two_ports if label == "clear" else servers
    place, source, elsewhere = servers[label], next(SOURCES), next(SOURCES)
    mark = servers.mark()
    with (
        on_trial(place, source) as older,
        on_trial(place, source) as younger,
        on_trial(place, elsewhere) as other,
        open_v1_data(place, source, label == "tls") as data,
    ):
        assert younger.read_line() == b""
        assert older.is_silent(2 * INTERVAL)
        assert other.is_silent(2 * INTERVAL)
        servers.wait_in(label, "client.connected", after=mark, wire=1)
        with connect(place.visitors) as visitor:
            visitor.sendall(b"hello")
            assert data.receive_exactly(5) == b"hello"
            line = b""
            while not line:
                line = younger.read_line()
            assert line.endswith(b"#1")


def test_silence_never_gets_an_id_in_the_clear_where_there_is_tls(servers: OurServers) -> None:
    """A visitor's bytes would come out unencrypted."""
    place, source = servers["tls"], next(SOURCES)
    with on_trial(place, source), open_v1_data(place, source, tls=True), dial(place.data, source) as silent:
        assert silent.rest() in (b"", b"//error?reason=busy\n", b"//%d#1\n" % place.data[1])


@each
def test_a_trial_keeps_no_data_connection_of_a_v2_client_waiting(servers: OurServers, label: str) -> None:
    place = servers[label]
    with on_trial(place, next(SOURCES)), ClientSide(place.tunnel) as client:
        began = time.monotonic()
        client.connect()
        identity, _ = client.open_data()
        assert time.monotonic() - began < PATIENT
        with connect(place.visitors):
            assert client.hear_launch().host == identity


def test_a_v1_client_may_be_as_old_as_tls_1_2(servers: OurServers) -> None:
    place, source = servers["tls"], next(SOURCES)
    with on_trial(place, source) as trial, dial(place.data, source) as data:
        data.become_client(client_context(alpn=(), highest=SSL.TLS1_2_VERSION))
        assert data.secure.version == "TLSv1.2"
        data.receive_exactly(8)
        assert trial.read_line() == b""


def test_a_v1_client_of_a_shared_port_is_served_by_the_tunnel_without_a_name() -> None:
    queries = {"": "tls=0", "web": "tls=0&name=web"}
    with (
        OurServers(queries, env=CALM, shares_port=True) as servers,
        Target() as target,
        ClientSide(servers["web"].tunnel, name="web") as web,
        V1Client(servers[""].tunnel, target.address) as client,
    ):
        web.connect()
        client.wait_until_full()
        with connect(servers[""].visitors) as visitor, target.accept() as service:
            assert_connected(visitor, service)
        assert servers.find_in("", "client.connected", wire=1)


@each
def test_a_data_connection_of_another_address_makes_nobody_the_client(servers: OurServers, label: str) -> None:
    place, source, elsewhere = servers[label], next(SOURCES), next(SOURCES)
    with on_trial(place, source) as trial, dial(place.data, elsewhere) as foreign:
        with contextlib.suppress(ConnectionError):
            if label == "tls":
                foreign.become_client(client_context(alpn=()))
            foreign.write(b"") if label == "tls" else None
        assert not servers.find_in(label, "client.connected", wire=1, client=lambda text: text.startswith(source))
        assert trial.is_silent(2 * INTERVAL)


@each
def test_a_byte_ends_a_trial(servers: OurServers, label: str) -> None:
    """A v1 client never writes."""
    with contextlib.ExitStack() as stack:
        trials = [stack.enter_context(on_trial(servers[label], next(SOURCES))) for _ in range(3)]
        began = time.monotonic()
        for trial, says in zip(trials, (b"x", b"\n", b"GET / HTTP/1.1\r\n\r\n"), strict=True):
            trial.write(says)
            assert trial.rest() == b""
        assert time.monotonic() - began < PATIENT


@each
def test_a_byte_ends_a_v1_client_s_connection(servers: OurServers, label: str) -> None:
    place, source = servers[label], next(SOURCES)
    with on_trial(place, source) as trial, open_v1_data(place, source, label == "tls"):
        mark = servers.mark()
        assert trial.read_line() == b""
        trial.write(b"rubbish")
        trial.rest()
        servers.wait_in(label, "client.disconnected", after=mark)


@each
def test_an_address_whose_hello_came_late_is_given_two_seconds(servers: OurServers, label: str) -> None:
    """One lost packet must not leave a tunnel on wire v1."""
    place, source = servers[label], next(SOURCES)
    with on_trial(place, source) as late:
        late.say(lines.make_hello())
        assert late.rest() == b""
    with ClientSide(place.tunnel, source=source) as again:
        again.dial()
        assert again.talk.is_silent(3 * HELLO_WAIT), "it was taken for v1 again"
        again.say_hello()
        again.negotiate()


def test_an_address_whose_client_hello_came_late_is_given_two_seconds(servers: OurServers) -> None:
    place, source = servers["tls"], next(SOURCES)
    with on_trial(place, source) as late:
        late.write(b"\x16\x03\x01\x00\x10")
        assert late.rest() == b""
    with ClientSide(place.tunnel, source=source, demand=1) as again:
        again.dial()
        assert again.talk.is_silent(3 * HELLO_WAIT), "it was taken for v1 again"
        again.secure()
        again.say_hello()
        again.negotiate()


@each
def test_another_byte_is_no_late_hello(servers: OurServers, label: str) -> None:
    place, source = servers[label], next(SOURCES)
    with on_trial(place, source) as trial:
        trial.write(b"x")
        assert trial.rest() == b""
    began = time.monotonic()
    on_trial(place, source).abort()
    assert time.monotonic() - began < 1.9


def test_a_late_hello_is_given_two_seconds_and_no_more(one_port: OurServers) -> None:
    place, source = one_port["clear"], next(SOURCES)
    with on_trial(place, source) as late:
        late.say(lines.make_hello())
        assert late.rest() == b""
    with dial(place.tunnel, source) as silent:
        began = time.monotonic()
        assert silent.rest() in (b"", b"//%d#0\n" % place.data[1])
        assert time.monotonic() - began > 1


@pytest.mark.parametrize(
    "port", ["0", pytest.param("tunnel", marks=pytest.mark.programs)], ids=["two ports", "one port"]
)
def test_a_whole_v1_client_is_served_in_every_tls_mode(authority: Authority, port: str) -> None:
    """Its data connections are silent, and it dials one at a time."""
    queries = {tls: f"tls={tls}" for tls in ("0", "1", "2")}
    env = {**CALM, "DATA_PORT": port}
    with OurServers(queries, authority.local, env=env) as servers, Target() as target:
        for tls, place in servers.places.items():
            with V1Client(place.tunnel, target.address, cafile=authority.crt) as client:
                client.wait_until_full()
                servers.wait_in(tls, "client.connected", wire=1)
                for _ in range(12):
                    with connect(place.visitors) as visitor, target.accept() as service:
                        assert_connected(visitor, service)
                assert exchange(place, target) == (b"question", b"answer")


def exchange(place: Place, target: Target) -> tuple[bytes, bytes]:
    """Send a datagram in and one back; what arrived at the target and at the visitor."""
    with datagram_socket() as visitor:
        visitor.sendto(b"question", place.visitors)
        asked, source = target.udp.recvfrom(100)
        target.udp.sendto(b"answer", source)
        return asked, visitor.recv(100)


def test_a_v1_client_is_never_asked_for_an_answer() -> None:
    """It cannot give one: it never writes."""
    with (
        OurServer(env=BRISK) as server,
        Target() as target,
        V1Client(server.tunnel_address, target.address) as client,
    ):
        with Tunnel(server, client, target).session() as (visitor, service):
            assert is_silent(visitor, 4.5 * BEAT)
            assert_connected(visitor, service)
        assert not server.find("client.disconnected")


def test_silent_strangers_before_a_v1_client_keep_it_from_nothing() -> None:
    with OurServer() as server, Target() as target, contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(dial(server.tunnel_address))
        client = stack.enter_context(V1Client(server.tunnel_address, target.address))
        client.wait_until_full()
        Tunnel(server, client, target).assert_works()


def test_a_v2_client_takes_the_place_of_a_v1_client_that_has_gone(servers: OurServers) -> None:
    place, source = servers["clear"], next(SOURCES)
    with on_trial(place, source) as trial, open_v1_data(place, source, tls=False):
        assert trial.read_line() == b""
    with ClientSide(place.tunnel) as client:
        client.connect()
        identity, _ = client.open_data()
        with connect(place.visitors):
            assert client.hear_launch().host == identity
