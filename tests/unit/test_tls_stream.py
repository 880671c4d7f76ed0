"""TLS handshakes between the two ends of a socket pair: protocols, modes of verification, and the first byte."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import gevent
import pytest
from OpenSSL import SSL

from nodepass.errors import ClearAnswer, OtherProtocolError, ProtocolError, TLSError, VerificationError
from nodepass.net.sockets import Socket
from nodepass.tls import bio, contexts
from nodepass.tls.bio import PrivateRecords, PublicRecords
from nodepass.tls.certificates import self_signed
from nodepass.tls.contexts import ALPN, _client_context, _context, client_context, renew_client_contexts, server_context
from nodepass.tls.stream import EXPORTER_LABEL, TLSStream, accept_tls, check_certificate, connect_tls
from nodepass.tls.verify import Expected, Verify
from tests.support.certificates import Authority
from tests.unit.handshakes import HOST, connected, context_for, handshake, socket_pair


@pytest.fixture(autouse=True, params=[PrivateRecords, PublicRecords], ids=["private", "public"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bio, "Implementation", request.param)


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Authority]:
    """An authority that contexts made from now on trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.crt))
    renew_client_contexts()
    yield authority
    renew_client_contexts()


@pytest.fixture(scope="module")
def server() -> SSL.Context:
    identity = self_signed()
    return server_context(identity.chain, identity.key)


def shake_as(context: SSL.Context) -> Callable[[Socket], TLSStream]:
    """A client of this context."""

    def connect(sock: Socket) -> TLSStream:
        connection = SSL.Connection(context, None)
        connection.set_connect_state()
        stream = TLSStream(sock, connection)
        stream.handshake()
        return stream

    return connect


def test_both_ends_of_v2_speak_its_protocol_over_tls_1_3(server: SSL.Context) -> None:
    with handshake(server, Expected(HOST)) as ends:
        for end in ends:
            assert end.alpn == ALPN == b"nodepass/2"
            assert end.version == "TLSv1.3"
            assert end.speaks_v2


def test_a_client_of_v1_offers_no_protocol(server: SSL.Context) -> None:
    with handshake(server, Expected(HOST), v2=False) as ends:
        for end in ends:
            assert end.alpn == b""
            assert end.version == "TLSv1.3"
            assert not end.speaks_v2


def test_a_client_of_v1_may_speak_tls_1_2(server: SSL.Context) -> None:
    old = _client_context.__wrapped__(False, False, 0)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    with connected(lambda sock: accept_tls(sock, server), shake_as(old)) as (accepted, made):
        assert accepted.version == made.version == "TLSv1.2"


def test_v2_under_tls_1_2_is_no_v2(server: SSL.Context) -> None:
    old = _context()
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    old.set_alpn_protos([ALPN])
    with connected(lambda sock: accept_tls(sock, server), shake_as(old)) as (accepted, _):
        assert accepted.alpn == ALPN
        assert not accepted.speaks_v2


def test_a_client_of_v2_rejects_a_server_of_tls_1_2() -> None:
    identity = self_signed()
    old = server_context(identity.chain, identity.key)
    old.set_max_proto_version(SSL.TLS1_2_VERSION)
    with handshake(old, Expected(HOST)) as (_, error):
        assert isinstance(error, TLSError)
        assert "protocol version" in str(error)


def test_a_client_of_v2_rejects_a_server_without_the_protocol() -> None:
    identity = self_signed()
    other = _context()
    other.use_certificate(identity.chain[0])
    other.use_privatekey(identity.key)
    with handshake(other, Expected(HOST)) as (_, error):
        assert isinstance(error, TLSError)
        assert "did not select the protocol nodepass/2" in str(error)


def test_the_error_about_foreign_protocols_is_short_however_many_there_are(server: SSL.Context) -> None:
    other = _context()
    other.set_alpn_protos([b"\x01" * 255] * 200)
    with connected(lambda sock: accept_tls(sock, server), shake_as(other)) as (error, _):
        assert isinstance(error, TLSError)
        assert "other protocols" in str(error)
        assert len(str(error)) < 500


def test_a_foreign_protocol_gets_the_alert(server: SSL.Context) -> None:
    """The standard library's client: what a browser would see."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing)

    def talk(sock: Socket) -> None:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        sock.send(outgoing.read())
        gevent.socket.wait_read(sock.fileno())
        incoming.write(sock.recv(1000))
        with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
            client.do_handshake()

    with connected(lambda sock: accept_tls(sock, server), talk) as (error, _):
        assert isinstance(error, TLSError)
        assert "'h2, http/1.1'" in str(error)


def test_the_exporter_is_the_same_at_both_ends_and_another_on_each_connection(server: SSL.Context) -> None:
    seen = set()
    for _ in range(2):
        with handshake(server, Expected(HOST)) as (accepted, made):
            assert accepted.exporter() == made.exporter()
            assert len(made.exporter()) == 32
            assert made.exporter() == made._connection.export_keying_material(EXPORTER_LABEL, 32)
            seen.add(made.exporter())
    assert len(seen) == 2


def test_there_is_no_exporter_before_the_handshake() -> None:
    connection = SSL.Connection(client_context(Verify.IGNORE), None)
    connection.set_connect_state()
    with socket_pair() as (sock, _), pytest.raises(TLSError):
        TLSStream(sock, connection).exporter()


def test_the_group_is_told_where_pyopenssl_can_tell(server: SSL.Context) -> None:
    with handshake(server, Expected(HOST)) as (accepted, made):
        assert accepted.group == made.group
        assert bool(made.group) == hasattr(SSL.Connection, "get_group_name")


CHECKS = {
    "right": ((HOST,), ""),
    "another name": (("other.example",), "name"),
    "self-signed": ((), "chain"),
}


@pytest.fixture(params=CHECKS)
def shown(request: pytest.FixtureRequest, trusted: Authority, server: SSL.Context) -> tuple[SSL.Context, str]:
    """A server, and the check that rejects its certificate."""
    names, check = CHECKS[request.param]
    return context_for(trusted, *names) if names else server, check


def test_a_certificate_that_is_ignored_is_not_judged(shown: tuple[SSL.Context, str]) -> None:
    with handshake(shown[0], Expected(HOST)) as (accepted, made):
        assert made.rejection is None
        assert accepted.speaks_v2


def test_a_verdict_that_is_kept_lets_the_handshake_go_on(shown: tuple[SSL.Context, str]) -> None:
    with handshake(shown[0], Expected(HOST, Verify.KEEP)) as (accepted, made):
        assert (made.rejection.check if made.rejection else "") == shown[1]
        assert accepted.speaks_v2
        assert accepted.exporter() == made.exporter()


def test_a_verdict_that_is_enforced_ends_the_handshake_of_both_ends(shown: tuple[SSL.Context, str]) -> None:
    with handshake(shown[0], Expected(HOST, Verify.ENFORCE)) as (accepted, made):
        if shown[1]:
            assert isinstance(made, VerificationError)
            assert made.check == shown[1]
            assert isinstance(accepted, TLSError)
        else:
            assert made.rejection is None
            assert accepted.speaks_v2


def test_a_context_is_made_once_for_each_demand() -> None:
    assert client_context(Verify.KEEP) is client_context(Verify.ENFORCE)
    different = {client_context(verify, v2) for verify in Verify for v2 in (False, True)}
    assert len(different) == 4


def test_an_authority_that_is_added_is_trusted_at_the_attempt_after_a_rejection(
    trusted: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Authority(tmp_path, "another authority")
    monkeypatch.setenv("SSL_CERT_FILE", str(other.crt))
    context, expected = context_for(trusted, HOST), Expected(HOST, Verify.ENFORCE)
    with handshake(context, expected) as (_, error):
        assert isinstance(error, VerificationError)
    other.crt.write_bytes(other.crt.read_bytes() + trusted.crt.read_bytes())
    with handshake(context, expected) as (_, made):
        assert made.verified_for == HOST


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_authorities_in_a_file_with_a_byte_order_mark_are_trusted(
    trusted: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """OpenSSL itself skips the first one."""
    file = tmp_path / "marked.crt"
    file.write_bytes(trusted.crt.read_text().replace("\n", "\r\n").encode(encoding))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with handshake(context_for(trusted, HOST), Expected(HOST, Verify.ENFORCE)) as (_, made):
        assert made.verified_for == HOST


def test_an_authority_that_is_removed_is_not_trusted_for_ever(
    trusted: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, now = Authority(tmp_path, "another authority"), [0.0]
    monkeypatch.setattr(contexts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    context, expected = context_for(trusted, HOST), Expected(HOST, Verify.ENFORCE)
    with handshake(context, expected) as (_, made):
        assert made.verified_for == HOST
    monkeypatch.setenv("SSL_CERT_FILE", str(other.crt))
    now[0] += contexts.RENEWED_EVERY
    with handshake(context, expected) as (_, error):
        assert isinstance(error, VerificationError)


def test_a_certificate_is_checked_without_a_connection(trusted: Authority) -> None:
    right = context_for(trusted, HOST)
    for host in (HOST, "other.example"):
        expected = Expected(host, Verify.ENFORCE)

        def check(sock: Socket, expected: Expected = expected) -> None:
            check_certificate(sock, expected)

        with connected(lambda sock: accept_tls(sock, right), check) as (accepted, checked):
            assert isinstance(accepted, TLSError)
            assert (checked is None) if host == HOST else isinstance(checked, VerificationError)


def answer_with(answer: bytes) -> Callable[[Socket], bytes]:
    """A server that reads the ClientHello and answers with something else."""

    def accept(sock: Socket) -> bytes:
        gevent.socket.wait_read(sock.fileno())
        hello = sock.recv(65536)
        if answer:
            sock.send(answer)
        sock.close()
        return hello

    return accept


def test_a_line_in_the_clear_is_left_in_the_socket() -> None:
    line = b"//error?reason=no-tls\n"

    def connect(sock: Socket) -> bytes:
        with pytest.raises(ClearAnswer):
            connect_tls(sock, Expected(HOST))
        gevent.socket.wait_read(sock.fileno())  # no watcher is left over
        return sock.recv(1000)

    with connected(answer_with(line), connect) as (hello, read):
        assert hello[0] == 0x16
        assert read == line


@pytest.mark.parametrize("first", [b"\x13", b"\x18", b"\n", b"\0", b"\xff"])
def test_what_is_neither_tls_nor_a_line_is_an_error(first: bytes) -> None:
    with connected(answer_with(first + b"TTP/1.1"), lambda sock: connect_tls(sock, Expected(HOST))) as (_, error):
        assert isinstance(error, ProtocolError)
        assert repr(first) in str(error)


def test_a_service_that_answers_in_its_own_protocol_is_named() -> None:
    answer = answer_with(b"HTTP/1.1 400 Bad Request\r\n")
    with connected(answer, lambda sock: connect_tls(sock, Expected(HOST))) as (_, error):
        assert isinstance(error, OtherProtocolError)
        assert error.protocol == "HTTP"


@pytest.mark.parametrize("first", [0x14, 0x15, 0x16, 0x17])
def test_the_first_byte_of_a_record_is_left_to_openssl(first: int) -> None:
    with connected(answer_with(bytes([first]) + b"no record"), lambda sock: connect_tls(sock, Expected(HOST))) as (
        _,
        error,
    ):
        assert isinstance(error, TLSError)


def test_a_server_that_closes_at_once_has_closed() -> None:
    with connected(answer_with(b""), lambda sock: connect_tls(sock, Expected(HOST))) as (_, error):
        assert isinstance(error, TLSError)
        assert "closed the connection during the TLS handshake" in str(error)


def test_a_line_in_the_clear_is_no_answer_in_v1() -> None:
    with connected(answer_with(b"//10101#0\n"), lambda sock: connect_tls(sock, Expected(HOST), v2=False)) as (_, error):
        assert isinstance(error, TLSError)
