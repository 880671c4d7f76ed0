"""A server of ours with a key: a client that does not prove all of what both believe learns nothing and is told why."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.sockets import until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.wire2 import lines
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.ours import OurClients, OurServers
from tests.support.wire2.proofs import SECRET, sign, stretch
from tests.support.wire2.server import V2Server
from tests.support.wire2.talk import Rejected, dial

OTHER_SECRET = "another secret that is long enough"
IDENTITY = lines.make_client()
NONCE = "00112233445566778899aabbccddeeff"
KEYED = {**CALM, "TUNNEL_KEY": SECRET}
SERVERS = {"clear": "tls=0&name=clear", "tls": "tls=1&name=tls", "verified": "tls=2&name=verified"}
TLS = {"clear": 0, "tls": 1, "verified": 2, "default": 1}

in_the_clear_and_inside_tls = pytest.mark.parametrize("label", ["clear", "tls"])


@pytest.fixture(scope="module")
def servers(authority: Authority) -> Iterator[OurServers]:
    with OurServers(SERVERS, authority.local, env={**KEYED, "HANDSHAKE_TIMEOUT": "1500ms"}) as running:
        yield running
        assert not running.find_crashes()


def client_of(servers: OurServers, label: str, **given: object) -> ClientSide:
    """A client that a test leads, right in everything that is not given."""
    right = {"identity": IDENTITY, "secret": SECRET, "name": label, "demand": TLS[label]}
    return ClientSide(servers[label].tunnel, **{**right, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize("label", SERVERS)
def test_the_right_client_is_challenged_and_gets_an_offer_with_a_proof(servers: OurServers, label: str) -> None:
    with client_of(servers, label) as client:
        client.connect()  # checks the proof
        assert client.offer.names[-1] == "mac"
    servers.wait_in(label, "client.connected", wire=2)


def test_with_a_key_tls_is_the_default_of_a_server() -> None:
    with OurServers({"default": "name=x"}, env=KEYED) as servers, client_of(servers, "default", name="x") as client:
        client.connect()
        assert client.tls == 1


def test_a_key_s_client_may_begin_in_the_clear_and_is_asked_for_tls(servers: OurServers) -> None:
    with client_of(servers, "tls", demand=0) as client:
        client.connect()
        assert client.tls == 1


@in_the_clear_and_inside_tls
def test_a_hello_is_answered_with_a_challenge_and_nothing_more(servers: OurServers, label: str) -> None:
    with client_of(servers, label) as client:
        client.begin()
        client.hear_challenge()
        assert client.talk.is_silent(0.2)


@in_the_clear_and_inside_tls
def test_a_client_that_never_proves_itself_is_told_that_a_key_is_required(servers: OurServers, label: str) -> None:
    with client_of(servers, label) as client:
        client.begin()
        client.hear_challenge()
        assert client.talk.rejection() == "key-required"
    servers.wait_in(label, "client.rejected", level="warn", reason="key_required")


def test_a_client_that_leaves_at_the_challenge_is_one_line_in_the_log(servers: OurServers) -> None:
    mark = servers.mark()
    with client_of(servers, "clear") as client:
        client.begin()
        client.hear_challenge()
    servers.wait_in("clear", "client.rejected", after=mark, level="warn", reason="key_required")


@in_the_clear_and_inside_tls
def test_no_reset_overtakes_an_error(servers: OurServers, label: str) -> None:
    """The server reads what the client has sent before it closes."""
    with client_of(servers, label) as client:
        client.begin()
        client.hear_challenge()
        client.authenticate("0" * 64)
        client.talk.write(b"x" * 20_000)
        assert client.talk.rejection() == "key-mismatch"


def test_a_v1_client_is_rejected_and_its_operator_can_read_why(servers: OurServers) -> None:
    client = V1Client(servers["clear"].tunnel, automatic=False)
    with client, pytest.raises(ConnectionError, match="reason=key-required"):
        client.connect()


Forge = Callable[[ClientSide], str]


def of(**changes: object) -> Forge:
    """The proof of a client that believes something else."""
    return lambda client: replace(client.agreement, **changes).client_proof()  # type: ignore[arg-type]


def with_hello(**changes: object) -> Forge:
    """The proof of a client whose hello was changed on its way."""

    def forge(client: ClientSide) -> str:
        given = {"nonce": NONCE, "client": client.identity, "name": client.name, **changes}
        return replace(client.agreement, hello=lines.make_hello(**given)).client_proof()  # type: ignore[arg-type]

    return forge


def labelled(label: bytes) -> Forge:
    """HMAC of the right text under another label."""
    return lambda client: sign(stretch(SECRET, client.name), label + client.agreement._negotiation).hex()


def without_stretching(client: ClientSide) -> str:
    return sign(SECRET.encode(), b"client\n" + client.agreement._negotiation).hex()


WRONG_PROOFS: dict[str, Forge] = {
    "zeros": lambda _: "0" * 64,
    "backwards": lambda client: client.agreement.client_proof()[::-1],
    "one bit off": lambda client: f"{int(client.agreement.client_proof(), 16) ^ 1:064x}",
    "another secret": of(secret=OTHER_SECRET),
    "another name's key": of(name="other"),
    "the empty name's key": of(name=""),
    "another channel": of(channel="00" * 32),
    "another challenge": of(challenge=b"//challenge?nonce=" + NONCE.encode()),
    "a challenge with a line's end": lambda client: replace(
        client.agreement, challenge=client.agreement.challenge + b"\n"
    ).client_proof(),
    "another nonce": with_hello(nonce="00" * 16),
    "another client": with_hello(client="f" * 16),
    "another name": with_hello(name="other"),
    "addresses wanted": with_hello(wants=True),
    "no label": labelled(b""),
    "the server's": lambda client: client.agreement.server_proof(),
    "the server's label": labelled(b"server\n"),
    "not stretched": without_stretching,
}


def show(servers: OurServers, label: str, forge: Forge) -> str:
    """Answer a challenge with this; the token with which the server rejects it."""
    with client_of(servers, label) as client:
        client.dial()
        if client.demand:
            client.secure()
        client.say_hello(lines.make_hello(NONCE, client.identity, client.name))
        client.hear_challenge()
        client.authenticate(forge(client))
        return client.talk.rejection()


@in_the_clear_and_inside_tls
def test_a_wrong_proof_is_rejected(servers: OurServers, label: str) -> None:
    mark = servers.mark()
    told = {name: show(servers, label, forge) for name, forge in WRONG_PROOFS.items()}
    assert told == dict.fromkeys(WRONG_PROOFS, "key-mismatch")
    servers.wait_in(label, "client.rejected", level="warn", reason="key_mismatch")
    assert not servers.find_in(label, "client.connected", after=mark)


def test_a_proof_without_the_channel_is_rejected_inside_tls(servers: OurServers) -> None:
    """It is what a man in the middle of TLS could pass on."""
    assert show(servers, "tls", of(channel="")) == "key-mismatch"


def test_a_proof_of_the_hello_in_the_clear_is_rejected_inside_tls(servers: OurServers) -> None:
    with client_of(servers, "tls", demand=0) as client:
        client.dial()
        first = client.say_hello()
        client.hear_tls()
        client.say_hello()
        client.hear_challenge()
        client.authenticate(replace(client.agreement, hello=first).client_proof())
        assert client.talk.rejection() == "key-mismatch"


MALFORMED_PROOFS: dict[str, Forge] = {
    "nothing": lambda _: "",
    "a digit short": lambda client: client.agreement.client_proof()[:-1],
    "half": lambda client: client.agreement.client_proof()[:32],
    "too long": lambda client: client.agreement.client_proof() + "00",
    "upper case": lambda client: client.agreement.client_proof().upper(),
    "not hex": lambda _: "x" * 64,
    "not ASCII": lambda _: "é" * 32,
}


def answer(servers: OurServers, label: str, forge: Forge) -> bytes:
    """What is said to a proof until the end."""
    with client_of(servers, label) as client:
        client.begin()
        client.hear_challenge()
        client.authenticate(forge(client))
        return client.talk.rest()


@in_the_clear_and_inside_tls
def test_a_malformed_proof_is_rejected(servers: OurServers, label: str) -> None:
    told = {name: answer(servers, label, forge) for name, forge in MALFORMED_PROOFS.items()}
    allowed = (b"", b"//error?reason=key-mismatch\n", b"//error?reason=key-required\n")
    assert {name: said for name, said in told.items() if said not in allowed} == {}


def test_a_right_proof_behind_a_wrong_one_is_too_late(servers: OurServers) -> None:
    with client_of(servers, "clear") as client:
        client.begin()
        client.hear_challenge()
        right = client.agreement.client_proof()
        client.talk.write(f"//auth?mac={'0' * 64}\n//auth?mac={right}\n".encode())
        assert client.talk.rejection() == "key-mismatch"


@in_the_clear_and_inside_tls
def test_a_replayed_proof_is_worthless_because_the_challenge_is_never_the_same(servers: OurServers, label: str) -> None:
    hello = lines.make_hello(NONCE, IDENTITY, label)
    challenges, recorded = set(), ""
    for _ in range(3):
        with client_of(servers, label) as client:
            client.dial()
            if client.demand:
                client.secure()
            client.say_hello(hello)
            client.hear_challenge()
            challenges.add(client.agreement.challenge)
            client.authenticate(recorded or None)
            if recorded:
                assert client.talk.rejection() == "key-mismatch"
            else:
                client.hear_offer()
                recorded = client.agreement.client_proof()
    assert len(challenges) == 3


@in_the_clear_and_inside_tls
def test_an_unknown_name_is_challenged_like_any_other_and_the_log_says_which(servers: OurServers, label: str) -> None:
    """So that names cannot be found out; the token is the same as for a wrong key."""

    def is_logged() -> bool:
        """The log repeats a line ten times a second at most: ask again."""
        with client_of(servers, label, name="elsewhere") as client:
            client.begin()
            client.hear_challenge()
            client.authenticate()
            assert client.talk.rejection() == "key-mismatch"
        return bool(servers.find("client.rejected", level="warn", error=re.compile("elsewhere")))

    until(is_logged)


OUT_OF_ORDER = {
    "auth first": "//auth?mac=" + "0" * 64 + "\n{hello}\n",
    "hello twice": "{hello}\n{hello}\n",
    "empty lines": "{hello}\n\n\n\n",
    "auth without mac": "{hello}\n//auth\n",
    "a challenge": "{hello}\n//challenge?nonce=" + NONCE + "\n",
    "a heartbeat": "{hello}\n//beat?ok=1\n",
    "too long": "{hello}\n" + "x" * 10000 + "\n",
    "a data connection": "//data?sid=" + NONCE + "\n",
    "a data connection of old": "//data\n",
}


@in_the_clear_and_inside_tls
def test_lines_out_of_order_never_get_an_offer(servers: OurServers, label: str) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(servers, label)) for _ in OUT_OF_ORDER]
        for client, sent in zip(clients, OUT_OF_ORDER.values(), strict=True):
            client.dial()
            if client.demand:
                client.secure()
            hello = lines.make_hello(client=IDENTITY, name=label).decode()
            client.talk.write(sent.format(hello=hello).encode())
        for client, name in zip(clients, OUT_OF_ORDER, strict=True):
            for line in client.talk.rest().splitlines():
                assert line.startswith((b"//challenge?nonce=", b"//error?reason=key-")), (name, line)


def test_both_ends_say_that_the_keys_do_not_match_or_that_the_client_has_none(
    servers: OurServers, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(OTHER_SECRET)
    file.chmod(0o600)
    queries = {"tls": f"name=tls&tunnel_key_file={file}", "clear": ""}
    with OurClients({label: (servers[label].tunnel, query) for label, query in queries.items()}) as clients:
        for label, reason in (("tls", "key_mismatch"), ("clear", "key_required")):
            clients.wait_in(label, "server.rejected", level="error", reason=reason)
            servers.wait_in(label, "client.rejected", level="warn", reason=reason)
        assert not clients.find("server.connected")
        assert clients.is_running


@pytest.mark.programs
def test_our_client_without_a_key_says_so_to_a_challenging_peer_too() -> None:
    with V2Server(secret=SECRET) as peer, OurClient(peer.tunnel_address, ("127.0.0.1", 9)) as client:
        client.wait_for("server.rejected", level="error", reason="key_required")
        assert client.is_running


@pytest.mark.programs
def test_a_key_may_be_any_text() -> None:
    secret = "schlüssel – 鍵 – with spaces = & # ?"
    env = {**CALM, "TUNNEL_KEY": secret}
    with OurServer(env=env) as server, V2Client(server.tunnel_address, secret=secret) as client:
        client.wait_until_full()


def test_a_stranger_does_not_disturb_the_client_that_is_connected(servers: OurServers) -> None:
    place = servers["verified"]
    with (
        Target() as target,
        V2Client(place.tunnel, target.address, secret=SECRET, name="verified", demand=2) as client,
    ):
        client.wait_until_full()
        with dial(place.tunnel) as silent, client_of(servers, "verified", secret=OTHER_SECRET) as wrong:
            with pytest.raises(Rejected, match="key-mismatch"):
                wrong.connect()
            assert silent.rejection() == "key-required"
        Tunnel(place_server(servers, "verified"), client, target).assert_works()
        assert client.connects == 1


def place_server(servers: OurServers, label: str) -> OurServer:
    """One of several servers, as the server of a `Tunnel`."""
    server = OurServer(env=KEYED)
    server.visitor_address = servers[label].visitors
    return server


@pytest.mark.programs
def test_silent_strangers_by_the_hundred_do_not_keep_the_client_out() -> None:
    """They may hold what they hold for HANDSHAKE_TIMEOUT: a client that proves the key does not wait for them."""
    env = {**KEYED, "HANDSHAKE_TIMEOUT": "60s"}
    with OurServer(env=env) as server, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(server.tunnel_address))
        with Target() as target, V2Client(server.tunnel_address, target.address, secret=SECRET) as client:
            client.wait_until_full()
            Tunnel(server, client, target).assert_works()
