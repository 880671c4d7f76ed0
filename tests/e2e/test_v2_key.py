"""A server with a key: who does not prove it learns nothing, harms nobody, and is told why."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.log import one_of
from tests.support.process import Environment
from tests.support.sockets import is_silent
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v2_client import V2Client
from tests.support.v2_control import HELLO_WAIT, Conversation, Refused, dial
from tests.support.v2_crypto import Transcript, sign, stretch
from tests.support.v2_server import V2Server
from tests.support.v2_tunnel import KEYED, SECRET

PATIENT = 1.5
"""Seconds that the server waits for a hello, a proof, and a data connection's proof."""

GUARDED: Environment = {**KEYED, "HANDSHAKE_TIMEOUT": f"{PATIENT * 1000:.0f}ms"}
NONCE = "00112233445566778899aabbccddeeff"


@pytest.fixture
def server() -> Iterator[OurServer]:
    with OurServer(env=GUARDED) as running:
        yield running


@pytest.fixture
def stranger(server: OurServer) -> Iterator[V2Client]:
    """A client that has said hello with a nonce of its choice, knows the key, and is led by the test."""
    with V2Client(server.tunnel_address, secret=SECRET, automatic=False) as client:
        client.dial()
        client.hello(NONCE)
        yield client


def assert_served(server: OurServer) -> None:
    """Check that the right client gets in, at once, and works."""
    with Target() as target, V2Client(server.tunnel_address, target.address, secret=SECRET) as client:
        client.wait_until_full()
        Tunnel(server, client, target).assert_works()
        assert not client.refusals


def refusal(talk: Conversation) -> str:
    """The token of the refusal, empty where the connection just ended; AssertionError at anything else."""
    try:
        return talk.refusal()
    except Refused:
        raise
    except ConnectionError:
        return ""


def test_a_silent_peer_is_told_that_a_key_is_required(server: OurServer) -> None:
    with dial(server.tunnel_address) as talk:
        assert is_silent(talk.sock, HELLO_WAIT + 0.1)  # a v1 peer is not given the v1 line
        assert talk.refusal() == "key-required"
    server.wait_for("client.rejected", level="warn", reason="key_required")
    assert_served(server)


def test_a_v1_client_is_turned_away_and_its_operator_can_read_why(server: OurServer) -> None:
    with V1Client(server.tunnel_address, automatic=False) as client:
        with pytest.raises(ConnectionError, match="reason=key-required"):
            client.connect()
        server.wait_for("client.rejected", level="warn", reason="key_required")
    assert not server.find("client.connected")
    assert_served(server)


def test_a_hello_is_answered_with_a_challenge_and_nothing_more(stranger: V2Client) -> None:
    stranger.challenge()
    assert is_silent(stranger.talk.sock, PATIENT / 2)


def test_a_client_that_never_proves_itself_is_turned_away(server: OurServer, stranger: V2Client) -> None:
    stranger.challenge()
    began = time.monotonic()
    assert refusal(stranger.talk) in ("key-required", "key-mismatch", "")
    assert time.monotonic() - began > PATIENT / 2
    server.wait_for("client.rejected", level="warn", reason="key_required")
    assert_served(server)


def test_a_client_that_leaves_at_the_challenge_is_one_line_in_the_log(server: OurServer) -> None:
    with V2Client(server.tunnel_address, automatic=False) as client:
        client.dial()
        client.hello()
        with pytest.raises(AssertionError, match="challenge"):
            client.adopt()
    server.wait_for("client.rejected", level="warn", reason="key_required")
    assert_served(server)


def test_our_client_without_a_key_says_that_the_server_requires_one(server: OurServer) -> None:
    with OurClient(server.tunnel_address, ("127.0.0.1", 9), env=CALM) as client:
        client.wait_for("server.rejected", level="error", reason="key_required")
        server.wait_for("client.rejected", level="warn", reason="key_required")
        assert not client.find("server.connected")
        assert client.is_running
    assert_served(server)


def test_our_client_without_a_key_says_so_to_a_challenging_peer_too() -> None:
    with V2Server(secret=SECRET) as peer, OurClient(peer.tunnel_address, ("127.0.0.1", 9)) as client:
        client.wait_for("server.rejected", level="error", reason="key_required")
        assert client.is_running


def test_both_ends_say_that_the_keys_do_not_match(server: OurServer) -> None:
    wrong = {**CALM, "TUNNEL_KEY": "correct horse battery stapler"}
    with OurClient(server.tunnel_address, ("127.0.0.1", 9), env=wrong) as client:
        client.wait_for("server.rejected", level="error", reason="key_mismatch")
        server.wait_for("client.rejected", level="warn", reason="key_mismatch")
        assert not client.find("server.connected")
        assert client.is_running
    assert_served(server)


def test_our_client_says_that_a_peer_has_another_key() -> None:
    with V2Server(secret="another long enough secret") as peer:
        with OurClient(peer.tunnel_address, ("127.0.0.1", 9), env=KEYED) as client:
            client.wait_for("server.rejected", level="error", reason="key_mismatch")
        assert peer.connects == 0


def test_a_key_may_be_any_text(stack: contextlib.ExitStack) -> None:
    secret = "schlüssel – 鍵 – with spaces = & # ?"
    server = stack.enter_context(OurServer(env={**CALM, "TUNNEL_KEY": secret}))
    client = stack.enter_context(V2Client(server.tunnel_address, secret=secret))
    client.wait_until_full()
    peer = stack.enter_context(V2Server(secret=secret))
    stack.enter_context(
        OurClient(peer.tunnel_address, ("127.0.0.1", 9), env={**CALM, "TUNNEL_KEY": secret})
    ).wait_until_connected()


def other_nonce(client: V2Client) -> str:
    return Transcript(SECRET, client.nonce, client.nonce).client_proof()


def swapped(client: V2Client) -> str:
    return Transcript(SECRET, client.server_nonce, client.nonce).client_proof()


def unlabelled(client: V2Client) -> str:
    return sign(stretch(SECRET), f"nodepass/2\n{client.nonce}\n{client.server_nonce}\n".encode()).hex()


def of_the_server(client: V2Client) -> str:
    return Transcript(SECRET, client.nonce, client.server_nonce).server_proof()


def without_stretching(client: V2Client) -> str:
    text = f"client\nnodepass/2\n{client.nonce}\n{client.server_nonce}\n"
    return sign(SECRET.encode(), text.encode()).hex()


WRONG_PROOFS: dict[str, Callable[[V2Client], str]] = {
    "zeros": lambda _: "0" * 64,
    "backwards": lambda client: client.proof()[::-1],
    "one bit off": lambda client: f"{int(client.proof(), 16) ^ 1:064x}",
    "of another nonce": other_nonce,
    "of swapped nonces": swapped,
    "without its label": unlabelled,
    "of the server": of_the_server,
    "without stretching": without_stretching,
}
MALFORMED_PROOFS: dict[str, Callable[[V2Client], str]] = {
    "nothing": lambda _: "",
    "a digit short": lambda client: client.proof()[:-1],
    "half": lambda client: client.proof()[:32],
    "too long": lambda client: client.proof() + "00",
    "not hex": lambda _: "x" * 64,
    "not ASCII": lambda _: "é" * 32,
}


def show(server: OurServer, make: Callable[[V2Client], str]) -> str:
    """Answer a challenge with this; the token with which the server turns it away."""
    with V2Client(server.tunnel_address, secret=SECRET, automatic=False) as stranger:
        stranger.dial()
        stranger.hello(NONCE)
        stranger.challenge()
        stranger.authenticate(make(stranger))
        return stranger.talk.refusal()


def test_a_wrong_proof_is_turned_away(server: OurServer) -> None:
    told = {name: show(server, wrong) for name, wrong in WRONG_PROOFS.items()}
    assert told == dict.fromkeys(WRONG_PROOFS, "key-mismatch")
    server.wait_for("client.rejected", level="warn", reason="key_mismatch")
    assert not server.find("client.connected") + server.find_crashes()
    assert_served(server)


def test_a_malformed_proof_is_turned_away(server: OurServer) -> None:
    told = {show(server, malformed) for malformed in MALFORMED_PROOFS.values()}
    assert told <= {"key-mismatch", "key-required"}
    server.wait_for("client.rejected", level="warn", reason=one_of("key_mismatch", "key_required"))
    assert not server.find("client.connected") + server.find_crashes()
    assert_served(server)


def test_a_replayed_proof_is_worthless_because_the_challenge_is_never_the_same(
    server: OurServer, stranger: V2Client
) -> None:
    challenges = {stranger.challenge()}
    recorded = stranger.proof()
    stranger.authenticate(recorded)
    stranger.adopt()
    stranger.talk.sock.close()
    for _ in range(3):
        with V2Client(server.tunnel_address, secret=SECRET, automatic=False) as again:
            again.dial()
            again.hello(NONCE)
            challenges.add(again.challenge())
            again.authenticate(recorded)
            assert again.talk.refusal() == "key-mismatch"
    assert len(challenges) == 4


def test_a_right_proof_behind_a_wrong_one_is_too_late(stranger: V2Client) -> None:
    stranger.challenge()
    stranger.talk.sock.sendall(f"//auth?mac={'0' * 64}\n//auth?mac={stranger.proof()}\n".encode())
    assert refusal(stranger.talk) in ("key-mismatch", "")
