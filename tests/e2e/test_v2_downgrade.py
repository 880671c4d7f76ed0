"""A client of ours with a key: no server without it, none in the middle and none of an older version is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.support.certificates import Authority
from tests.support.log import one_of
from tests.support.process import Environment
from tests.support.tunnel import CALM, OurClient
from tests.support.v1_server import V1Server
from tests.support.wire2 import lines
from tests.support.wire2.ours import OurServers
from tests.support.wire2.proofs import SECRET, sign, stretch
from tests.support.wire2.server_side import Script, ServerSide, Terms
from tests.support.wire2.stage import Scripts, played

OTHER_SECRET = "another secret that is long enough"
CHALLENGE = b"//challenge?nonce=f0e0d0c0b0a090807060504030201000"


@pytest.fixture(scope="module")
def env(authority: Authority) -> Environment:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt), "TUNNEL_KEY": SECRET}


def ends(side: ServerSide) -> None:
    """The client has to say nothing more and leave."""
    with contextlib.suppress(ConnectionError):
        assert side.talk.rest() == b"", "it goes on"


def without_challenge(side: ServerSide) -> None:
    side.hear_hello()
    side.talk.say(side.make_offer())
    ends(side)


def with_a_made_up_mac(side: ServerSide) -> None:
    side.hear_hello()
    side.talk.say(lines.with_mac(side.make_offer(), "0" * 64))
    ends(side)


def v1_at_once(side: ServerSide) -> None:
    side.talk.say(f"//9#{side.terms.tls}")
    side.talk.end()
    with contextlib.suppress(ConnectionError):
        side.talk.rest()


def v1_inside(side: ServerSide) -> None:
    side.hear_hello()
    side.talk.say(f"//9#{side.terms.tls}")
    ends(side)


def after_the_proof(say: Callable[[ServerSide], bytes]) -> Script:
    """A server that challenges, hears the right proof, and then says this."""

    def script(side: ServerSide) -> None:
        side.hear_hello()
        side.challenge(CHALLENGE)
        side.hear_auth()
        side.talk.say(say(side))
        ends(side)

    return script


def with_mac(mac: Callable[[ServerSide], str]) -> Script:
    """A server with the right offer and this proof."""
    return after_the_proof(lambda side: lines.with_mac(side.make_offer(), mac(offered(side))))


def offered(side: ServerSide) -> ServerSide:
    """The side as if the right offer had been made."""
    side.agreement = replace(side.agreement, offer=side.make_offer())
    return side


def of(**changes: object) -> Callable[[ServerSide], str]:
    """The proof of a server that believes something else."""
    return lambda side: replace(side.agreement, **changes).server_proof()  # type: ignore[arg-type]


def for_offer(**changes: object) -> Callable[[ServerSide], str]:
    """The proof of another offer than the one that is made."""

    def mac(side: ServerSide) -> str:
        given = {"port": side.port, "tls": side.terms.tls, "hb": side.terms.hb, **changes}
        return replace(side.agreement, offer=lines.make_offer(**given)).server_proof()  # type: ignore[arg-type]

    return mac


def labelled(label: bytes) -> Callable[[ServerSide], str]:
    """HMAC of the right text under another label."""
    return lambda side: sign(stretch(SECRET, side.terms.name), label + side.agreement._terms).hex()


WRONG_MACS: dict[str, Callable[[ServerSide], str]] = {
    "zeros": lambda _: "0" * 64,
    "the client's sent back": lambda side: side.agreement.client_proof(),
    "another secret": of(secret=OTHER_SECRET),
    "another name": of(name="other"),
    "another hello": of(hello=lines.make_hello()),
    "another challenge": of(challenge=b"//challenge?nonce=" + b"0" * 32),
    "another channel": of(channel="00" * 32),
    "another port": for_offer(port=1),
    "another tls": for_offer(tls=2),
    "another hb": for_offer(hb=60000),
    "a sid": for_offer(sid="0" * 32),
    "one port": for_offer(mux=True),
    "the client's label": labelled(b"client\n"),
    "no label": labelled(b""),
}

MALFORMED: dict[str, Callable[[ServerSide], bytes]] = {
    "no mac": ServerSide.make_offer,
    "an empty mac": lambda side: lines.with_mac(side.make_offer(), ""),
    "half a mac": lambda side: lines.with_mac(side.make_offer(), offered(side).agreement.server_proof()[:32]),
    "a mac in upper case": lambda side: lines.with_mac(
        side.make_offer(), offered(side).agreement.server_proof().upper()
    ),
    "a mac that is not hex": lambda side: lines.with_mac(side.make_offer(), "%C3%A9" * 10),
    "a mac before the rest": lambda side: lines.make(
        str(side.port),
        [("v", 2), ("mac", offered(side).agreement.server_proof()), ("hb", 5000)],
        side.terms.tls,
    ),
    "v1": lambda side: b"//9#%d" % side.terms.tls,
    "another challenge": lambda _: b"//challenge?nonce=" + b"0" * 32,
    "a heartbeat": lambda _: b"//beat?idle=0",
}


LIES: list[Script] = [
    without_challenge,
    with_a_made_up_mac,
    v1_at_once,
    v1_inside,
    *map(with_mac, WRONG_MACS.values()),
    *map(after_the_proof, MALFORMED.values()),
]
"""Every way to be the wrong server."""

CLIENTS = 4
"""Share the lies; each has a name of its own, as one key's tunnels must."""


@pytest.mark.parametrize("tls", [pytest.param(0, marks=pytest.mark.programs), 1])
def test_a_server_that_does_not_prove_the_key_is_refused(authority: Authority, env: Environment, tls: int) -> None:
    scripts: Scripts = {
        f"n{number}": (
            Terms(tls, authority.local, SECRET, f"n{number}"),
            f"name=n{number}&tls={tls}",
            LIES[number::CLIENTS],
        )
        for number in range(CLIENTS)
    }
    with played(scripts, {**env, "SERVICE_COOLDOWN": "20ms"}) as clients:
        for label in scripts:
            clients.wait_in(label, "server.rejected", level="error", reason="key_mismatch")
        assert not clients.find("server.connected")


def test_with_a_key_tls_is_the_default_of_a_client(authority: Authority, env: Environment) -> None:
    """And what a key's client shows to a server without TLS is a ClientHello, never a proof."""

    def begins_with_tls(side: ServerSide) -> None:
        assert side.talk.first_byte() == b"\x16"
        side.talk.say("//9?v=2&hb=5000#0")
        side.talk.end()
        with contextlib.suppress(ConnectionError):
            side.talk.rest()

    scripts: Scripts = {"default": (Terms(1, authority.local, SECRET), "", begins_with_tls)}
    with played(scripts, env) as clients:
        clients.wait_in("default", level="error", server=lambda _: True)


@pytest.mark.parametrize("tls", [0, *(pytest.param(tls, marks=pytest.mark.programs) for tls in (1, 2))])
def test_the_right_proof_is_believed(authority: Authority, env: Environment, tls: int) -> None:
    def serve(side: ServerSide) -> None:
        side.negotiate()
        side.beat()
        side.hear_answer()

    terms = Terms(tls, authority.local, SECRET, "web")
    with played({"right": (terms, f"name=web&tls={tls}", serve)}, env) as clients:
        clients.wait_in("right", "server.connected", wire=2, tls=tls)


@pytest.mark.programs
def test_a_v1_server_is_refused_by_name(env: Environment) -> None:
    with V1Server() as server, OurClient(server.tunnel_address, ("127.0.0.1", 9), query="", env=env) as client:
        client.wait_for("server.rejected", level="error", reason=one_of("key_mismatch", "version"))
        assert not client.find("server.connected")
        assert server.idle == 0


@pytest.fixture(scope="module")
def unkeyed(authority: Authority) -> Iterator[OurServers]:
    with OurServers({"clear": "tls=0", "tls": "tls=1"}, authority.local) as running:
        yield running


@pytest.mark.parametrize("label", [pytest.param("clear", marks=pytest.mark.programs), "tls"])
def test_our_server_without_a_key_is_refused_by_our_client_with_one(
    unkeyed: OurServers, env: Environment, label: str
) -> None:
    with OurClient(unkeyed[label].tunnel, ("127.0.0.1", 9), query="", env=env) as client:
        client.wait_for("server.rejected", level="error", reason=one_of("key_mismatch", "no_tls"))
        assert not client.find("server.connected")
