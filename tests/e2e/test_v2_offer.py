"""From the first byte to the offer, our client without a key: lines to the letter, and servers that get them wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.certificates import Authority
from tests.support.log import loud
from tests.support.process import Environment
from tests.support.tunnel import CALM
from tests.support.wire2 import client_hello, lines
from tests.support.wire2.ours import OurClients
from tests.support.wire2.server_side import Listener, Script, ServerSide, Terms
from tests.support.wire2.stage import Scripts, played

ANY = re.compile("")


@pytest.fixture(scope="module")
def env(authority: Authority) -> Environment:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt)}


def test_our_client_says_hello_to_the_letter_and_is_the_same_as_long_as_it_lives() -> None:
    nonces: set[str] = set()
    names: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        listeners = {label: stack.enter_context(Listener()) for label in ("", "web", "n" * 64, "A-Z.a_z-0.9")}
        queries = {name: (each.address, f"name={name}" if name else "") for name, each in listeners.items()}
        stack.enter_context(OurClients(queries, env=CALM))
        for name, listener in listeners.items():
            for _ in range(3):  # it comes again
                with listener.accept() as side:
                    said = side.hear_hello().parameters
                assert said["name"] == name
                nonces.add(said["nonce"])
                names.setdefault(name, said["client"])
                assert names[name] == said["client"], "it has another name after it has come again"
    assert len(nonces) == 3 * len(listeners)
    assert len(set(names.values())) == len(listeners), "two tunnels of a process are one client"


def begins_in_the_clear(side: ServerSide) -> None:
    assert side.talk.first_byte() == b"/"
    side.take_hello(side.talk.hear())
    assert side.talk.is_silent(0.1), "something follows the hello"


def begins_with_tls(side: ServerSide) -> None:
    """What anybody on the path sees is TLS 1.3 for our protocol, and that no old session is resumed."""
    seen = client_hello.peek(side.talk.sock)
    assert seen.protocols == [b"nodepass/2"]
    assert seen.versions == [client_hello.TLS_1_3]
    assert seen.psk_modes in (b"", client_hello.PSK_WITH_KEY_EXCHANGE)
    assert not seen.offers_session
    assert not seen.has_early_data
    side.negotiate()


def accepts(side: ServerSide) -> None:
    side.negotiate()
    side.beat()
    side.hear_answer()


def asks_for_tls(side: ServerSide) -> None:
    first = side.talk.hear()
    side.take_hello(first)
    side.talk.say("//tls")
    side.secure()
    side.take_hello(side.talk.hear())
    assert side.hello.parameters["nonce"] != first.parameters["nonce"], "one nonce for two hellos"
    assert side.hello.parameters["client"] == first.parameters["client"]
    side.offer()
    side.beat()
    side.hear_answer()


@pytest.mark.programs
def test_our_client_begins_with_tls_only_where_it_demands_it(env: Environment, authority: Authority) -> None:
    one, two = Terms(1, authority.local), Terms(2, authority.local)
    scripts: Scripts = {
        "no demand": (Terms(), "", begins_in_the_clear),
        "tls=0": (Terms(), "tls=0", begins_in_the_clear),
        "tls=1": (one, "tls=1", begins_with_tls),
        "tls=2": (two, "tls=2", begins_with_tls),
    }
    with played(scripts, env):
        pass


def test_our_client_takes_every_offer_that_is_at_least_its_demand(env: Environment, authority: Authority) -> None:
    zero, one, two = Terms(), Terms(1, authority.local), Terms(2, authority.local)
    scripts: Scripts = {
        "adopts 0": (zero, "", accepts),
        "adopts 0 quietly": (zero, "tls=0", accepts),
        "adopts 1": (one, "", asks_for_tls),
        "adopts 2": (two, "", asks_for_tls),
        "adopts 1 quietly": (one, "tls=0", asks_for_tls),
        "1 for 1": (one, "tls=1", accepts),
        "2 for 1": (two, "tls=1", accepts),
        "2 for 2": (two, "tls=2", accepts),
    }
    with played(scripts, env) as clients:
        for label, (terms, _, _) in scripts.items():
            clients.wait_in(label, "server.connected", wire=2, tls=terms.tls)


def offers(make: Callable[[ServerSide], bytes]) -> Script:
    """A server with this offer, which must not be taken."""

    def script(side: ServerSide) -> None:
        side.hear_hello()
        side.talk.say(make(side))
        with contextlib.suppress(ConnectionError):
            assert side.talk.rest() == b""

    return script


WRONG_OFFERS: dict[str, bytes] = {
    "hb of 9": b"//9?v=2&hb=9#0",
    "hb of 60,001": b"//9?v=2&hb=60001#0",
    "hb of eleven days": b"//9?v=2&hb=999999999#0",
    "hb of nothing": b"//9?v=2&hb=#0",
    "hb that is negative": b"//9?v=2&hb=-5000#0",
    "hb in other digits": b"//9?v=2&hb=\xd9\xa5\xd9\xa0\xd9\xa0\xd9\xa0#0",
    "no hb": b"//9?v=2#0",
    "port 0": b"//0?v=2&hb=5000#0",
    "port 65,536": b"//65536?v=2&hb=5000#0",
    "no port": b"//?v=2&hb=5000#0",
    "a host for a port": b"//192.0.2.1?v=2&hb=5000#0",
    "no tls": b"//9?v=2&hb=5000",
    "tls 1 in the clear": b"//9?v=2&hb=5000#1",
    "tls 2 in the clear": b"//9?v=2&hb=5000#2",
    "tls 3": b"//9?v=2&hb=5000#3",
    "a short sid": b"//9?v=2&hb=5000&sid=00#0",
    "a sid that is not hex": b"//9?v=2&hb=5000&sid=" + b"x" * 32 + b"#0",
    "a carriage return": b"//9?v=2&hb=5000#0\r",
    "a blank": b"//9?v=2&hb=5000 #0",
    "too long": (b"//9?v=2&hb=5000&x=".ljust(lines.LONGEST, b"y")) + b"#0",
    "a challenge": b"//challenge?nonce=" + b"0" * 32,
    "another line": b"//beat?idle=0",
    "a hello": lines.make_hello(),
    "rubbish": b"\xff\xfe\x00",
}


def test_our_client_leaves_a_server_with_a_wrong_offer(env: Environment) -> None:
    scripts = {name: (Terms(), "", offers(lambda _, line=line: line)) for name, line in WRONG_OFFERS.items()}  # type: ignore[misc]
    with played(scripts, env) as clients:
        for label in scripts:
            clients.wait_in(label, level=loud, server=ANY)
        assert not clients.find("server.connected")


def below(tls: int) -> Script:
    """A server inside TLS whose offer says this."""

    def script(side: ServerSide) -> None:
        side.secure()
        side.take_hello(side.talk.hear())
        side.talk.say(lines.make_offer(9, tls))
        with contextlib.suppress(ConnectionError):
            assert side.talk.rest() == b""

    return script


def in_the_clear(line: bytes) -> Script:
    """A server that answers a ClientHello with a line."""

    def script(side: ServerSide) -> None:
        assert side.talk.first_byte() == b"\x16"
        side.talk.say(line)
        side.talk.end()
        with contextlib.suppress(ConnectionError):
            side.talk.rest()

    return script


def at_once(line: bytes) -> Script:
    """A v1 server: it speaks first and reads nothing."""

    def script(side: ServerSide) -> None:
        side.talk.say(line)
        with contextlib.suppress(ConnectionError):
            side.talk.rest()

    return script


def test_our_client_refuses_an_offer_below_its_demand(env: Environment, authority: Authority) -> None:
    """Whatever the other end says."""
    inside = Terms(1, authority.local)
    scripts: Scripts = {
        "1 for 2": (inside, "tls=2", below(1)),
        "0 inside TLS for 1": (inside, "tls=1", below(0)),
        "0 inside TLS for 2": (inside, "tls=2", below(0)),
        "0 inside TLS, adopted": (inside, "", adopted(0)),
        "0 in the clear for 1": (Terms(), "tls=1", in_the_clear(b"//9?v=2&hb=5000#0")),
        "1 in the clear for 1": (Terms(), "tls=1", in_the_clear(b"//9?v=2&hb=5000#1")),
        "2 in the clear for 2": (Terms(), "tls=2", in_the_clear(b"//9?v=2&hb=5000#2")),
        "v1 with 0 for 1": (Terms(), "tls=1", in_the_clear(b"//9#0")),
        "v1 with 1 for 2": (Terms(), "tls=2&wire=1", at_once(b"//9#1")),
        "v1 with 2 for 2": (Terms(), "tls=2", in_the_clear(b"//9#2")),
        "v1 for wire=2": (Terms(), "wire=2", v1_line),
        "v1 for wire=2 and tls": (Terms(), "wire=2&tls=1", in_the_clear(b"//9#1")),
        "asked for TLS again inside": (inside, "", asked_again),
        "asked for TLS inside": (inside, "tls=1", asked_inside),
    }
    with played(scripts, env) as clients:
        for label in scripts:
            entry = clients.wait_in(label, level=loud, server=ANY)
            assert entry["error"], label
        assert not clients.find("server.connected")


def adopted(tls: int) -> Script:
    def script(side: ServerSide) -> None:
        side.talk.hear()
        side.talk.say("//tls")
        below(tls)(side)

    return script


def v1_line(side: ServerSide) -> None:
    side.talk.hear()
    side.talk.say("//9#0")
    assert side.talk.rest() == b""


def asked_inside(side: ServerSide) -> None:
    side.secure()
    side.talk.hear()
    side.talk.say("//tls")
    assert side.talk.rest() == b""


def asked_again(side: ServerSide) -> None:
    side.talk.hear()
    side.talk.say("//tls")
    asked_inside(side)


def behind_tls(data: bytes) -> Script:
    """A server that writes more than the line that asks for TLS."""

    def script(side: ServerSide) -> None:
        side.talk.hear()
        side.talk.write(b"//tls\n" + data)
        assert side.talk.rest() == b"", "it goes on"

    return script


@pytest.mark.programs
def test_a_byte_behind_the_line_that_asks_for_tls_ends_the_connection(env: Environment, authority: Authority) -> None:
    scripts: Scripts = {
        "a byte": (Terms(1, authority.local), "", behind_tls(b"/")),
        "an offer": (Terms(1, authority.local), "", behind_tls(b"//9?v=2&hb=5000#1\n")),
        "the beginning of TLS": (Terms(1, authority.local), "", behind_tls(b"\x16")),
        "an empty line": (Terms(1, authority.local), "", behind_tls(b"\n")),
    }
    with played(scripts, env) as clients:
        for label in scripts:
            clients.wait_in(label, level=loud, reason="protocol")
        assert not clients.find("server.connected")


TOKENS = {
    "key-required": "key_required",
    "key-mismatch": "key_mismatch",
    "busy": "busy",
    "version": "version",
    "shutdown": "shutdown",
    "no-tls": "no_tls",
    "unknown-name": "unknown_name",
    "full-moon": "other",  # of the future: it is shown as it is
}


def rejects(token: str) -> Script:
    def script(side: ServerSide) -> None:
        side.hear_hello()
        side.talk.say(f"//error?reason={token}")
        assert side.talk.rest() == b""

    return script


def test_our_client_says_why_it_is_rejected(env: Environment, authority: Authority) -> None:
    scripts: Scripts = {
        **{token: (Terms(), "", rejects(token)) for token in TOKENS},
        **{f"{token} inside TLS": (Terms(1, authority.local), "tls=1", rejects(token)) for token in TOKENS},
        "no-tls in the clear": (Terms(), "tls=1", in_the_clear(b"//error?reason=no-tls")),
    }
    with played(scripts, env) as clients:
        for label in scripts:
            token = label.split()[0]
            entry = clients.wait_in(label, "server.rejected", level="error", reason=TOKENS[token])
            assert entry["error"]
            assert token != "full-moon" or token in entry["error"]


@pytest.mark.programs
def test_a_server_s_token_changes_nothing_that_our_client_does() -> None:
    """It comes again; told `busy` not before SERVICE_COOLDOWN."""
    with contextlib.ExitStack() as stack:
        listeners = {token: stack.enter_context(Listener()) for token in TOKENS}
        servers = {token: (each.address, "") for token, each in listeners.items()}
        stack.enter_context(OurClients(servers, env={"SERVICE_COOLDOWN": "300ms"}))
        for _ in range(3):
            for token, listener in listeners.items():
                with listener.accept() as side:
                    rejects(token)(side)


def test_parameters_and_signals_of_the_future_are_ignored(env: Environment) -> None:
    def future(side: ServerSide) -> None:
        side.hear_hello()
        side.talk.say(b"//9?v=2&hb=5000&colour=blue&x#0")
        side.talk.say(b"//deadbeef?why=not#77")
        side.talk.say(b"//news?of=tomorrow")
        side.beat()
        side.hear_answer()

    with played({"future": (Terms(), "", future)}, env) as clients:
        clients.wait_in("future", "server.connected", wire=2)


@pytest.mark.programs
def test_the_first_of_two_parameters_counts(env: Environment) -> None:
    def twice(side: ServerSide) -> None:
        side.hear_hello()
        side.talk.say(b"//9?v=2&v=3&hb=5000&hb=1#0")
        side.beat()
        side.hear_answer()

    with played({"twice": (Terms(), "", twice)}, env):
        pass


@pytest.mark.programs
def test_an_end_without_close_notify_is_a_lost_connection(env: Environment, authority: Authority) -> None:
    """Somebody on the path can end TCP, and not TLS."""

    def cut(side: ServerSide) -> None:
        accepts(side)
        side.talk.sock.shutdown(2)

    def end(side: ServerSide) -> None:
        accepts(side)
        side.talk.say("//bye?reason=reload")
        side.talk.end()
        side.talk.rest()

    terms = replace(Terms(1, authority.local), hb=2000)
    with played({"cut": (terms, "tls=1", cut), "ended": (terms, "tls=1", end)}, env) as clients:
        lost = clients.wait_in("cut", "server.disconnected")
        ended = clients.wait_in("ended", "server.disconnected")
        assert re.search("(?i)close_notify|cut", lost["error"]), lost
        assert lost["reason"] == "failed"
        assert "reload" in ended.line
