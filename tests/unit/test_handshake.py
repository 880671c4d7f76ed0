"""Both sides of the handshake, against each other and against scripted peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import gevent
import pytest
from gevent import Greenlet, socket

from nodepass.errors import ClosedError, ProtocolError, RefusedError
from nodepass.tunnel import handshake as module
from nodepass.tunnel.control import Agreement
from nodepass.tunnel.handshake import accept_client, connect_to_server
from nodepass.wire.auth import Key
from nodepass.wire.signals import Auth, Challenge, Hello, Offer, Refusal, parse_hello, parse_opening
from tests.unit.controls import Ends, connect_ends, read_line, run

NONCE = "0123456789abcdef" * 2
OFFER = Offer(10102, 1, 5000, True, "f" * 64)
HELLO = Hello(NONCE).encode()
SHORT = 0.05  # seconds for a handshake that is never completed
LONG = 10.0  # seconds for one that is


@pytest.fixture(scope="module")
def key() -> Key:
    return Key("correct horse battery staple")


@pytest.fixture(scope="module")
def other_key() -> Key:
    return Key("incorrect horse battery staple")


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """A client that is slow, as all are on a busy machine, is not taken for a silent one."""
    monkeypatch.setattr(module, "HELLO_WITHIN", LONG)
    with ExitStack() as stack, gevent.Timeout(20):
        yield stack


@pytest.fixture
def ends(stack: ExitStack) -> Ends:
    return connect_ends(stack)


def admit(_proven: bool) -> AbstractContextManager[None]:
    """An admission of any client."""
    return nullcontext()


def accept(stack: ExitStack, ends: Ends, key: Key | None, timeout: float = LONG) -> Greenlet[..., object]:
    """The server's side, running; `get` returns the agreement or raises."""
    return run(stack, accept_client, ends.server_control(), key, OFFER, timeout, admit)


def connect(stack: ExitStack, ends: Ends, key: Key | None) -> Greenlet[..., object]:
    """The client's side, running."""
    return run(stack, connect_to_server, ends.client_control(), key)


def read_challenge(sock: socket.socket) -> str:
    """The nonce of the server's challenge."""
    challenge = parse_opening(read_line(sock))
    assert isinstance(challenge, Challenge)
    return challenge.nonce


# Both sides


@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_both_sides_come_to_the_same_agreement(stack: ExitStack, ends: Ends, key: Key, keyed: bool) -> None:
    mine = key if keyed else None
    sides = accept(stack, ends, mine), connect(stack, ends, mine)
    server, client = (side.get() for side in sides)
    assert isinstance(server, Agreement)
    assert isinstance(client, Agreement)
    assert server.offer == client.offer
    assert server.version == 2
    assert bool(server.offer.mac) == keyed
    if keyed:
        assert server.session
        assert client.session
        assert server.session.data_proof("deadbeef") == client.session.data_proof("deadbeef")
    else:
        assert server.session is client.session is None


def test_the_agreement_is_the_control_connections(stack: ExitStack, ends: Ends) -> None:
    server, client = ends.server_control(), ends.client_control()
    assert (server.version, client.version) == (1, 1)
    accepting = run(stack, accept_client, server, None, OFFER, LONG, admit)
    connect_to_server(client, None)
    accepting.get()
    assert (server.version, client.version) == (2, 2)


def test_keys_that_differ_are_refused_by_the_server(stack: ExitStack, ends: Ends, key: Key, other_key: Key) -> None:
    connect(stack, ends, other_key)
    with pytest.raises(RefusedError, match="does not match") as refused:
        accept(stack, ends, key).get()
    assert refused.value.reason == "key-mismatch"


# The server's side


def test_a_silent_client_is_offered_wire_v1(stack: ExitStack, ends: Ends) -> None:
    agreement = accept(stack, ends, None, SHORT).get()
    assert read_line(ends.client) == b"//10102#1\n"
    assert agreement == Agreement(Offer(10102, 1))


def test_a_client_that_says_hello_is_offered_wire_v2(stack: ExitStack, ends: Ends) -> None:
    accepting = accept(stack, ends, None)
    ends.client.sendall(HELLO)
    assert read_line(ends.client) == OFFER.encode()
    assert accepting.get() == Agreement(OFFER)


def test_a_hello_may_arrive_in_pieces(stack: ExitStack, ends: Ends) -> None:
    accepting = accept(stack, ends, None)
    for byte in HELLO:
        ends.client.sendall(bytes([byte]))
        gevent.sleep(0)
    assert accepting.get() == Agreement(OFFER)


def test_a_client_that_proves_the_key_is_offered_a_proof_in_return(stack: ExitStack, ends: Ends, key: Key) -> None:
    ends.client.sendall(HELLO)
    accepting = accept(stack, ends, key)
    nonce = read_challenge(ends.client)
    ends.client.sendall(Auth(key.client_proof(NONCE, nonce)).encode())
    offer = parse_opening(read_line(ends.client))
    assert isinstance(offer, Offer)
    assert offer.mac == key.server_proof(NONCE, nonce, OFFER)
    assert accepting.get() == Agreement(offer, accepting.get().session)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "token", "words"),
    [
        (Auth("0" * 64).encode(), "key-mismatch", "does not match"),
        (b"//auth?mac=00\n", "key-mismatch", "invalid answer to the challenge"),
        (HELLO, "key-mismatch", "invalid answer to the challenge"),
        (b"", "key-required", "no proof of the key within"),
    ],
    ids=["wrong proof", "malformed proof", "another hello", "silence"],
)
def test_a_client_that_does_not_prove_the_key_is_refused(
    stack: ExitStack, ends: Ends, key: Key, answer: bytes, token: str, words: str
) -> None:
    ends.client.sendall(HELLO)
    accepting = accept(stack, ends, key, LONG if answer else SHORT)
    read_challenge(ends.client)
    ends.client.sendall(answer)
    with pytest.raises(RefusedError, match=words) as refused:
        accepting.get()
    assert refused.value.reason == token


def test_a_client_that_closes_after_the_challenge_is_refused(stack: ExitStack, ends: Ends, key: Key) -> None:
    ends.client.sendall(HELLO)
    accepting = accept(stack, ends, key)
    read_challenge(ends.client)
    ends.client.close()
    with pytest.raises(RefusedError) as refused:
        accepting.get()
    assert refused.value.reason == "key-required"


def test_silence_is_refused_where_a_key_is_required(stack: ExitStack, ends: Ends, key: Key) -> None:
    with pytest.raises(RefusedError) as refused:
        accept(stack, ends, key, SHORT).get()
    assert refused.value.reason == "key-required"


@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_another_version_is_refused(stack: ExitStack, ends: Ends, key: Key, keyed: bool) -> None:
    accepting = accept(stack, ends, key if keyed else None)
    ends.client.sendall(b"//hello?v=3&nonce=" + NONCE.encode() + b"\n")
    with pytest.raises(RefusedError, match="'3'") as refused:
        accepting.get()
    assert refused.value.reason == "version"


@pytest.mark.parametrize(
    "line", [b"GET / HTTP/1.1\r\n", b"//hello?v=2\n", b"x" * 5000 + b"\n"], ids=["HTTP", "no nonce", "over-long"]
)
def test_a_first_line_that_is_no_hello_is_a_protocol_error(stack: ExitStack, ends: Ends, line: bytes) -> None:
    accepting = accept(stack, ends, None)
    ends.client.sendall(line)
    with pytest.raises(ProtocolError):
        accepting.get()


def test_a_client_that_closes_before_its_hello_is_no_v1_client(stack: ExitStack, ends: Ends) -> None:
    accepting = accept(stack, ends, None)
    ends.client.close()
    with pytest.raises(ClosedError):
        accepting.get()


@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_admission_is_asked_before_the_offer_and_ends_after_it(
    stack: ExitStack, ends: Ends, key: Key, keyed: bool
) -> None:
    """Whether the client has proven the key decides how it is admitted."""
    control, seen = ends.server_control(), []

    @contextmanager
    def admission(proven: bool) -> Iterator[None]:
        seen.append(("asked", proven, control.agreement))
        yield
        seen.append(("over", proven, control.agreement))

    accepting = run(stack, accept_client, control, key if keyed else None, OFFER, LONG, admission)
    connect_to_server(ends.client_control(), key if keyed else None)
    assert seen == [("asked", keyed, None), ("over", keyed, accepting.get())]


def test_a_client_that_is_not_admitted_gets_no_offer(stack: ExitStack, ends: Ends) -> None:
    def refuse(_proven: bool) -> AbstractContextManager[None]:
        raise RefusedError("busy", "another client is connected")

    control = ends.server_control()
    accepting = run(stack, accept_client, control, None, OFFER, LONG, refuse)
    ends.client.sendall(HELLO)
    with pytest.raises(RefusedError, match="another client"):
        accepting.get()
    assert control.agreement is None
    ends.server.close()
    assert ends.client.recv(1) == b""


# The client's side


def test_a_client_says_hello_first_and_takes_a_v1_offer(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends, None)
    assert parse_hello(read_line(ends.server)).version == "2"
    ends.server.sendall(b"//80#0\n")
    assert connecting.get() == Agreement(Offer(80, 0))


@pytest.mark.parametrize("token", ["key-required", "key-mismatch", "busy", "version", "shutdown", "later-than-us"])
def test_a_refusal_is_told_with_its_token(stack: ExitStack, ends: Ends, token: str) -> None:
    connecting = connect(stack, ends, None)
    ends.server.sendall(Refusal(token).encode())
    with pytest.raises(RefusedError) as refused:
        connecting.get()
    assert refused.value.reason == token
    assert str(refused.value)


def test_a_client_without_a_key_refuses_a_challenge(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends, None)
    ends.server.sendall(Challenge(NONCE).encode())
    with pytest.raises(RefusedError) as refused:
        connecting.get()
    assert refused.value.reason == "key-required"
    assert read_line(ends.server).startswith(b"//hello")
    ends.client.close()
    assert read_line(ends.server) == b"", "it has nothing to prove"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([b"//80#0\n"], "wire v1"),
        ([OFFER.encode()], "has no key"),
        ([Challenge(NONCE).encode(), OFFER.encode()], "has no key"),
        ([Challenge(NONCE).encode(), Offer(80, 0, 5000, mac="0" * 64).encode()], "does not match"),
    ],
    ids=["v1", "no challenge", "no proof", "wrong proof"],
)
def test_a_client_with_a_key_refuses_a_server_that_does_not_prove_it(
    stack: ExitStack, ends: Ends, key: Key, lines: list[bytes], words: str
) -> None:
    control = ends.client_control()
    connecting = run(stack, connect_to_server, control, key)
    for line in lines:
        ends.server.sendall(line)
    with pytest.raises(RefusedError, match=words) as refused:
        connecting.get()
    assert refused.value.reason == "key-mismatch"
    assert control.agreement is None


def test_the_servers_proof_covers_the_whole_offer(stack: ExitStack, ends: Ends, key: Key) -> None:
    """A man in the middle that changes the port would have the data connections."""
    connecting = connect(stack, ends, key)
    nonce = parse_hello(read_line(ends.server)).nonce
    ends.server.sendall(Challenge(NONCE).encode())
    proof = key.server_proof(nonce, NONCE, Offer(80, 0, 5000))
    ends.server.sendall(Offer(81, 0, 5000, mac=proof).encode())
    with pytest.raises(RefusedError, match="does not match"):
        connecting.get()


@pytest.mark.parametrize(
    "lines", [[Challenge(NONCE).encode()] * 2, [b"\n"], [b"//deadbeef#1\n"]], ids=["two challenges", "empty", "launch"]
)
def test_lines_that_are_no_handshake_are_a_protocol_error(
    stack: ExitStack, ends: Ends, key: Key, lines: list[bytes]
) -> None:
    connecting = connect(stack, ends, key)
    for line in lines:
        ends.server.sendall(line)
    with pytest.raises(ProtocolError):
        connecting.get()
