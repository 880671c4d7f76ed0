"""Dials through proxies that behave, and through those that do not."""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event

from nodepass.client import data_dialer
from nodepass.client.data_dialer import Route
from nodepass.config.outbound import Credentials
from nodepass.errors import ProxyError
from nodepass.net import deadlines, sockets
from nodepass.net.deadlines import Deadlines
from nodepass.net.sockets import Endpoint, Socket, as_plain
from nodepass.outbound import bridge
from nodepass.outbound.http_connect import LARGEST_HEAD
from nodepass.outbound.ways import Direct, Way
from nodepass.tls.certificates import load_pair
from nodepass.tls.contexts import renew_client_contexts, server_context
from nodepass.tls.stream import TLSStream, accept_tls
from nodepass.tunnel.control import Agreement
from nodepass.wire.negotiation import Offer
from tests.support.certificates import Authority
from tests.support.sockets import receive_exactly
from tests.unit.proxies import TIMEOUT, Answer, dial, drip, read_request, receive, through
from tests.unit.streams import receive_all

JOE = Credentials("joe", "open sesame")
SPEAKS_FIRST = b"//10101#0\n"
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\nContent-Length: 10\r\n\r\n"
GRANTED = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x27\x75"


def refusal(stack: ExitStack, scheme: str, answer: Answer, credentials: Credentials | None = None) -> ProxyError:
    """Why a dial through such a proxy fails; it must."""
    way = through(stack, scheme, answer, credentials)
    with pytest.raises(ProxyError) as refused:
        dial(way)
    assert str(refused.value).startswith(f"the proxy {way.passage.proxy} ")
    return refused.value


def says(*parts: bytes) -> Answer:
    """A proxy that reads the request, answers so, and leaves the connection open."""

    def answer(sock: Any) -> None:
        read_request(sock)
        for part in parts:
            sock.sendall(part)
        sock.recv(1)

    return answer


def socks(*answers: bytes) -> Answer:
    """The same of SOCKS5: an answer to the greeting, and one to each message after it."""

    def answer(sock: Any) -> None:
        for each in answers:
            sock.recv(512)
            sock.sendall(each)
        sock.recv(1)

    return answer


@pytest.mark.parametrize("segments", [1, 3, 0])
def test_the_first_bytes_of_the_server_are_left_in_the_socket(stack: ExitStack, segments: int) -> None:
    def http(sock: Any) -> None:
        read_request(sock)
        send(sock, ESTABLISHED + SPEAKS_FIRST)

    def socks5(sock: Any) -> None:
        sock.recv(512)
        sock.sendall(b"\x05\x00")
        sock.recv(512)
        send(sock, GRANTED + SPEAKS_FIRST)

    def send(sock: Any, data: bytes) -> None:
        if segments:
            size = -(-len(data) // segments)
            for begin in range(0, len(data), size):
                sock.sendall(data[begin : begin + size])
                gevent.sleep(0)
        else:
            drip(sock, data)

    for scheme, answer in (("http", http), ("socks5h", socks5)):
        with closing(dial(through(stack, scheme, answer))) as sock:
            assert receive(sock, 100) == SPEAKS_FIRST, scheme


def test_a_request_names_the_server_and_the_user(stack: ExitStack) -> None:
    asked: list[bytes] = []

    def answer(sock: Any) -> None:
        asked.append(read_request(sock))
        sock.sendall(ESTABLISHED)

    for server, place in (("server.example.", "server.example"), ("2001:db8::1", "[2001:db8::1]")):
        dial(through(stack, "http", answer, JOE, server)).close()
        pair = base64.b64encode(b"joe:open sesame").decode()
        lines = [
            f"CONNECT {place}:10101 HTTP/1.1",
            f"Host: {place}:10101",
            f"Proxy-Authorization: Basic {pair}",
            "",
            "",
        ]
        assert asked.pop().decode().split("\r\n") == lines


@pytest.mark.parametrize(
    ("server", "address"),
    [
        ("server.example", b"\x03\x0eserver.example"),
        ("192.0.2.7", b"\x01\xc0\x00\x02\x07"),
        ("2001:db8::1", b"\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01"),
    ],
)
def test_socks_is_asked_for_a_name_as_a_name(stack: ExitStack, server: str, address: bytes) -> None:
    asked: list[bytes] = []

    def answer(sock: Any) -> None:
        for each in (b"\x05\x02", b"\x01\x00", GRANTED):
            asked.append(sock.recv(512))
            sock.sendall(each)

    dial(through(stack, "socks5h", answer, JOE, server)).close()
    assert asked == [b"\x05\x02\x00\x02", b"\x01\x03joe\x0bopen sesame", b"\x05\x01\x00" + address + b"\x27\x75"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (b"403 Forbidden", "does not allow connections to server.example:10101 (403 Forbidden); many proxies allow"),
        (b"407 Who are you", "requires a user and a password, see TUNNEL_PROXY_AUTH_FILE (407 Who are you)"),
        (b"502 Bad Gateway", "cannot reach server.example:10101 (502 Bad Gateway)"),
        (b"504 ", "got no answer from server.example:10101 (504)"),
        (b"405 No", "does not accept CONNECT to server.example:10101 (405 No)"),
        (b"302 Found", "refuses a connection to server.example:10101 (302 Found)"),
        (b"418 \x1b[31mred", r"refuses a connection to server.example:10101 (418 \x1b[31mred)"),
    ],
)
def test_a_refusal_of_http_is_said_in_words(stack: ExitStack, status: bytes, words: str) -> None:
    error = refusal(stack, "http", says(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"))
    assert words in str(error)
    assert error.code == status[:3].decode()


def test_a_rejected_password_and_a_login_that_this_program_lacks_are_told_apart(stack: ExitStack) -> None:
    basic = b'HTTP/1.1 407 No\r\nProxy-Authenticate: NTLM\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n'
    assert "rejects the user and password (407 No)" in str(refusal(stack, "http", says(basic), JOE))
    other = b"HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\nproxy-authenticate:NTLM\r\n\r\n"
    assert "accepts no user and password, only Negotiate, NTLM" in str(refusal(stack, "http", says(other), JOE))


@pytest.mark.parametrize(
    ("answers", "words", "code"),
    [
        ((b"\x05\xff",), "requires a user and a password", "auth"),
        ((b"\x05\x01",), "chooses method 1, which was not offered", ""),
        ((b"\x04\x00",), "does not speak SOCKS5", ""),
        ((b"HTTP/1.1 400 Bad Request\r\n\r\n",), "does not speak SOCKS5", ""),
        ((b"\x05\x00", b"\x05\x02\x00\x01" + bytes(6)), "does not allow connections to server.example:10101", "2"),
        ((b"\x05\x00", b"\x05\x05\x00\x01" + bytes(6)), "gets its connection to server.example:10101 refused", "5"),
        ((b"\x05\x00", b"\x05\x63\x00\x01" + bytes(6)), "(SOCKS5 reply 99)", "99"),
        ((b"\x05\x00", b"\x04\x00\x00\x01" + bytes(6)), "answers with version 4, not 5", ""),
        ((b"\x05\x00", b"\x05\x00\x00\x02" + bytes(6)), "an address of unknown kind 2", ""),
    ],
)
def test_a_refusal_of_socks_is_said_in_words(
    stack: ExitStack, answers: tuple[bytes, ...], words: str, code: str
) -> None:
    error = refusal(stack, "socks5h", socks(*answers))
    assert words in str(error)
    assert error.code == code


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"\x01\x01", "rejects the user and password"),
        (b"\x05\x00", "answers the user and password with version 5, not 1"),
    ],
)
def test_a_password_that_socks_rejects_is_not_repeated(stack: ExitStack, answer: bytes, words: str) -> None:
    error = refusal(stack, "socks5h", socks(b"\x05\x02", answer), JOE)
    assert words in str(error)
    assert "sesame" not in str(error)


@pytest.mark.parametrize("line", [b"X-Filler: y\r\n", b"y" * 512])
def test_a_head_without_an_end_is_given_up(stack: ExitStack, line: bytes) -> None:
    def answer(sock: Any) -> None:
        read_request(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            sock.sendall(line)
            gevent.sleep(0)

    assert f"sends more than {LARGEST_HEAD} bytes" in str(refusal(stack, "http", answer))


def test_interim_answers_are_counted_together(stack: ExitStack) -> None:
    def answer(sock: Any) -> None:
        read_request(sock)
        while True:
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            gevent.sleep(0)

    assert f"sends more than {LARGEST_HEAD} bytes" in str(refusal(stack, "http", answer))


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 banana\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"\x15\x03\x01\x00\x02\x02\x50",
        b"\x05\x00",
    ],
)
def test_what_is_no_answer_of_http_is_given_up_at_once(stack: ExitStack, said: bytes) -> None:
    assert "does not answer in HTTP/1.1: " in str(refusal(stack, "http", says(said)))


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_a_proxy_that_closes_early_is_named(stack: ExitStack, scheme: str) -> None:
    assert "clos" in str(refusal(stack, scheme, lambda sock: sock.recv(512)))


@pytest.mark.parametrize(
    ("scheme", "first"),
    [
        ("http", b""),
        ("http", b"HTTP/1.1 200 OK\r\nX: "),
        ("socks5h", b"\x05"),
        ("socks5h", b"\x05\x00\x05\x00\x00\x03\xff" + b"x" * 200),
        ("https", b""),
    ],
)
def test_one_timeout_bounds_the_whole_dial(stack: ExitStack, scheme: str, first: bytes) -> None:
    """Also through a proxy that says something now and then, and one that lies about how much it will say."""

    def answer(sock: Any) -> None:
        sock.sendall(first)
        while True:
            gevent.sleep(0.02)
            sock.sendall(b"x" if first.startswith(b"HTTP") else b"")

    way = through(stack, scheme, answer)
    with pytest.raises(ProxyError, match=r"does not answer within 0\.3s") as late:
        dial(way, 0.3)
    assert late.value.code == "timeout"


def test_a_data_connection_that_is_late_behind_a_proxy_is_closed(stack: ExitStack) -> None:
    """Its deadline is that of the whole attempt, which ends the dial; a TLS handshake would have what is left."""
    closed = Event()

    def answer(sock: Any) -> None:
        while sock.recv(512):
            pass
        closed.set()

    way = through(stack, "http", answer)
    with pytest.raises(TimeoutError, match=r"server\.example:10101 through .*: not ready within 0\.2s"):
        Route(way, "server.example", 0.2, 15.0, Agreement(Offer(10102, 0)), None).make()
    assert closed.wait(TIMEOUT)


def test_a_proxy_that_is_not_there_is_named(stack: ExitStack) -> None:
    way = through(stack, "http", lambda _: None)
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        gone = [Endpoint(socket.AF_INET, unused.getsockname())]
        object.__setattr__(way, "find", lambda _: gone)
        with pytest.raises(ProxyError, match=r"the proxy http://.* cannot be reached: .*Connection refused"):
            dial(way)


def test_through_a_proxy_the_data_port_is_asked_of_the_proxy(stack: ExitStack) -> None:
    way = through(stack, "http", says(ESTABLISHED))
    with closing(dial(way)) as sock:
        assert str(way.settle(sock).with_port(443)) == f"server.example:443 through {way.passage.proxy}"


def give_id(listener: Any) -> None:
    with closing(listener.accept()[0]) as sock:
        sock.sendall(b"0123abcd")


@pytest.mark.parametrize("has_proxy", [False, True])
def test_behind_a_proxy_a_new_data_connection_is_acknowledged_at_once(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, has_proxy: bool
) -> None:
    """The proxy may keep the first bytes of a session back until then."""
    acknowledged: list[object] = []
    monkeypatch.setattr(data_dialer, "acknowledge", acknowledged.append)
    proxied = through(stack, "http", says(ESTABLISHED + b"0123abcd"))
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        way: Way = proxied
        if not has_proxy:
            way = Direct([Endpoint(socket.AF_INET, listener.getsockname())], None)
            stack.callback(gevent.spawn(give_id, listener).join)
        id, stream = Route(way, "server.example", TIMEOUT, 15.0, Agreement(Offer(10102, 0)), None).make()
        stream.close()
    assert id == "0123abcd"
    assert acknowledged == [stream.sock] * has_proxy


def test_without_a_proxy_data_connections_go_to_the_address_that_was_reached() -> None:
    with closing(socket.socket()) as listener, closing(socket.socket()) as silent:
        for each in (listener, silent):
            each.bind(("127.0.0.1", 0))
        listener.listen()
        endpoints = [Endpoint(socket.AF_INET, each.getsockname()) for each in (silent, listener)]
        way = Direct(endpoints, None)
        with closing(way.dial(TIMEOUT)) as sock:
            assert str(way.settle(sock).with_port(443)) == "127.0.0.1:443"


class SecureProxy:
    """An https:// proxy: it grants a connection and then does what a test says with its end of the TLS connection."""

    def __init__(self, authority: Authority, then: Callable[[TLSStream], object]) -> None:
        identity = load_pair(str(authority.local.crt), str(authority.local.key))
        self._context = server_context(identity.chain, identity.key)
        self._then = then

    def __call__(self, sock: Any) -> None:
        plain = as_plain(sock)
        plain.setblocking(False)
        with closing(plain):
            self._serve(accept_tls(plain, self._context))

    def _serve(self, stream: TLSStream) -> None:
        head, buffer = b"", memoryview(bytearray(1024))
        while not head.endswith(b"\r\n\r\n"):
            head += bytes(buffer[: stream.recv_into(buffer)])
        with closing(stream):
            stream.write(ESTABLISHED + SPEAKS_FIRST)
            self._then(stream)


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """An authority whose certificates this process trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.crt))
    renew_client_contexts()
    return authority


def blocking(sock: Socket) -> Any:
    """The same connection as one of gevent's sockets; tests are not patched."""
    return socket.socket(fileno=sock.detach())


def test_inside_tls_to_a_proxy_bytes_and_both_ends_of_the_stream_pass(stack: ExitStack, trusted: Authority) -> None:
    said: list[bytes] = []

    def then(stream: TLSStream) -> None:
        buffer = memoryview(bytearray(65536))
        while received := stream.recv_into(buffer):
            said.append(bytes(buffer[:received]))
        stream.write(b"answer")
        stream.half_close()

    sent = bytes(range(256)) * 4096
    with closing(blocking(dial(through(stack, "https", SecureProxy(trusted, then))))) as sock:
        assert receive_exactly(sock, len(SPEAKS_FIRST)) == SPEAKS_FIRST
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        assert receive_all(sock) == b"answer"
    assert b"".join(said) == sent


def test_a_stream_that_is_cut_inside_tls_to_a_proxy_does_not_look_whole(stack: ExitStack, trusted: Authority) -> None:
    way = through(stack, "https", SecureProxy(trusted, lambda stream: stream.sock.shutdown(socket.SHUT_RDWR)))
    with closing(blocking(dial(way))) as sock:
        receive_exactly(sock, len(SPEAKS_FIRST))
        with pytest.raises(ConnectionResetError):
            receive_all(sock)


def test_a_proxy_under_a_wrong_certificate_gets_no_request(stack: ExitStack, authority: Authority) -> None:
    renew_client_contexts()
    proxy = SecureProxy(authority, lambda _: None)  # not trusted here
    assert "certificate chain rejected for '127.0.0.1'" in str(refusal(stack, "https", proxy, JOE))


def test_a_bridge_ends_with_its_connection_though_the_proxy_keeps_its_own(
    stack: ExitStack, trusted: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the stream has ended, no watcher tells that the connection is gone."""
    monkeypatch.setattr(deadlines, "ROUND", 0.2)
    monkeypatch.setattr(bridge, "_deadlines", Deadlines(idle=0, first_byte=0, data_is_near=True))
    ended, is_gone = Event(), Event()  # the stream to the proxy, and its connection

    def then(stream: TLSStream) -> None:
        assert not stream.recv_into(memoryview(bytearray(1)))
        ended.set()
        stream.wait_readable()
        is_gone.set()

    with closing(dial(through(stack, "https", SecureProxy(trusted, then)))) as sock:
        sock.shutdown(socket.SHUT_WR)
        assert ended.wait(TIMEOUT)
        assert not is_gone.is_set()
        sockets.reset_on_close(sock, True)
    assert is_gone.wait(TIMEOUT)


def test_both_sockets_of_a_bridge_find_out_that_the_other_is_gone(stack: ExitStack) -> None:
    """Without probes, the one that waits for a proxy would never learn that its peer was closed."""
    _, far = (stack.enter_context(closing(each)) for each in bridge._connected_pair(TIMEOUT))
    assert far.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


class Intruders:
    """Connections of another process, each of which comes to the listener of a bridge just before its own."""

    def __init__(self, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: list[Socket] = []
        self.own: list[Socket] = []
        self._stack = stack
        monkeypatch.setattr(bridge, "dial", self._dial)

    def _dial(self, endpoints: Any, timeout: float) -> Socket:
        self.all.append(self._stack.enter_context(closing(sockets.dial(endpoints, timeout))))
        self.own.append(sockets.dial(endpoints, timeout))
        return self.own[-1]


def test_the_two_sockets_of_a_bridge_take_no_other_connection(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    intruders = Intruders(stack, monkeypatch)
    near, far = (stack.enter_context(closing(each)) for each in bridge._connected_pair(TIMEOUT))
    assert near.getsockname() == far.getpeername()
    assert receive(intruders.all[0], 1) == b""


def test_a_bridge_that_cannot_be_made_is_a_failed_dial(
    stack: ExitStack, trusted: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    intruders = Intruders(stack, monkeypatch)
    monkeypatch.setattr(bridge, "_TRIES", 1)
    error = refusal(stack, "https", SecureProxy(trusted, lambda stream: stream.recv_into(memoryview(bytearray(1)))))
    assert "gives no connection: other processes connect" in str(error)
    assert [each.fileno() for each in intruders.own] == [-1]
