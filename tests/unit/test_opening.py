"""What a server makes of the first bytes of a connection: every kind, in pieces, with TLS and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest
from gevent import Greenlet, socket

from nodepass.errors import ClosedError, ProtocolError, RefusedError, TLSError
from nodepass.log import Log
from nodepass.net.sockets import as_plain
from nodepass.server.opening import Opening
from nodepass.tls.certificates import ServerCertificate
from nodepass.wire.negotiation import DataHello, Hello
from tests.unit.controls import is_closed, read_line, run
from tests.unit.secure_peers import OLD_V1, OLD_V2, OTHER, V1, SecurePeer
from tests.unit.servers import PATIENT, SOON, a_server_room
from tests.unit.streams import reset, tcp_pair

HELLO = Hello("0" * 32, "1" * 16, "web")
DATA = DataHello("2" * 32)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


@pytest.fixture(scope="module")
def certificate() -> ServerCertificate:
    return ServerCertificate("", "", Log("test"))


def open_one(stack: ExitStack, certificate: ServerCertificate | None = None) -> tuple[Opening, socket.socket]:
    """A connection that has been accepted, and its peer."""
    stream, peer = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    sock = as_plain(stream.sock)
    sock.setblocking(False)
    opening = Opening(sock, certificate)

    def close() -> None:
        opening.stream.close()  # the one that it has then

    stack.callback(close)
    return opening, peer


def read(stack: ExitStack, opening: Opening, has_line: bool = True) -> Greenlet[..., object]:
    """Read beside the test, from the first byte on."""

    def work() -> None:
        opening.wait(PATIENT)
        opening.read(has_line)

    return run(stack, work)


# In the clear


@pytest.mark.parametrize("said", [HELLO, DATA], ids=["a client", "a data connection"])
@pytest.mark.parametrize("size", [1, 7, 1000], ids=["in bytes", "in pieces", "at once"])
def test_a_line_in_the_clear_is_read_however_it_arrives(stack: ExitStack, said: Hello | DataHello, size: int) -> None:
    opening, peer = open_one(stack)
    reading, text = read(stack, opening), said.encode()
    for start in range(0, len(text), size):
        peer.sendall(text[start : start + size])
        gevent.sleep(0)
    reading.get()
    assert opening.said == said
    assert opening.line == text[:-1]
    assert (opening.version, opening.secured, opening.is_silent) == (2, False, False)


def test_silence_says_nothing_and_can_be_read_again(stack: ExitStack) -> None:
    opening, peer = open_one(stack)
    opening.wait(SOON)
    opening.read()
    assert (opening.said, opening.version, opening.is_silent) == (None, 1, True)
    peer.sendall(HELLO.encode())
    read(stack, opening).get()
    assert opening.said == HELLO


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
        b"\x17\x03\x03",
        HELLO.encode() + b"x",
        HELLO.encode()[:-1] + b"\r\n",
        b" " + HELLO.encode(),
        b"//hello?v=2\n",
        b"//data\n",
        b"//data?sid=" + b"2" * 31 + b"\n",
        b"//beat?ok=1\n",
        b"/" * 600,
    ],
    ids=repr,
)
def test_anything_else_is_no_peer_of_this_program(stack: ExitStack, words: bytes) -> None:
    opening, peer = open_one(stack)
    peer.sendall(words)
    with pytest.raises(ProtocolError):
        read(stack, opening).get()


@pytest.mark.parametrize("how", ["end", "reset", "half a line"])
def test_a_peer_that_leaves_says_nothing(stack: ExitStack, how: str) -> None:
    opening, peer = open_one(stack)
    if how == "half a line":
        peer.sendall(b"//hel")
    if how == "reset":
        reset(peer)
    else:
        peer.close()
    with pytest.raises(ClosedError):
        read(stack, opening).get()


def test_a_server_without_tls_says_so_to_a_client_that_begins_with_it(stack: ExitStack) -> None:
    opening, peer = open_one(stack)
    peer.sendall(b"\x16\x03\x01")
    with pytest.raises(RefusedError) as refused:
        read(stack, opening).get()
    assert refused.value.reason == "no-tls"
    assert opening.may_be_told


# With TLS


@pytest.mark.parametrize("said", [HELLO, DATA], ids=["a client", "a data connection"])
def test_the_first_line_inside_tls_says_what_a_v2_connection_is(
    stack: ExitStack, certificate: ServerCertificate, said: Hello | DataHello
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    SecurePeer(stack, peer).sendall(said.encode())
    reading.get()
    assert opening.said == said
    assert (opening.version, opening.secured) == (2, True)


def test_where_it_need_not_say_whose_it_is_a_data_connection_inside_tls_says_nothing(
    stack: ExitStack, certificate: ServerCertificate
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening, has_line=False)
    SecurePeer(stack, peer)
    reading.get()
    assert (opening.said, opening.version, opening.secured) == (None, 2, True)


@pytest.mark.parametrize("kind", [V1, OLD_V1], ids=["TLS 1.3", "TLS 1.2"])
def test_tls_without_alpn_is_wire_v1(
    stack: ExitStack, certificate: ServerCertificate, kind: tuple[int, list[bytes]]
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    SecurePeer(stack, peer, kind)
    reading.get()
    assert (opening.said, opening.version, opening.secured) == (None, 1, True)


def test_another_protocol_gets_an_alert(stack: ExitStack, certificate: ServerCertificate) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    with pytest.raises(TLSError, match="no application protocol"):
        SecurePeer(stack, peer, OTHER)
    with pytest.raises(TLSError):
        reading.get()


def test_wire_v2_under_an_older_tls_is_told_that_its_version_is_not_supported(
    stack: ExitStack, certificate: ServerCertificate
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    SecurePeer(stack, peer, OLD_V2)
    with pytest.raises(RefusedError) as refused:
        reading.get()
    assert refused.value.reason == "version"
    assert opening.may_be_told


def test_a_hello_in_the_clear_is_answered_with_tls_and_counts_for_nothing(
    stack: ExitStack, certificate: ServerCertificate
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    peer.sendall(Hello("9" * 32, "9" * 16, "other").encode())
    assert read_line(peer) == b"//tls\n"
    assert not opening.may_be_told
    SecurePeer(stack, peer).sendall(HELLO.encode())
    reading.get()
    assert opening.said == HELLO
    assert (opening.secured, opening.may_be_told) == (True, True)


@pytest.mark.parametrize("rest", [b"x", b"\n", b"\x16"])
def test_nothing_may_follow_a_hello_in_the_clear_before_it_is_answered(
    stack: ExitStack, certificate: ServerCertificate, rest: bytes
) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    peer.sendall(HELLO.encode() + rest)
    with pytest.raises(ProtocolError):
        reading.get()
    opening.stream.close()
    assert is_closed(peer), "without an answer"


def test_nothing_but_tls_may_follow_the_answer(stack: ExitStack, certificate: ServerCertificate) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    peer.sendall(HELLO.encode())
    assert read_line(peer) == b"//tls\n"
    peer.sendall(HELLO.encode())
    with pytest.raises(TLSError):
        reading.get()


def test_wire_v1_does_not_begin_with_a_hello(stack: ExitStack, certificate: ServerCertificate) -> None:
    opening, peer = open_one(stack, certificate)
    reading = read(stack, opening)
    peer.sendall(HELLO.encode())
    assert read_line(peer) == b"//tls\n"
    SecurePeer(stack, peer, V1)
    with pytest.raises(ProtocolError, match="without ALPN"):
        reading.get()


def test_a_data_connection_in_the_clear_is_not_taken_where_there_is_tls(
    stack: ExitStack, certificate: ServerCertificate
) -> None:
    opening, peer = open_one(stack, certificate)
    peer.sendall(DATA.encode())
    with pytest.raises(ProtocolError, match="in the clear"):
        read(stack, opening).get()
