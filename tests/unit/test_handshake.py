"""Both sides of the handshake, against each other and against scripted peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
from gevent import Greenlet, socket
from OpenSSL import SSL

from nodepass.config.settings import Settings
from nodepass.config.urls import ClientURL, parse_url, with_defaults
from nodepass.errors import ClosedError, ProtocolError, RefusedError, TLSError, VerificationError
from nodepass.net.stream import TCPStream, read_only_line
from nodepass.tls.certificates import load_pair
from nodepass.tls.contexts import _client_context, server_context
from nodepass.tls.stream import TLSStream, accept_tls, connect_tls
from nodepass.tls.verify import Expected
from nodepass.tunnel.control import Agreement, ServerControl
from nodepass.tunnel.handshake import Candidate, Terms, accept_client, connect_to_server
from nodepass.wire.auth import Key, Transcript
from nodepass.wire.lines import MAX_OPENING
from nodepass.wire.negotiation import REASONS, Auth, Challenge, Hello, Offer, Refusal, parse_first, parse_opening
from tests.support.certificates import Authority
from tests.support.table import each_row
from tests.unit.controls import Ends, connect_ends, read_line, run, self_signed_context

NONCE, CLIENT = "0123456789abcdef" * 2, "0011223344556677"
OFFERS = {tls: Offer(10102, tls, 5000, "5" * 32, True) for tls in (0, 1, 2)}
HELLO = Hello(NONCE, CLIENT, "web", True)
CHALLENGE = Challenge(NONCE).encode()
HOST = "tunnel.example"
TERMS = Terms(HOST, client=CLIENT, name="web")


@pytest.fixture(scope="module")
def key() -> Key:
    return Key("correct horse battery staple", "web")


@pytest.fixture(scope="module")
def other_key() -> Key:
    return Key("incorrect horse battery staple", "web")


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """An authority that clients trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.crt))
    _client_context.cache_clear()
    yield authority
    _client_context.cache_clear()


@pytest.fixture
def ends(stack: ExitStack) -> Ends:
    return connect_ends(stack)


def context_for(authority: Authority, *names: str) -> SSL.Context:
    """A server's in TLS mode 2."""
    leaf = authority.issue(*names)
    identity = load_pair(str(leaf.crt), str(leaf.key))
    return server_context(identity.chain, identity.key)


def admit(_candidate: Candidate) -> AbstractContextManager[None]:
    """An admission of any client."""
    return nullcontext()


@dataclass
class Serving:
    """The program's server: what it offers, and to whom."""

    offer: Offer
    keys: Sequence[Key] = ()
    context: SSL.Context | None = None
    admission: Any = staticmethod(admit)

    def serve(self, ends: Ends) -> tuple[ServerControl, Agreement]:
        """A client's connection from its first byte on."""
        stream: TCPStream | TLSStream = TCPStream(ends.server)
        if self.offer.tls:
            first = ends.server.recv(1, socket.MSG_PEEK)
            if first == b"/":
                assert parse_first(read_only_line(stream, MAX_OPENING))
                stream.write(b"//tls\n")
            stream = accept_tls(cast(Any, ends.server), self.context or self_signed_context())
            assert stream.speaks_v2
        line = read_only_line(stream, MAX_OPENING)
        hello = parse_first(line)
        assert isinstance(hello, Hello)
        control = ends.server_control(stream=stream)
        return control, accept_client(control, hello, line, self.keys, self.offer, self.admission)


def accept(stack: ExitStack, ends: Ends, keys: Sequence[Key] = (), offer: Offer = OFFERS[0]) -> Greenlet[..., object]:
    """The server's side after `HELLO`, running; `get` returns the agreement or raises."""
    return run(stack, accept_client, ends.server_control(), HELLO, HELLO.encode()[:-1], keys, offer, admit)


def connect(stack: ExitStack, ends: Ends, terms: Terms = TERMS) -> Greenlet[..., object]:
    """The client's side, running."""
    return run(stack, connect_to_server, ends.client_control(), terms)


def read_challenge(sock: socket.socket) -> bytes:
    """The server's challenge, without its newline."""
    line = read_line(sock)[:-1]
    assert isinstance(parse_opening(line), Challenge)
    return line


# Both sides


@pytest.mark.parametrize(("demand", "tls"), [(0, 0), (0, 1), (1, 1)], ids=["clear", "asked for", "demanded"])
@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_both_sides_come_to_the_same_agreement(
    stack: ExitStack, ends: Ends, key: Key, keyed: bool, tls: int, demand: int
) -> None:
    """In the clear and under TLS, which the client begins or is asked for."""
    serving = run(stack, Serving(OFFERS[tls], [key] if keyed else []).serve, ends)
    control = ends.client_control()
    client = connect_to_server(control, replace(TERMS, tls=demand, key=key if keyed else None))
    accepted, server = cast(tuple[ServerControl, Agreement], serving.get())
    assert server.offer == client.offer
    assert (server.client, client.offer.tls, server.version, client.version) == (CLIENT, tls, 2, 2)
    assert (control.agreement, accepted.agreement) == (client, server)
    assert control.stream.plain == accepted.stream.plain == (not tls)
    assert control.channel == accepted.channel
    assert bool(server.offer.mac) == keyed
    assert server.key == client.key == (key if keyed else None)
    if keyed:
        assert server.session
        assert client.session
        proofs = [
            (session.id_proof("deadbeef", b"x"), session.data_proof("deadbeef", b"x"))
            for session in (server.session, client.session)
        ]
        assert proofs[0] == proofs[1]
    else:
        assert server.session is client.session is None


def test_during_a_rotation_either_key_is_proven(stack: ExitStack, key: Key, other_key: Key) -> None:
    for mine in (key, other_key):
        ends = connect_ends(stack)
        serving = run(stack, Serving(OFFERS[0], [key, other_key]).serve, ends)
        client = connect_to_server(ends.client_control(), replace(TERMS, key=mine))
        _, server = cast(tuple[ServerControl, Agreement], serving.get())
        assert server.key == client.key == mine


def test_keys_that_differ_are_refused_by_the_server(stack: ExitStack, ends: Ends, key: Key, other_key: Key) -> None:
    connect(stack, ends, replace(TERMS, key=other_key))
    with pytest.raises(RefusedError, match="is not the server's") as refused:
        Serving(OFFERS[0], [key]).serve(ends)
    assert refused.value.reason == "key-mismatch"


def test_a_key_is_refused_under_another_name(stack: ExitStack, ends: Ends, key: Key) -> None:
    """The same secret under two names is two keys."""
    connect(stack, ends, replace(TERMS, name="db", key=Key("correct horse battery staple", "db")))
    with pytest.raises(RefusedError) as refused:
        Serving(OFFERS[0], [key]).serve(ends)
    assert refused.value.reason == "key-mismatch"


# A man in the middle


def relay_tls(stack: ExitStack, near: Ends, far: Ends) -> None:
    """Ends TLS on both sides and passes lines on: the ends are on two channels."""

    def pass_on() -> None:
        inner = accept_tls(cast(Any, near.server), self_signed_context())
        outer = connect_tls(cast(Any, far.client), Expected(HOST))
        one, other = near.server_control(stream=inner), far.client_control(stream=outer)
        for source, sink in ((one, other), (other, one), (one, other), (other, one)):
            sink.stream.write(source.read_line() + b"\n")

    run(stack, pass_on)


def test_a_man_in_the_middle_of_tls_is_found_by_the_servers_end(stack: ExitStack, ends: Ends, key: Key) -> None:
    far = connect_ends(stack)
    relay_tls(stack, ends, far)
    connect(stack, ends, replace(TERMS, tls=1, key=key))
    with pytest.raises(RefusedError, match="something was changed") as refused:
        Serving(OFFERS[1], [key]).serve(far)
    assert refused.value.reason == "key-mismatch"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"&want=from", b""),
        (b"name=web", b"name=db"),
        (b"client=0011", b"client=ffff"),
        (b"v=2&", b"v=2&new=1&"),
        (b"web", b"web&name=x"),
    ],
    ids=["want", "name", "client", "unknown", "twice"],
)
def test_the_clients_proof_covers_its_whole_hello(
    stack: ExitStack, ends: Ends, key: Key, old: bytes, new: bytes
) -> None:
    line = HELLO.encode()[:-1]
    assert old in line
    accepting = run(stack, accept_client, ends.server_control(), HELLO, line.replace(old, new), [key], OFFERS[0], admit)
    transcript = Transcript(line, read_challenge(ends.client), b"")
    ends.client.sendall(Auth(key.client_proof(transcript)).encode())
    with pytest.raises(RefusedError) as refused:
        accepting.get()
    assert refused.value.reason == "key-mismatch"


@pytest.mark.parametrize(
    ("challenge", "change", "agrees"),
    [
        (CHALLENGE, lambda line: line, True),
        (CHALLENGE, lambda line: line.replace(b"//80", b"//81"), False),
        (CHALLENGE, lambda line: line.replace(b"hb=5000", b"hb=9000"), False),
        (CHALLENGE, lambda line: line.replace(b"&mux=1", b""), False),
        (CHALLENGE, lambda line: line.replace(b"&mac", b"&new=1&mac"), False),
        (CHALLENGE, lambda line: line.replace(b"&mac", b"&hb=5000&mac"), False),
        (CHALLENGE, lambda line: line.replace(b"//80", b"//080"), False),
        (b"//challenge?nonce=" + b"f" * 32 + b"\n", lambda line: line, False),
        (CHALLENGE[:-1] + b"&new=1\n", lambda line: line, False),
    ],
    ids=["unchanged", "port", "hb", "mux", "unknown", "twice", "zero", "nonce", "unknown in the challenge"],
)
def test_the_servers_proof_covers_the_challenge_and_the_whole_offer(
    stack: ExitStack, ends: Ends, key: Key, challenge: bytes, change: Any, agrees: bool
) -> None:
    """A man in the middle who changes the port would have the data connections."""
    connecting = connect(stack, ends, replace(TERMS, key=key))
    transcript = Transcript(read_line(ends.server)[:-1], CHALLENGE[:-1], b"")
    ends.server.sendall(challenge)
    assert read_line(ends.server).startswith(b"//auth?mac=")
    offer = Offer(80, 0, 5000, mux=True)
    offer = replace(offer, mac=key.server_proof(transcript, offer.encode()[:-1]))
    ends.server.sendall(change(offer.encode()))
    if agrees:
        assert cast(Agreement, connecting.get()).offer == offer
    else:
        with pytest.raises(RefusedError, match="does not match") as refused:
            connecting.get()
        assert refused.value.reason == "key-mismatch"


# The server's side


def test_a_client_that_says_hello_is_offered_wire_v2(stack: ExitStack, ends: Ends) -> None:
    offer = Offer(10102, 0, 5000)
    accepting = accept(stack, ends, offer=offer)
    assert read_line(ends.client) == b"//10102?v=2&hb=5000#0\n"
    assert accepting.get() == Agreement(offer, client=CLIENT, wants_addresses=True)


@pytest.mark.parametrize("off", ["tcp", "udp"])
def test_a_client_without_one_protocol_says_so(stack: ExitStack, ends: Ends, off: str) -> None:
    control = ends.client_control()
    run(stack, connect_to_server, control, Terms(HOST, client=CLIENT, off=off))
    line = read_line(ends.server)
    assert line.endswith(f"&name=&off={off}\n".encode())
    hello = parse_first(line[:-1])
    assert isinstance(hello, Hello)
    assert hello.off == off


def test_a_client_that_proves_the_key_is_offered_a_proof_in_return(stack: ExitStack, ends: Ends, key: Key) -> None:
    accepting = accept(stack, ends, [key])
    transcript = Transcript(HELLO.encode()[:-1], read_challenge(ends.client), b"")
    ends.client.sendall(Auth(key.client_proof(transcript)).encode())
    line = read_line(ends.client)[:-1]
    offer = parse_opening(line)
    assert isinstance(offer, Offer)
    assert offer.mac == key.server_proof(transcript, line.replace(b"&mac=" + offer.mac.encode(), b""))
    agreement = cast(Agreement, accepting.get())
    assert (agreement.offer, agreement.key) == (offer, key)


def test_an_unknown_parameter_of_the_answer_is_ignored(stack: ExitStack, ends: Ends, key: Key) -> None:
    accepting = accept(stack, ends, [key])
    transcript = Transcript(HELLO.encode()[:-1], read_challenge(ends.client), b"")
    ends.client.sendall(b"//auth?mac=" + key.client_proof(transcript).encode() + b"&new=1\n")
    assert cast(Agreement, accepting.get()).key == key


@pytest.mark.parametrize(
    ("answer", "token", "words"),
    [
        (Auth("0" * 64).encode(), "key-mismatch", "is not the server's"),
        (b"//auth?mac=00\n", "key-mismatch", "invalid answer to the challenge"),
        (HELLO.encode(), "key-mismatch", "invalid answer to the challenge"),
        (b"x" * (MAX_OPENING + 1), "key-mismatch", "longer than 512 bytes"),
        (Auth("0" * 64).encode()[:-1] + b"\r\n", "key-mismatch", "a byte that a line cannot have"),
        (b"", "key-required", "disconnected after the challenge"),
        (b"//auth", "key-required", "disconnected after the challenge"),
    ],
    ids=["wrong", "malformed", "hello", "over-long", "carriage return", "end", "cut"],
)
def test_a_client_that_does_not_prove_the_key_is_refused(
    stack: ExitStack, ends: Ends, key: Key, answer: bytes, token: str, words: str
) -> None:
    """And is sent nothing but the challenge."""
    accepting = accept(stack, ends, [key])
    read_challenge(ends.client)
    ends.client.sendall(answer)
    ends.client.shutdown(socket.SHUT_WR)
    with pytest.raises(RefusedError, match=words) as refused:
        accepting.get()
    assert refused.value.reason == token
    ends.server.shutdown(socket.SHUT_WR)
    assert ends.client.recv(1) == b""


def test_each_challenge_is_another_one(stack: ExitStack, key: Key) -> None:
    """An answer to an earlier one, with the same hello, is of no use."""
    first, second = connect_ends(stack), connect_ends(stack)
    accept(stack, first, [key])
    replayed = Auth(key.client_proof(Transcript(HELLO.encode()[:-1], read_challenge(first.client), b""))).encode()
    accepting = accept(stack, second, [key])
    read_challenge(second.client)
    second.client.sendall(replayed)
    with pytest.raises(RefusedError):
        accepting.get()


@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_admission_is_asked_before_the_offer_and_ends_after_it(
    stack: ExitStack, ends: Ends, key: Key, keyed: bool
) -> None:
    """Who the client is, and whether it has proven the key, decides how it is admitted."""
    seen = []

    @contextmanager
    def admission(candidate: Candidate) -> Iterator[None]:
        seen.append(("asked", candidate.client, bool(candidate.key), candidate.control.agreement))
        yield
        seen.append(("over", candidate.client, bool(candidate.key), candidate.control.agreement))

    serving = run(stack, Serving(OFFERS[0], [key] if keyed else [], admission=admission).serve, ends)
    connect_to_server(ends.client_control(), replace(TERMS, key=key if keyed else None))
    _, agreement = cast(tuple[ServerControl, Agreement], serving.get())
    assert seen == [("asked", CLIENT, keyed, None), ("over", CLIENT, keyed, agreement)]


def test_a_client_that_is_not_admitted_gets_no_offer(stack: ExitStack, ends: Ends) -> None:
    def refuse(_candidate: Candidate) -> AbstractContextManager[None]:
        raise RefusedError("busy", "another client is connected")

    connect(stack, ends)
    with pytest.raises(RefusedError, match="another client"):
        Serving(OFFERS[0], admission=refuse).serve(ends)
    ends.server.shutdown(socket.SHUT_WR)
    assert ends.client.recv(1) == b""


# The client's side: its hello


def test_a_client_says_hello_first_with_its_name_and_another_nonce_each_time(stack: ExitStack) -> None:
    hellos = []
    for _ in range(2):
        ends = connect_ends(stack)
        connect(stack, ends)
        hellos.append(parse_first(read_line(ends.server)[:-1]))
    assert all(isinstance(hello, Hello) and (hello.client, hello.name) == (CLIENT, "web") for hello in hellos)
    assert hellos[0] != hellos[1]


def test_inside_tls_the_negotiation_begins_again_with_another_nonce(stack: ExitStack, ends: Ends) -> None:
    connect(stack, ends)
    outside = parse_first(read_line(ends.server)[:-1])
    ends.server.sendall(b"//tls\n")
    stream = accept_tls(cast(Any, ends.server), self_signed_context())
    inside = parse_first(read_only_line(stream, MAX_OPENING))
    assert isinstance(outside, Hello)
    assert isinstance(inside, Hello)
    assert outside.nonce != inside.nonce
    assert replace(outside, nonce=inside.nonce) == inside


@pytest.mark.parametrize(("wire", "tls", "first"), [("auto", 0, b"/"), ("auto", 1, b"\x16"), ("2", 2, b"\x16")])
def test_a_client_that_demands_tls_begins_with_it(
    stack: ExitStack, ends: Ends, wire: str, tls: int, first: bytes
) -> None:
    connect(stack, ends, replace(TERMS, wire=wire, tls=tls))
    assert ends.server.recv(1) == first


def test_a_client_of_wire_v1_says_nothing(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends, replace(TERMS, wire="1"))
    ends.server.sendall(b"//80#0\n\n//deadbeef#1\n")
    assert connecting.get() == Agreement(Offer(80, 0))
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""


@pytest.mark.parametrize(
    ("url", "demand", "wire"), [("client://h:1/h:2?tls=2&wire=1&name=web", 2, "1"), ("client://:1/h:2", 0, "auto")]
)
def test_the_terms_are_those_of_the_url(key: Key, other_key: Key, url: str, demand: int, wire: str) -> None:
    """Of several keys the first is proven; an empty host is this machine."""
    parsed = with_defaults(parse_url(url), False, Settings())
    assert isinstance(parsed, ClientURL)
    terms = Terms.of(parsed, CLIENT, [key, other_key])
    assert terms == Terms(parsed.tunnel.host or "localhost", demand, wire, parsed.tunnel_name, CLIENT, key)
    assert Terms.of(parsed, CLIENT, []).key is None


@each_row(
    ("written", "host"),
    [("", "localhost"), ("Tunnel.Example.", "tunnel.example"), ("[fe80::1%25eth0]", "fe80::1"), ("127.1", "127.0.0.1")],
)
def test_the_name_that_a_certificate_must_have_is_the_host_in_the_form_of_certificates(written: str, host: str) -> None:
    parsed = parse_url(f"client://{written}:1/:2")
    assert isinstance(parsed, ClientURL)
    assert Terms.of(parsed, CLIENT, []).host == host


# Rejections


@pytest.mark.parametrize("token", [*REASONS, "later-than-us"])
@pytest.mark.parametrize("demand", [0, 1], ids=["to a hello", "to a ClientHello"])
def test_a_rejection_is_told_with_its_token(stack: ExitStack, ends: Ends, token: str, demand: int) -> None:
    connecting = connect(stack, ends, replace(TERMS, tls=demand))
    assert ends.server.recv(1, socket.MSG_PEEK) == (b"\x16" if demand else b"/")
    ends.server.sendall(Refusal(token).encode())
    with pytest.raises(RefusedError) as refused:
        connecting.get()
    assert refused.value.reason == token
    assert str(refused.value) == REASONS.get(token, "rejected by the server: later-than-us")


def test_a_client_of_wire_v1_is_told_why_it_is_rejected(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends, replace(TERMS, wire="1"))
    ends.server.sendall(Refusal("key-required").encode())
    with pytest.raises(RefusedError) as refused:
        connecting.get()
    assert refused.value.reason == "key-required"


def test_a_client_without_a_key_refuses_a_challenge(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends)
    ends.server.sendall(CHALLENGE)
    with pytest.raises(RefusedError, match="this client has none") as refused:
        connecting.get()
    assert refused.value.reason == "key-required"
    assert read_line(ends.server).startswith(b"//hello")
    ends.client.close()
    assert read_line(ends.server) == b"", "it has nothing to prove"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([b"//80#0\n"], "wire v1"),
        ([OFFERS[0].encode()], "has no key"),
        ([replace(OFFERS[0], mac="0" * 64).encode()], "has no key"),
        ([CHALLENGE, OFFERS[0].encode()], "has no key"),
        ([CHALLENGE, b"//80#0\n"], "wire v1"),
        ([CHALLENGE, replace(OFFERS[0], mac="0" * 64).encode()], "does not match"),
    ],
    ids=["v1", "no challenge", "a proof without a challenge", "no proof", "v1 after the challenge", "wrong proof"],
)
def test_a_client_with_a_key_refuses_a_server_that_does_not_prove_it(
    stack: ExitStack, ends: Ends, key: Key, lines: list[bytes], words: str
) -> None:
    control = ends.client_control()
    connecting = run(stack, connect_to_server, control, replace(TERMS, key=key))
    for line in lines:
        ends.server.sendall(line)
    with pytest.raises(RefusedError, match=words) as refused:
        connecting.get()
    assert refused.value.reason == "key-mismatch"
    assert control.agreement is None


@pytest.mark.parametrize(
    "lines",
    [
        [CHALLENGE, CHALLENGE],
        [CHALLENGE, b"//tls\n"],
        [b"\n"],
        [b"//deadbeef#1\n"],
        [b"//beat?idle=0\n"],
        [b"//80?v=2&hb=9#0\n"],
        [b"x" * (MAX_OPENING + 1)],
        [CHALLENGE[:-1] + b"\r\n"],
        [CHALLENGE, b"//80?v=2&hb=5000&mac=" + b"0" * 64 + b"&mux=1#0\n"],
    ],
    ids=["two challenges", "tls after a challenge", "empty", "launch", "beat", "hb", "over-long", "CR", "mac not last"],
)
def test_lines_that_are_no_handshake_are_a_protocol_error(
    stack: ExitStack, ends: Ends, key: Key, lines: list[bytes]
) -> None:
    connecting = connect(stack, ends, replace(TERMS, key=key))
    for line in lines:
        ends.server.sendall(line)
    with pytest.raises(ProtocolError):
        connecting.get()


def test_a_server_that_closes_has_closed(stack: ExitStack, ends: Ends) -> None:
    connecting = connect(stack, ends)
    read_line(ends.server)
    ends.server.close()
    with pytest.raises(ClosedError):
        connecting.get()


# Wire v1


def v1_refusal(keyed: bool, demand: int, wire: str, offered: int) -> str:
    """The token with which a client refuses a v1 server, "" where it goes on with it."""
    if keyed:
        return "key-mismatch"
    if wire == "2":
        return "version"
    if offered < demand:
        return "no-tls"
    return "version" if demand == 2 and wire == "auto" else ""


@pytest.mark.parametrize("keyed", [False, True], ids=["no key", "key"])
@pytest.mark.parametrize("demand", [0, 1, 2])
@pytest.mark.parametrize("wire", ["auto", "1", "2"])
def test_a_v1_server_is_accepted_where_the_client_demands_no_more(
    stack: ExitStack, key: Key, keyed: bool, demand: int, wire: str
) -> None:
    """It has answered a hello or a ClientHello, which it does not read; its first heartbeat follows at once."""
    for offered in (0, 1, 2):
        ends = connect_ends(stack)
        control = ends.client_control()
        connecting = run(stack, connect_to_server, control, Terms(HOST, demand, wire, key=key if keyed else None))
        if wire != "1":
            assert ends.server.recv(1) == (b"\x16" if demand else b"/")
        ends.server.sendall(b"//10102#%d\n\n" % offered)
        if refusal := v1_refusal(keyed, demand, wire, offered):
            with pytest.raises(RefusedError) as refused:
                connecting.get()
            assert refused.value.reason == refusal
            assert control.agreement is None
        else:
            assert connecting.get() == Agreement(Offer(10102, offered))
            assert control.stream.plain
            assert control.read_line() == b""


@pytest.mark.parametrize("wire", ["auto", "1"])
def test_an_offer_of_v2_that_was_not_asked_for_is_refused(stack: ExitStack, ends: Ends, wire: str) -> None:
    """As an answer to a ClientHello, or to silence."""
    connecting = connect(stack, ends, replace(TERMS, tls=1, wire=wire))
    ends.server.sendall(OFFERS[1].encode())
    with pytest.raises(RefusedError, match="before it was asked") as refused:
        connecting.get()
    assert refused.value.reason == "version"


@pytest.mark.parametrize(
    ("wire", "tls", "line"),
    [("auto", 1, b"//tls\n"), ("auto", 1, CHALLENGE), ("1", 0, b"//tls\n"), ("1", 0, CHALLENGE), ("auto", 1, b"/\n")],
)
def test_a_line_that_answers_no_hello_is_a_protocol_error(
    stack: ExitStack, ends: Ends, key: Key, wire: str, tls: int, line: bytes
) -> None:
    for mine in (None, key):
        ends = connect_ends(stack)
        connecting = connect(stack, ends, replace(TERMS, wire=wire, tls=tls, key=mine))
        ends.server.sendall(line)
        with pytest.raises(ProtocolError):
            connecting.get()


# TLS


@pytest.mark.parametrize(("demand", "offered"), [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_an_offer_says_tls_inside_tls_and_no_tls_outside(
    stack: ExitStack, ends: Ends, demand: int, offered: int
) -> None:
    """Outside: as if a man in the middle had taken TLS away; inside: as if it were the server's."""
    control = ends.client_control()
    connecting = run(stack, connect_to_server, control, TERMS)
    ends.server.sendall(OFFERS[offered].encode())
    with pytest.raises(RefusedError, match=f"offers tls={offered} outside TLS") as refused:
        connecting.get()
    assert refused.value.reason == "no-tls"

    ends = connect_ends(stack)
    connecting = connect(stack, ends, replace(TERMS, tls=demand))
    serve_under_tls(ends, demand, OFFERS[0].encode())
    with pytest.raises(RefusedError, match="offers tls=0 inside TLS") as refused:
        connecting.get()
    assert refused.value.reason == "no-tls"


def serve_under_tls(ends: Ends, demand: int, answer: bytes, context: SSL.Context | None = None) -> TLSStream:
    """A scripted server: TLS, begun by a client that demands it or asked for, and then this line."""
    if not demand:
        assert read_line(ends.server).startswith(b"//hello")
        ends.server.sendall(b"//tls\n")
    stream = accept_tls(cast(Any, ends.server), context or self_signed_context())
    assert read_only_line(stream, MAX_OPENING).startswith(b"//hello")
    stream.write(answer)
    return stream


@pytest.mark.parametrize("demand", [0, 1])
@pytest.mark.parametrize("line", [b"//80#0\n", b"//80#1\n", b"//tls\n"], ids=["v1 without TLS", "v1", "tls"])
def test_neither_v1_nor_tls_is_taken_inside_tls(stack: ExitStack, ends: Ends, demand: int, line: bytes) -> None:
    """And the client writes nothing more, least of all a ClientHello in the clear."""
    connecting = connect(stack, ends, replace(TERMS, tls=demand))
    serve_under_tls(ends, demand, line)
    with pytest.raises(ProtocolError, match="inside TLS"):
        connecting.get()
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""


@pytest.mark.parametrize("behind", [b"/", b"\n", b"//80#0\n", b"\x16", b"\x16\x03\x03\x00\x01\x00"])
def test_not_one_byte_may_follow_the_announcement_of_tls(stack: ExitStack, ends: Ends, behind: bytes) -> None:
    connecting = connect(stack, ends)
    read_line(ends.server)
    ends.server.sendall(b"//tls\n" + behind)
    with pytest.raises(ProtocolError, match="in the clear where TLS must begin"):
        connecting.get()
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""


@pytest.mark.parametrize("late", [b"//80#0\n", b"H", b"\n", b"\x17\x03\x03\x00\x01\x00"])
def test_an_announcement_of_tls_is_followed_by_tls(stack: ExitStack, ends: Ends, late: bytes) -> None:
    connecting = connect(stack, ends)
    read_line(ends.server)
    ends.server.sendall(b"//tls\n")
    assert ends.server.recv(1) == b"\x16"
    ends.server.sendall(late)
    with pytest.raises(ProtocolError if late[:1] != b"\x17" else TLSError):
        connecting.get()


CERTIFICATES = {"right": ((HOST,), ""), "another name": (("other.example",), "name"), "self-signed": ((), "chain")}


@pytest.mark.parametrize("certificate", CERTIFICATES)
@pytest.mark.parametrize("demand", [0, 1, 2])
def test_a_certificate_is_judged_where_it_is_demanded_or_mode_2_is_offered(
    stack: ExitStack, trusted: Authority, key: Key, certificate: str, demand: int
) -> None:
    """Whatever is proven by a key: an offer of mode 1 says that the certificate is anyone's."""
    names, check = CERTIFICATES[certificate]
    context = context_for(trusted, *names) if names else self_signed_context()
    for offered in (1, 2):
        for mine in (None, key):
            ends = connect_ends(stack)
            serving = Serving(OFFERS[offered], [mine] if mine else [], context)
            run(stack, attempt, serving, ends)
            connecting = connect(stack, ends, replace(TERMS, tls=demand, key=mine))
            if check and (demand == 2 or offered == 2):
                with pytest.raises(VerificationError) as rejected:
                    connecting.get()
                assert rejected.value.check == check
            elif offered < demand:
                with pytest.raises(RefusedError, match="offers tls=1 and this client requires tls=2") as refused:
                    connecting.get()
                assert refused.value.reason == "no-tls"
            else:
                assert cast(Agreement, connecting.get()).offer.tls == offered


def attempt(serving: Serving, ends: Ends) -> object:
    """A server whose client may leave."""
    try:
        return serving.serve(ends)
    except OSError as error:
        return error


def test_a_certificate_that_is_rejected_ends_the_handshake_where_mode_2_is_demanded(
    stack: ExitStack, ends: Ends, trusted: Authority
) -> None:
    """The server gets no hello; where the mode is adopted, it does, and the offer decides."""
    serving = run(stack, attempt, Serving(OFFERS[2], context=context_for(trusted, "other.example")), ends)
    with pytest.raises(VerificationError):
        connect_to_server(ends.client_control(), replace(TERMS, tls=2))
    assert isinstance(serving.get(), TLSError)
