"""From the first byte to the offer, our server without a key: each line to the letter, and what is none."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurServer, Tunnel
from tests.support.wire2 import lines
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.lines import LONGEST
from tests.support.wire2.ours import OurServers, Place
from tests.support.wire2.talk import Rejected, Talk, dial

HELLO_WAIT = 0.25
"""Seconds without a byte after which a connection is taken for v1."""

IDENTITY = lines.make_client()
"""Every client of these tests says that it is this one, so that each takes the place of the one before at once."""

NONCE, CLIENT = "00112233445566778899aabbccddeeff", "0123456789abcdef"

SERVERS = {"clear": "tls=0", "tls": "tls=1", "verified": "tls=2", "named": "tls=0&name=web"}
TLS = {"clear": 0, "tls": 1, "verified": 2}

every_mode = pytest.mark.parametrize("label", TLS)
with_tls = pytest.mark.parametrize("label", ["tls", "verified"])


@pytest.fixture(scope="module")
def servers(authority: Authority) -> Iterator[OurServers]:
    env = {**CALM, "REPORT_INTERVAL": "1500ms", "HANDSHAKE_TIMEOUT": "10s"}
    with OurServers(SERVERS, authority.local, env=env) as running:
        yield running
        assert not running.find_crashes()


def client_of(place: Place, **given: object) -> ClientSide:
    return ClientSide(place.tunnel, identity=IDENTITY, **given)  # type: ignore[arg-type]


def answer(place: Place, sent: bytes, *, inside_tls: bool = False) -> bytes:
    """All that the server says to these bytes until it ends the connection, which it has to do."""
    with client_of(place) as client:
        client.dial()
        if inside_tls:
            client.secure()
        client.talk.write(sent)
        return client.talk.rest()


@every_mode
def test_the_offer_is_to_the_letter(servers: OurServers, label: str) -> None:
    with client_of(servers[label]) as client:
        client.connect()
        assert client.offer.raw == b"//%d?v=2&hb=1500#%d" % (servers[label].data[1], TLS[label])
    entry = servers.wait_in(label, "client.connected", wire=2)
    assert entry["client"]


@with_tls
def test_a_hello_in_the_clear_is_answered_with_a_line_that_asks_for_tls_and_nothing_more(
    servers: OurServers, label: str
) -> None:
    with client_of(servers[label]) as client:
        client.dial()
        client.say_hello()
        assert client.talk.read_line() == b"//tls"
        assert client.talk.is_silent(0.1)
        client.secure()
        client.say_hello()
        client.hear_offer()


@with_tls
def test_a_client_may_begin_with_tls(servers: OurServers, label: str) -> None:
    with client_of(servers[label], demand=TLS[label]) as client:
        client.connect()
        assert client.talk.secure.alpn == b"nodepass/2"
        assert client.talk.secure.version == "TLSv1.3"


@with_tls
def test_bytes_behind_a_hello_in_the_clear_end_the_connection(servers: OurServers, label: str) -> None:
    """Somebody on the path could have put them there: they would be read as if they came from inside TLS."""
    for behind in (b"/", lines.make_hello(client=IDENTITY) + b"\n", b"\x16\x03\x01", b"\n"):
        assert answer(servers[label], lines.make_hello(client=IDENTITY) + b"\n" + behind) in (b"", b"//tls\n")


def test_a_server_speaks_at_once_to_a_hello(servers: OurServers) -> None:
    """A busy machine may add to it each time; a server that waited would never be so quick."""

    def is_quick() -> bool:
        with client_of(servers["clear"]) as client:
            began = time.monotonic()
            client.connect()
            return time.monotonic() - began < HELLO_WAIT

    until(is_quick)


@every_mode
def test_a_hello_may_come_in_pieces_at_any_pace(servers: OurServers, label: str) -> None:
    """From the first byte on, a connection is no longer taken for v1."""
    with client_of(servers[label]) as client:
        client.dial()
        if TLS[label]:
            client.secure()
        hello = lines.make_hello(client=IDENTITY)
        client.talk.write(hello[:1])
        assert client.talk.is_silent(1.3 * HELLO_WAIT)
        client.talk.write(hello[1:20])
        assert client.talk.is_silent(0.05)
        client.talk.say(hello[20:])
        client.hear_offer()


UNUSUAL = {
    "parameters of the future": f"//hello?v=2&nonce={NONCE}&client={IDENTITY}&name=&colour=blue&x&want=nothing",
    "want=from": f"//hello?v=2&nonce={NONCE}&client={IDENTITY}&name=&want=from",
    "in another order": f"//hello?name=&client={IDENTITY}&nonce={NONCE}&v=2",
    "the first of two counts": f"//hello?v=2&v=9&nonce={NONCE}&client={IDENTITY}&name=&name=other&nonce=x",
    "as long as may be": f"//hello?v=2&nonce={NONCE}&client={IDENTITY}&name=&x=".ljust(LONGEST - 1, "y"),
}


@pytest.mark.parametrize("label", ["clear", "tls"])
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_an_unusual_hello_is_understood(servers: OurServers, label: str, unusual: str) -> None:
    with client_of(servers[label], demand=TLS[label]) as client:
        client.dial()
        if TLS[label]:
            client.secure()
        client.say_hello(UNUSUAL[unusual].encode())
        client.hear_offer()


def hello(**changes: str) -> bytes:
    """A hello with some parameters changed, or left out where they are `None`."""
    parameters = {"v": "2", "nonce": NONCE, "client": CLIENT, "name": "", **changes}
    return lines.make("hello", [(name, value) for name, value in parameters.items() if value != "None"])


MALFORMED = {
    "no parameters": b"//hello",
    "no nonce": hello(nonce="None"),
    "a short nonce": hello(nonce=NONCE[2:]),
    "a long nonce": hello(nonce=NONCE + "00"),
    "a nonce that is not hex": hello(nonce="x" * 32),
    "no client": hello(client="None"),
    "a short client": hello(client=CLIENT[1:]),
    "a client that is not hex": hello(client="z" * 16),
    "no name": hello(name="None"),
    "a long name": hello(name="n" * 65),
    "a slash in the name": hello(name="a/b"),
    "an escape in the name": hello(name="%41"),
    "a blank": hello() + b" ",
    "a blank before it": b" " + hello(),
    "a carriage return": hello() + b"\r",
    "a tab": hello() + b"&x=\t",
    "a zero byte": hello() + b"&x=\0",
    "a byte of 0x7f": hello() + b"&x=\x7f",
    "a letter that is not ASCII": hello() + b"&x=\xc3\xa9",
    "too long": (hello() + b"&x=").ljust(LONGEST + 1, b"y"),
    "another line": b"//auth?mac=" + b"0" * 64,
    "an offer": b"//10101?v=2&hb=5000#0",
    "a challenge": b"//challenge?nonce=" + NONCE.encode(),
    "a heartbeat": b"//beat?ok=1",
    "a data connection's": b"//data",
    "nothing of it": b"//",
    "half a line's beginning": b"/hello?v=2",
}


@pytest.mark.parametrize("label", ["clear", "tls"])
def test_a_malformed_hello_is_never_answered_with_an_offer(servers: OurServers, label: str) -> None:
    for name, line in MALFORMED.items():
        said = answer(servers[label], line + b"\n", inside_tls=TLS[label] > 0)
        assert not said or said.startswith(b"//error?reason="), (name, said)


def test_a_line_without_an_end_ends_at_the_limit(servers: OurServers) -> None:
    began = time.monotonic()
    assert answer(servers["clear"], hello() + b"&x=" + b"y" * LONGEST) == b""
    assert time.monotonic() - began < 5, "it waited for the handshake's timeout"


@every_mode
def test_a_version_of_the_future_is_rejected_by_name(servers: OurServers, label: str) -> None:
    mark = servers.mark()
    with client_of(servers[label]) as client:
        client.dial()
        if TLS[label]:
            client.secure()
        client.talk.say(f"//hello?v=9&nonce={NONCE}")
        assert client.talk.rejection() == "version"
    servers.wait_in(label, "client.rejected", after=mark, level="warn", reason="version")


@with_tls
def test_a_server_with_tls_says_no_error_in_the_clear(servers: OurServers, label: str) -> None:
    with client_of(servers[label]) as client:
        client.dial()
        client.talk.say(f"//hello?v=9&nonce={NONCE}")
        assert client.talk.read_line() == b"//tls"


def test_a_name_that_the_server_does_not_have_is_rejected_by_name(servers: OurServers) -> None:
    for label, name in (("clear", "web"), ("tls", "web"), ("named", ""), ("named", "We")):
        mark = servers.mark()
        with client_of(servers[label], name=name) as client, pytest.raises(Rejected, match="unknown-name"):
            client.connect()
        servers.wait_for("client.rejected", after=mark, level="warn", reason="unknown_name")


def test_a_name_reaches_its_tunnel(servers: OurServers) -> None:
    with client_of(servers["named"], name="web") as client:
        client.connect()
        servers.wait_in("named", "client.connected", wire=2)


def test_an_error_does_not_hold_a_connection_for_ever(servers: OurServers) -> None:
    """After a second, or 64 KiB, the server stops reading."""
    with client_of(servers["named"]) as client:
        client.dial()
        client.say_hello()
        with pytest.raises(Rejected):
            client.talk.hear()
        began = time.monotonic()
        until(lambda: is_refused(client.talk), 5)
        assert time.monotonic() - began < 5


def is_refused(talk: Talk) -> bool:
    """Whether bytes are no longer taken."""
    try:
        talk.write(b"x" * 4096)
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize(("interval", "hb"), [("1h", 60_000), pytest.param("10ms", 10, marks=pytest.mark.programs)])
def test_an_interval_that_no_heartbeat_may_have_is_offered_as_the_nearest(interval: str, hb: int) -> None:
    with OurServer(env={**CALM, "REPORT_INTERVAL": interval}) as server, ClientSide(server.tunnel_address) as client:
        client.connect()
        assert int(client.offer.parameters["hb"]) == hb


def test_a_client_that_comes_late_is_told_that_the_server_shuts_down() -> None:
    with (
        OurServer() as server,
        Target() as target,
        V2Client(server.tunnel_address, target.address) as client,
    ):
        client.wait_until_full()
        with Tunnel(server, client, target).session():  # for its sake the server does not end at once
            server.send(signal.SIGTERM)
            server.wait_for("process.stopping")
            with dial(server.tunnel_address) as late:
                late.say(lines.make_hello())
                assert late.rejection() == "shutdown"
        assert server.wait() == 0
        until(lambda: client.goodbyes == ["shutdown"])
