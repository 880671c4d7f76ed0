"""Resumption: what is resumed, what is kept for it, and what it leaves as it is. Either implementation of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from OpenSSL import SSL

from nodepass.errors import VerificationError
from nodepass.net.sockets import Socket
from nodepass.net.stream import recv_exactly
from nodepass.tls import bio
from nodepass.tls.bio import HEADER, PrivateRecords, PublicRecords
from nodepass.tls.certificates import self_signed
from nodepass.tls.contexts import _client_context, client_context, renew_client_contexts, server_context
from nodepass.tls.sessions import MOST, Sessions
from nodepass.tls.stream import Session, TLSStream, accept_tls, connect_tls
from nodepass.tls.verify import Expected, Verify
from tests.support.certificates import Authority
from tests.unit.handshakes import HOST, connected, context_for, handshake, socket_pair

ID = b"deadbeef"
ANY = Expected(HOST)
VERIFIED = Expected(HOST, Verify.ENFORCE)

SUPPORTED_VERSIONS, EARLY_DATA, PRE_SHARED_KEY, MODES, KEY_SHARE = 43, 42, 41, 45, 51
"""Extensions of a hello, and below the two modes of a pre-shared key (RFC 8446, 4.2)."""

PSK_KE, PSK_DHE_KE = 0, 1
ALLOW_NO_DHE_KEX = 1 << 10
"""SSL_OP_ALLOW_NO_DHE_KEX, which pyOpenSSL does not name."""


@pytest.fixture(autouse=True, params=[PrivateRecords, PublicRecords], ids=["private", "public"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bio, "Implementation", request.param)


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[SSL.Context]:
    """A server whose certificate is right for HOST."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.crt))
    renew_client_contexts()
    yield context_for(authority, HOST)
    renew_client_contexts()


@pytest.fixture(scope="module")
def untrusted() -> SSL.Context:
    identity = self_signed()
    return server_context(identity.chain, identity.key)


def server_of(context: SSL.Context) -> Callable[[Socket], TLSStream]:
    def accept(sock: Socket) -> TLSStream:
        stream = accept_tls(sock, context)
        stream.write(ID)
        return stream

    return accept


def client_of(context: SSL.Context) -> Callable[[Socket], TLSStream]:
    def connect(sock: Socket) -> TLSStream:
        connection = SSL.Connection(context, None)
        connection.set_connect_state()
        stream = TLSStream(sock, connection)
        stream.handshake()
        assert recv_exactly(stream, len(ID)) == ID
        return stream

    return connect


@contextmanager
def ready(server: SSL.Context, expected: Expected, session: Session | None = None) -> Iterator[tuple[Any, Any]]:
    """A server's and a client's stream after an id, as on a data connection; what either raises is in its place."""

    def connect(sock: Socket) -> TLSStream:
        stream = connect_tls(sock, expected, session=session)
        assert recv_exactly(stream, len(ID)) == ID
        return stream

    with connected(server_of(server), connect) as ends:
        yield ends


def filled(server: SSL.Context, expected: Expected, store: Sessions) -> Session | None:
    """The session that one full handshake leaves in the store."""
    with ready(server, expected) as (_, made):
        store.offer(made)
        made.half_close()
    return store.take()


@pytest.mark.parametrize("expected", [ANY, VERIFIED], ids=["any", "verified"])
def test_each_connection_resumes_the_one_before_and_has_its_own_exporter(
    trusted: SSL.Context, expected: Expected
) -> None:
    store, exporters = Sessions(expected), set()
    for turn in range(4):
        with ready(trusted, expected, store.take()) as (accepted, made):
            assert made.resumed == (turn > 0)
            assert made.speaks_v2
            assert accepted.speaks_v2
            assert made.verified_for == (HOST if expected is VERIFIED else "")
            assert accepted.exporter() == made.exporter()
            exporters.add(made.exporter())
            store.offer(made)
    assert len(exporters) == 4


def test_a_resumed_handshake_calls_no_verify_callback(untrusted: SSL.Context) -> None:
    """So a session that was not verified would pass for one that was: neither end would notice."""
    with ready(untrusted, ANY) as (_, made):
        session = made.session()
        connection = SSL.Connection(session.context, None)
        connection.set_session(session.handle)
        calls = []

        def verify(*arguments: object) -> bool:
            calls.append(arguments)
            return False

        connection.set_verify(SSL.VERIFY_PEER, verify)
        connection.set_connect_state()

        def connect(sock: Socket) -> None:
            TLSStream(sock, connection).handshake()

        with connected(lambda sock: accept_tls(sock, untrusted), connect) as (_, error):
            assert error is None
            assert calls == []


def test_a_session_that_was_not_verified_is_not_kept_for_those_that_must_be(untrusted: SSL.Context) -> None:
    for verify in (Verify.IGNORE, Verify.KEEP):
        with ready(untrusted, Expected(HOST, verify)) as (_, made):
            assert made.verified_for == ""
            store = Sessions(VERIFIED)
            store.offer(made)
            assert store.take() is None


def test_a_session_that_was_not_verified_is_not_offered_where_it_must_be(untrusted: SSL.Context) -> None:
    session = filled(untrusted, ANY, Sessions(ANY))
    assert session
    with ready(untrusted, ANY, session) as (_, made):
        assert made.resumed
    for verify in (Verify.KEEP, Verify.ENFORCE):
        with ready(untrusted, Expected(HOST, verify), session) as (_, made):
            if verify is Verify.KEEP:
                assert not made.resumed
                assert made.rejection
            else:
                assert isinstance(made, VerificationError)


def test_a_session_that_was_verified_for_one_host_is_not_offered_for_another(trusted: SSL.Context) -> None:
    session = filled(trusted, VERIFIED, Sessions(VERIFIED))
    assert session
    assert session.meets(VERIFIED)
    with ready(trusted, Expected("other.example", Verify.ENFORCE), session) as (_, made):
        assert isinstance(made, VerificationError)
        assert made.check == "name"


def test_a_session_of_a_verdict_that_was_kept_serves_where_it_must_be_right(trusted: SSL.Context) -> None:
    """A client that adopts what the server says judges its control connection afterwards."""
    session = filled(trusted, Expected(HOST, Verify.KEEP), Sessions(VERIFIED))
    with ready(trusted, VERIFIED, session) as (_, made):
        assert made.resumed
        assert made.verified_for == HOST


def test_a_session_serves_where_less_is_expected_than_before(trusted: SSL.Context) -> None:
    session = filled(trusted, Expected(HOST, Verify.KEEP), Sessions(ANY))
    with ready(trusted, ANY, session) as (_, made):
        assert made.resumed


def test_the_store_of_another_control_connection_has_no_session_of_this_one(untrusted: SSL.Context) -> None:
    mine, other = Sessions(ANY), Sessions(ANY)
    with ready(untrusted, ANY) as (_, made):
        mine.offer(made)
        assert other.take() is None
        assert mine.take()


def test_a_session_is_taken_once(untrusted: SSL.Context) -> None:
    store = Sessions(ANY)
    assert filled(untrusted, ANY, store)
    assert store.take() is None


def test_a_store_that_was_told_to_forget_stays_empty(untrusted: SSL.Context) -> None:
    store = Sessions(ANY)
    with ready(untrusted, ANY) as (_, made):
        store.offer(made)
        store.forget()
        assert store.take() is None
        store.offer(made)  # a dial that was late
        assert store.take() is None


def test_a_store_keeps_the_newest_sessions(untrusted: SSL.Context) -> None:
    store = Sessions(ANY)
    with ready(untrusted, ANY) as (_, old), ready(untrusted, ANY) as (_, new):
        for stream in (old, *[new] * MOST):
            store.offer(stream)
        taken = [store.take() for _ in range(MOST)]
        assert store.take() is None
    keys = {key_of(session) for session in taken if session}
    assert keys == {key_of(new.session())}


def key_of(session: Session) -> bytes:
    """What tells the sessions of two handshakes apart."""
    connection = SSL.Connection(session.context, None)
    connection.set_connect_state()
    connection.set_session(session.handle)
    return connection.master_key() or b""


def test_tls_1_2_gives_no_session(untrusted: SSL.Context) -> None:
    old = _client_context.__wrapped__(False, False, 0)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    with connected(server_of(untrusted), client_of(old)) as (_, made):
        assert made.session() is None
        store = Sessions(ANY)
        store.offer(made)
        assert store.take() is None


def test_a_server_that_does_not_know_the_ticket_gets_a_full_handshake(
    trusted: SSL.Context, untrusted: SSL.Context
) -> None:
    """As after a restart of the server, or with a new certificate; it is verified."""
    session = filled(trusted, VERIFIED, Sessions(VERIFIED))
    with ready(untrusted, VERIFIED, session) as (_, made):
        assert isinstance(made, VerificationError)
    session = filled(untrusted, ANY, Sessions(ANY))
    with ready(trusted, VERIFIED, session) as (_, made):
        assert not made.resumed
        assert made.verified_for == HOST


def test_a_session_without_a_ticket_leads_to_a_full_handshake(untrusted: SSL.Context) -> None:
    with handshake(untrusted, ANY) as (_, made):  # the tickets wait for the server's first payload
        session = made.session()
        with ready(untrusted, ANY, session) as (_, later):
            assert not later.resumed


def test_openssl_forgets_the_session_of_a_connection_that_was_cut(untrusted: SSL.Context) -> None:
    store = Sessions(ANY)
    with ready(untrusted, ANY) as (_, made):
        store.offer(made)
        made.abort()
    del made, _
    with ready(untrusted, ANY, store.take()) as (_, made):
        assert not made.resumed


# What is on the wire


def hello_of(sock: Socket) -> tuple[bytes, dict[int, bytes]]:
    """A ClientHello or ServerHello that begins what is in the socket: all of that, and its extensions."""
    gevent.socket.wait_read(sock.fileno())
    wire = sock.recv(65536)
    body = wire[HEADER + 4 :]  # behind the header of the handshake message
    kind, place = wire[HEADER], 34  # behind the version and the random bytes
    place += 1 + body[place]  # the session id
    if kind == 1:  # ClientHello: cipher suites, then compression methods
        place += 2 + int.from_bytes(body[place : place + 2], "big")
        place += 1 + body[place]
    else:
        place += 3
    end = place + 2 + int.from_bytes(body[place : place + 2], "big")
    place += 2
    found = {}
    while place < end:
        name, size = (int.from_bytes(body[at : at + 2], "big") for at in (place, place + 2))
        found[name] = body[place + 4 : place + 4 + size]
        place += 4 + size
    return wire, found


def hellos(
    server: SSL.Context, client: SSL.Context, session: Session | None
) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The extensions of both hellos of a handshake."""
    connection = SSL.Connection(client, None)
    connection.set_connect_state()
    if session:
        connection.set_session(session.handle)
    with socket_pair() as (near, far):
        with pytest.raises(SSL.WantReadError):
            connection.do_handshake()
        near.send(connection.bio_read(65536))
        wire, asked = hello_of(far)
        other = SSL.Connection(server, None)
        other.set_accept_state()
        other.bio_write(wire)
        with pytest.raises(SSL.WantReadError):
            other.do_handshake()
        far.send(other.bio_read(65536))
        return asked, hello_of(near)[1]


def test_a_resumption_exchanges_keys_and_has_no_early_data(untrusted: SSL.Context) -> None:
    session = filled(untrusted, ANY, Sessions(ANY))
    assert session
    asked, answered = hellos(untrusted, session.context, session)
    assert asked[MODES] == bytes([1, PSK_DHE_KE])
    assert {PRE_SHARED_KEY, KEY_SHARE} < set(asked)
    assert {PRE_SHARED_KEY, KEY_SHARE, SUPPORTED_VERSIONS} == set(answered)
    assert EARLY_DATA not in asked


def test_a_server_exchanges_keys_with_a_client_that_would_do_without(untrusted: SSL.Context) -> None:
    lax = _client_context.__wrapped__(False, True, 0)
    lax.set_options(ALLOW_NO_DHE_KEX)
    with connected(server_of(untrusted), client_of(lax)) as (_, made):
        asked, answered = hellos(untrusted, lax, made.session())
    assert set(asked[MODES][1:]) == {PSK_DHE_KE, PSK_KE}
    assert KEY_SHARE in answered
    assert PRE_SHARED_KEY in answered


def test_a_first_handshake_offers_no_session(untrusted: SSL.Context) -> None:
    asked, answered = hellos(untrusted, client_context(Verify.IGNORE), None)
    assert PRE_SHARED_KEY not in asked
    assert PRE_SHARED_KEY not in answered


# Tickets on a connection


def test_tickets_go_with_the_first_payload_of_a_server(untrusted: SSL.Context) -> None:
    with handshake(untrusted, ANY) as (accepted, made):
        with pytest.raises(BlockingIOError):
            made.sock.recv(1)
        accepted.write(ID)
        assert made.peek() is True
        assert made.pending
        assert recv_exactly(made, len(ID)) == ID
        assert not made.pending


def test_tickets_alone_do_not_wake_an_idle_connection_twice(untrusted: SSL.Context) -> None:
    """They make it readable, as those of another server may; a look at it takes them, and they are no payload."""
    with handshake(untrusted, ANY) as (accepted, made):
        accepted._flush()
        calls = []

        def look() -> None:
            calls.append((made.peek(), made.pending))

        made.watch(look)
        gevent.socket.wait_read(made.sock.fileno())
        with socket_pair() as (near, far):
            near.send(b"always readable")
            for _ in range(10):  # iterations of the event loop
                gevent.socket.wait_read(far.fileno())
        made.unwatch()
        assert calls == [(None, False)]
        accepted.write(ID)
        assert recv_exactly(made, len(ID)) == ID


def test_tickets_and_payload_at_once_leave_the_payload_pending(untrusted: SSL.Context) -> None:
    with handshake(untrusted, ANY) as (accepted, made):
        accepted.write(ID)
        gevent.socket.wait_read(made.sock.fileno())
        buffer = memoryview(bytearray(3))
        assert made.read(buffer) == 3
        assert made.pending
        assert made.peek() is True
        assert made.read(memoryview(bytearray(100))) == len(ID) - 3
        assert not made.pending
