"""The first bytes of a connection, on either port of our server, decide what it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
from OpenSSL import SSL

from tests.support.certificates import Authority
from tests.support.sockets import Address
from tests.support.tunnel import CALM
from tests.support.wire2 import lines
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.ours import OurServers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.talk import Talk, dial
from tests.support.wire2.tls import client_context

HELLO_WAIT = 0.25
PATIENT = 1.0
"""Seconds of HANDSHAKE_TIMEOUT."""

MARGIN = 6.0
"""Seconds that a busy machine may add."""

IDENTITY = lines.make_client()
CLEAR, ENCRYPTED = {"clear": "tls=0"}, {"tls": "tls=1"}
ENV = {**CALM, "HANDSHAKE_TIMEOUT": f"{PATIENT * 1000:.0f}ms"}
KEYED = {**ENV, "TUNNEL_KEY": SECRET}


@pytest.fixture(scope="module")
def unkeyed(authority: Authority) -> Iterator[OurServers]:
    with OurServers({**CLEAR, **ENCRYPTED}, authority.local, env=ENV) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def keyed(authority: Authority) -> Iterator[OurServers]:
    """With a key each tunnel of a process needs another name."""
    queries = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls"}
    with OurServers(queries, authority.local, env=KEYED) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def one_port(authority: Authority) -> Iterator[OurServers]:
    with OurServers({**CLEAR, **ENCRYPTED}, authority.local, env={**ENV, "DATA_PORT": "tunnel"}) as running:
        yield running
        assert not running.find_crashes()


STRANGE = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    bytes(range(256)),
    b"\n",
    b"\r\n",
    b" //hello\n",
    b"\x15\x03\x03\x00\x02\x02\x28",
    b"\x17\x03\x03\x00\x01\x00",
    b"hello\n",
    b"x",
]


def answers(addresses: list[Address], sent: list[bytes]) -> list[bytes]:
    """What is said to each of these, on each of the addresses, until the server ends it: all at the same time."""
    with contextlib.ExitStack() as stack:
        talks = []
        for address in addresses:
            for data in sent:
                talks.append(stack.enter_context(dial(address)))
                talks[-1].write(data)
        return [talk.rest() for talk in talks]


def test_what_begins_strangely_is_closed_without_an_answer_on_the_tunnel_port(
    unkeyed: OurServers, keyed: OurServers, one_port: OurServers
) -> None:
    addresses = [servers[label].tunnel for servers in (unkeyed, keyed, one_port) for label in ("clear", "tls")]
    began = time.monotonic()
    assert set(answers(addresses, STRANGE)) == {b""}
    assert time.monotonic() - began < MARGIN


def test_what_begins_strangely_is_closed_without_an_answer_on_the_data_port(
    unkeyed: OurServers, keyed: OurServers
) -> None:
    """In the clear and with no sid in use the server speaks first there, if it has a client."""
    addresses = [servers[label].data for servers in (unkeyed, keyed) for label in ("clear", "tls")]
    assert set(answers(addresses, STRANGE)) == {b""}


def test_a_first_byte_without_a_line_behind_it_waits_for_the_handshake_timeout_only(
    unkeyed: OurServers, one_port: OurServers, keyed: OurServers
) -> None:
    addresses = [servers[label].tunnel for servers in (unkeyed, one_port) for label in ("clear", "tls")]
    began = time.monotonic()
    halves = [b"/", b"//hello?v=2"]
    assert set(answers(addresses, halves)) == {b""}
    encrypted = [servers["tls"].tunnel for servers in (unkeyed, one_port, keyed)]
    assert set(answers(encrypted, [b"\x16", b"\x16\x03\x01\x02\x00\x01"])) <= {b"", b"//error?reason=key-required\n"}
    assert 0.5 * PATIENT < time.monotonic() - began < 2 * PATIENT + MARGIN
    assert set(answers([keyed["clear"].tunnel], halves)) <= {b"", b"//error?reason=key-required\n"}


def test_tls_to_a_server_without_tls_is_rejected_by_name_in_the_clear(unkeyed: OurServers, keyed: OurServers) -> None:
    for servers in (unkeyed, keyed):
        with ClientSide(servers["clear"].tunnel) as client:
            client.dial()
            with pytest.raises(ConnectionError, match="in the clear"):
                client.secure()
            assert client.talk.rejection() == "no-tls"
        servers.wait_in("clear", level="warn", reason="no_tls")


@pytest.fixture
def each_tls_port(unkeyed: OurServers, keyed: OurServers, one_port: OurServers) -> Iterator[list[Address]]:
    """Every port that speaks TLS; the data ports have a client, so that they look at a connection at all."""
    with (
        ClientSide(unkeyed["tls"].tunnel, identity=IDENTITY) as first,
        ClientSide(keyed["tls"].tunnel, identity=IDENTITY, secret=SECRET, name="tls", demand=1) as second,
    ):
        first.connect()
        second.connect()
        tunnels = [servers["tls"].tunnel for servers in (unkeyed, keyed, one_port)]
        yield [*tunnels, unkeyed["tls"].data, keyed["tls"].data]


def test_a_foreign_protocol_gets_the_alert(each_tls_port: list[Address]) -> None:
    for address in each_tls_port:
        with dial(address) as talk, pytest.raises(ConnectionError, match="no application protocol"):
            talk.become_client(client_context(alpn=(b"h2", b"http/1.1")))


def test_our_protocol_among_others_is_chosen(each_tls_port: list[Address]) -> None:
    for address in each_tls_port:
        with dial(address) as talk:
            talk.become_client(client_context(alpn=(b"h2", b"nodepass/2")))
            assert talk.secure.alpn == b"nodepass/2"


def handshake(address: Address, context: SSL.Context) -> Talk | None:
    """A connection inside TLS, or None where the server ended it before."""
    talk = dial(address)
    try:
        talk.become_client(context)
    except ConnectionError:
        talk.abort()
        return None
    return talk


def test_tls_without_a_protocol_is_closed_where_no_v1_client_is(each_tls_port: list[Address]) -> None:
    for address in each_tls_port:
        if talk := handshake(address, client_context(alpn=())):
            with talk:
                assert talk.rest() == b""


def test_tls_below_1_3_is_rejected_by_name_on_the_tunnel_port(unkeyed: OurServers, keyed: OurServers) -> None:
    for servers in (unkeyed, keyed):
        with dial(servers["tls"].tunnel) as talk:
            talk.become_client(client_context(highest=SSL.TLS1_2_VERSION))
            assert talk.secure.version == "TLSv1.2"
            talk.say(lines.make_hello(name="tls" if servers is keyed else ""))
            assert talk.rejection() == "version"
        servers.wait_in("tls", "client.rejected", level="warn", reason="version")


def test_tls_that_was_asked_for_has_to_be_ours_as_well(unkeyed: OurServers, keyed: OurServers) -> None:
    """A hello in the clear before it changes nothing of what TLS has to be."""
    for servers in (unkeyed, keyed):
        for context in (client_context(alpn=()), client_context(alpn=(), highest=SSL.TLS1_2_VERSION)):
            with ClientSide(servers["tls"].tunnel, name="tls" if servers is keyed else "") as client:
                client.dial()
                client.say_hello()
                assert client.talk.read_line() == b"//tls"
                client.secure(context)
                assert client.talk.rest() == b""
        with ClientSide(servers["tls"].tunnel, name="tls" if servers is keyed else "") as client:
            client.dial()
            client.say_hello()
            assert client.talk.read_line() == b"//tls"
            client.secure(client_context(highest=SSL.TLS1_2_VERSION))
            client.say_hello()
            assert client.talk.rejection() == "version"


def test_silence_inside_tls_is_never_taken_for_v1(unkeyed: OurServers, one_port: OurServers) -> None:
    for servers in (unkeyed, one_port):
        with ClientSide(servers["tls"].tunnel) as client:
            client.dial()
            client.secure()
            assert client.talk.rest() in (b"", b"//error?reason=key-required\n")


def silence(address: Address) -> tuple[bytes, float]:
    """What is said to a connection that says nothing, and after how many seconds."""
    began = time.monotonic()
    with dial(address) as talk:
        return talk.read_line(), time.monotonic() - began


V1_LINE: dict[str, Callable[[OurServers], bytes]] = {
    "clear": lambda servers: b"//%d#0" % servers["clear"].data[1],
    "tls": lambda servers: b"//%d#1" % servers["tls"].data[1],
}


@pytest.mark.parametrize("label", V1_LINE)
def test_silence_is_taken_for_v1_after_a_quarter_of_a_second(
    unkeyed: OurServers, one_port: OurServers, label: str
) -> None:
    for servers in (unkeyed, one_port):
        line, after = silence(servers[label].tunnel)
        assert line == V1_LINE[label](servers)
        assert after > 0.8 * HELLO_WAIT


@pytest.mark.programs
def test_silence_is_told_that_a_key_is_required_where_v1_is_not_served(keyed: OurServers, authority: Authority) -> None:
    """A key, WIRE=2, and a port without a tunnel that has the empty name: none of them serves v1."""
    with (
        OurServers(CLEAR, authority.local, env={**ENV, "WIRE": "2"}) as only_v2,
        OurServers({"named": "tls=0&name=web"}, authority.local, env=ENV) as named,
        OurServers({"url": "tls=0&wire=2"}, authority.local, env=ENV) as by_url,
    ):
        places = [keyed["clear"], keyed["tls"], only_v2["clear"], named["named"], by_url["url"]]
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            talks = [stack.enter_context(dial(place.tunnel)) for place in places]
            assert [talk.rejection() for talk in talks] == ["key-required"] * len(places)
        assert time.monotonic() - began > 0.8 * PATIENT, "it was said before the handshake's timeout"


def test_silence_on_a_data_port_is_closed_where_no_v1_client_is(unkeyed: OurServers) -> None:
    with dial(unkeyed["clear"].data) as clear, dial(unkeyed["tls"].data) as encrypted:
        assert clear.rest() == encrypted.rest() == b""


def test_a_line_in_the_clear_on_the_data_port_of_a_server_with_tls_is_closed(unkeyed: OurServers) -> None:
    sent = [b"//data?sid=" + b"0" * 32 + b"\n", lines.make_hello() + b"\n"]
    assert set(answers([unkeyed["tls"].data], sent)) == {b""}
