"""A client with a key: no server without it, none in the middle and none of an older version is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.certificates import Authority
from tests.support.log import loud, one_of
from tests.support.process import Environment, Nodepass
from tests.support.sockets import connect, format_address, is_silent
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_server import V1Server
from tests.support.v2_control import Conversation, ScriptedServer
from tests.support.v2_crypto import Transcript
from tests.support.v2_middle import TLSMiddle
from tests.support.v2_tunnel import KEYED, SECRET

NONCE = "f0e0d0c0b0a090807060504030201000"


def without_challenge(talk: Conversation, _: str, port: int) -> None:
    talk.say(f"//{port}?v=2&hb=200#0")


def made_up_mac(talk: Conversation, _: str, port: int) -> None:
    talk.say(f"//{port}?v=2&hb=200&mac={'0' * 64}#0")


def v1_at_once(talk: Conversation, _: str, port: int) -> None:
    talk.say(f"//{port}#0")


def v1_after_the_proof(talk: Conversation, nonce: str, port: int) -> None:
    challenge(talk, nonce, port)
    talk.say(f"//{port}#0")


def challenge(talk: Conversation, nonce: str, port: int) -> Transcript:
    """Challenge the client and hear its right proof; what both ends would agree on."""
    talk.say(f"//challenge?nonce={NONCE}")
    agreed = Transcript(SECRET, nonce, NONCE, port)
    assert talk.hear().line.decode() == f"//auth?mac={agreed.client_proof()}"
    return agreed


def no_mac(talk: Conversation, nonce: str, port: int) -> None:
    challenge(talk, nonce, port)
    talk.say(f"//{port}?v=2&hb=200#0")


def with_mac(change: Callable[[Transcript], str]) -> Callable[[Conversation, str, int], None]:
    """A server that challenges and then shows this proof."""

    def script(talk: Conversation, nonce: str, port: int) -> None:
        talk.say(f"//{port}?v=2&hb=200&mac={change(challenge(talk, nonce, port))}#0")

    return script


SCRIPTS: dict[str, Callable[[Conversation, str, int], None]] = {
    "no challenge": without_challenge,
    "no challenge, a mac": made_up_mac,
    "v1 at once": v1_at_once,
    "v1 after the proof": v1_after_the_proof,
    "no mac": no_mac,
    "empty mac": with_mac(lambda _: ""),
    "mac of zeros": with_mac(lambda _: "0" * 64),
    "truncated mac": with_mac(lambda agreed: agreed.server_proof()[:32]),
    "mac that is not hex": with_mac(lambda _: "%C3%A9" * 10),
    "client's proof sent back": with_mac(lambda agreed: agreed.client_proof()),
    "mac of another key": with_mac(lambda agreed: replace(agreed, secret="another").server_proof()),
    "mac of another nonce": with_mac(lambda agreed: replace(agreed, client_nonce=NONCE).server_proof()),
    "mac for another port": with_mac(lambda agreed: replace(agreed, port=1).server_proof()),
    "mac for another tls": with_mac(lambda agreed: replace(agreed, tls=1).server_proof()),
    "mac for a fingerprint": with_mac(lambda agreed: replace(agreed, fingerprint="00" * 32).server_proof()),
}


def test_a_server_that_does_not_prove_the_key_is_refused(stack: contextlib.ExitStack) -> None:
    servers = {name: stack.enter_context(ScriptedServer()) for name in SCRIPTS}
    data = stack.enter_context(ScriptedServer())
    urls = [f"client://{format_address(server.address)}/127.0.0.1:9?log=debug" for server in servers.values()]
    client = stack.enter_context(Nodepass(*urls, env=KEYED))
    for name, server in servers.items():
        talk = server.accept()
        hello = talk.hear()
        SCRIPTS[name](talk, hello.parameters["nonce"], data.address[1])
        assert talk.is_ended_by_peer(), name
    for server in servers.values():
        client.wait_for(tunnel=f"client:{server.address[1]}", level=loud, reason=one_of("key_mismatch", "protocol"))
    assert not client.find("server.connected") + client.find_crashes()
    assert client.is_running
    data.stop_waiting()
    with pytest.raises(TimeoutError):
        data.accept()


def test_the_right_proof_is_believed() -> None:
    with (
        ScriptedServer() as server,
        ScriptedServer() as data,
        OurClient(server.address, ("127.0.0.1", 9), env=KEYED) as client,
        server.accept() as talk,
    ):
        nonce = talk.hear().parameters["nonce"]
        with_mac(lambda agreed: agreed.server_proof())(talk, nonce, data.address[1])
        client.wait_until_connected(wire=2)
        data.accept()


def test_a_v1_server_is_refused_by_name() -> None:
    with V1Server() as server, OurClient(server.tunnel_address, ("127.0.0.1", 9), env=KEYED) as client:
        client.wait_for("server.rejected", level="error", reason="key_mismatch")
        assert not client.find("server.connected")
        assert server.idle == 0


def test_our_server_without_a_key_is_refused_by_our_client_with_one() -> None:
    with OurServer() as server, OurClient(server.tunnel_address, ("127.0.0.1", 9), env=KEYED) as client:
        client.wait_for("server.rejected", level="error", reason="key_mismatch")
        assert not client.find("server.connected")
        with connect(server.visitor_address) as visitor:
            assert is_silent(visitor, 0.3)


@pytest.mark.parametrize("env", [CALM, KEYED], ids=["without a key", "with a key"])
def test_a_man_in_the_middle_who_ends_tls_is_refused_with_a_key_only(
    stack: contextlib.ExitStack, authority: Authority, env: Environment
) -> None:
    """That he is let through without a key shows that he would be good enough."""
    server = stack.enter_context(OurServer(1, env=env))
    target = stack.enter_context(Target())
    ports = server.tunnel_address[1], server.data_address[1]
    middle = stack.enter_context(TLSMiddle(*ports, authority.issue("middle.example")))
    client = stack.enter_context(OurClient(middle.address, target.address, env=env))
    if env is CALM:
        Tunnel(server, client, target).assert_works()
        assert middle.seen
    else:
        client.wait_for("data.dial_failed", level="error", check="fingerprint")
        with connect(server.visitor_address), pytest.raises(TimeoutError):
            target.accept(timeout=0.5)
        assert not middle.seen
        assert client.is_running
