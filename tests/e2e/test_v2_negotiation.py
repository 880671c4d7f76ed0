"""The first lines of a control connection without a key, to the letter, from either end."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority
from tests.support.process import Environment, Nodepass
from tests.support.sockets import format_address, is_silent, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server
from tests.support.v2_client import V2Client
from tests.support.v2_control import HELLO_WAIT, ScriptedServer, dial
from tests.support.v2_server import V2Server

NONCE = "00112233445566778899aabbccddeeff"
V1_LINE = rb"//\d+#0"


@pytest.fixture
def server() -> Iterator[OurServer]:
    with OurServer() as running:
        yield running


def test_our_client_begins_with_a_hello_and_a_nonce_that_is_never_the_same(stack: contextlib.ExitStack) -> None:
    script = stack.enter_context(ScriptedServer())
    stack.enter_context(OurClient(script.address, ("127.0.0.1", 9)))
    nonces = set()
    for _ in range(3):
        with script.accept() as talk:
            match = re.fullmatch(rb"//hello\?v=2&nonce=([0-9a-f]{32})", talk.hear_line())
            assert match
            nonces.add(match[1])
    assert len(nonces) == 3


@pytest.mark.parametrize("tls", [0, 1, 2])
def test_our_server_answers_a_hello_with_the_tunnel_signal_to_the_letter(
    stack: contextlib.ExitStack, authority: Authority, tls: int
) -> None:
    server = stack.enter_context(OurServer(tls, authority.local, env={"REPORT_INTERVAL": "1500ms"}))
    with V2Client(server.tunnel_address, automatic=False) as client:
        client.dial()
        client.hello()
        line = client.talk.hear_line()
    fingerprint = "&fp=[0-9a-f]{64}" if tls == 1 else ""
    assert re.fullmatch(rf"//{server.data_address[1]}\?v=2&hb=1500{fingerprint}#{tls}".encode(), line)


def test_the_announced_fingerprint_is_that_of_the_certificate(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer(1))
    client = stack.enter_context(V2Client(server.tunnel_address, automatic=False))
    client.connect()
    client.open_data()  # compares them
    assert client.signal.parameters["fp"] == server.wait_for("certificate.loaded")["sha256"]


def test_a_server_without_a_key_speaks_at_once_to_a_hello(server: OurServer) -> None:
    """A busy machine may add to it each time; a server that waited would never be so quick."""

    def is_quick() -> bool:
        with V2Client(server.tunnel_address, automatic=False) as client:
            began = time.monotonic()
            client.connect()
            passed = time.monotonic() - began
        until(lambda: len(server.find("client.connected")) == len(server.find("client.disconnected")))
        return passed < HELLO_WAIT

    until(is_quick)


def test_a_silent_peer_is_taken_for_v1_after_a_quarter_of_a_second(server: OurServer) -> None:
    began = time.monotonic()
    with dial(server.tunnel_address) as talk:
        line = talk.hear_line()
    assert time.monotonic() - began >= HELLO_WAIT * 0.8
    assert re.fullmatch(V1_LINE, line)
    server.wait_for_client(wire=1)


def test_a_hello_in_two_pieces_is_understood(server: OurServer) -> None:
    """Where the machine is busy the second one may come too late, and then the peer is taken for v1."""

    def is_understood() -> bool:
        with dial(server.tunnel_address) as talk:
            talk.sock.sendall(b"//hello?v=2&non")
            quiet = is_silent(talk.sock, HELLO_WAIT / 5)
            talk.sock.sendall(f"ce={NONCE}\n".encode())
            return quiet and talk.hear().parameters.get("v") == "2"

    until(is_understood)


def test_a_hello_with_parameters_of_the_future_is_understood(server: OurServer) -> None:
    with dial(server.tunnel_address) as talk:
        talk.say(f"//hello?v=2&nonce={NONCE}&colour=blue&x")
        assert talk.hear().parameters["v"] == "2"


def test_parameters_and_signals_of_the_future_are_ignored_by_our_client(stack: contextlib.ExitStack) -> None:
    script = stack.enter_context(ScriptedServer())
    data = stack.enter_context(ScriptedServer())
    client = stack.enter_context(OurClient(script.address, ("127.0.0.1", 9)))
    with script.accept() as talk:
        talk.hear()
        talk.say(f"//{data.address[1]}?v=2&hb=5000&colour=blue&x#0")
        client.wait_until_connected()
        talk.say("//deadbeef?why=not#77")
        data.accept()
        talk.say("")
        assert talk.hear_line() == b""


def test_a_version_of_the_future_is_turned_away_by_name(server: OurServer) -> None:
    with dial(server.tunnel_address) as talk:
        talk.say(f"//hello?v=9&nonce={NONCE}")
        assert talk.refusal() == "version"
    server.wait_for("client.rejected", level="warn", reason="version")


REASONS = {
    "key-required": "key_required",
    "key-mismatch": "key_mismatch",
    "busy": "busy",
    "version": "version",
    "shutdown": "shutdown",
    "full-moon": "other",  # of the future: it is shown as it is
}


def test_our_client_says_why_it_is_turned_away(stack: contextlib.ExitStack) -> None:
    servers = {token: stack.enter_context(ScriptedServer()) for token in REASONS}
    urls = [f"client://{format_address(server.address)}/127.0.0.1:9" for server in servers.values()]
    client = stack.enter_context(Nodepass(*urls, env=CALM))
    for _ in range(2):  # it goes on trying
        for token, server in servers.items():
            talk = server.accept()
            talk.hear()
            talk.say(f"//error?reason={token}")
            assert talk.is_ended_by_peer()
    for token, server in servers.items():
        tunnel, reason = f"client:{server.address[1]}", REASONS[token]
        entry = client.wait_for("server.rejected", level="error", tunnel=tunnel, reason=reason)
        assert entry["error"]
        assert reason != "other" or token in entry["error"]
    assert client.is_running


def test_a_newcomer_is_told_that_our_server_shuts_down(stack: contextlib.ExitStack, server: OurServer) -> None:
    target = stack.enter_context(Target())
    client = stack.enter_context(V2Client(server.tunnel_address, target.address))
    client.wait_until_full()
    with Tunnel(server, client, target).session():  # for its sake the server does not end at once
        server.send(signal.SIGTERM)
        server.wait_for("process.stopping")
        with dial(server.tunnel_address) as newcomer:
            newcomer.say(f"//hello?v=2&nonce={NONCE}")
            assert newcomer.refusal() == "shutdown"
    assert server.wait() == 0


MALFORMED = (
    b"//hello\n",
    b"//hello?v=2\n",
    b"//hello?v=2&nonce=zz\n",
    b"//hello?v=x&nonce=00\n",
    b"\0\xff\n",
    b"GET / HTTP/1.1\r\n\r\n",
)


def test_a_malformed_hello_harms_nobody(server: OurServer) -> None:
    for garbage in MALFORMED:
        with dial(server.tunnel_address) as talk:
            talk.sock.sendall(garbage)
            with contextlib.suppress(OSError):
                talk.hear_line()
    with Target() as target, V2Client(server.tunnel_address, target.address) as client:
        until(lambda: client.idle)
        Tunnel(server, client, target).assert_works()
    assert not server.find_crashes()


def env_of(authority: Authority, extra: Environment = CALM) -> dict[str, str]:
    return {**extra, "SSL_CERT_FILE": str(authority.crt)}


@pytest.mark.parametrize("tls", [0, 1, 2])
def test_a_v1_client_is_told_apart_and_served(stack: contextlib.ExitStack, authority: Authority, tls: int) -> None:
    server = stack.enter_context(OurServer(tls, authority.local))
    target = stack.enter_context(Target())
    client = stack.enter_context(V1Client(server.tunnel_address, target.address, cafile=authority.crt))
    client.wait_until_full()
    server.wait_for_client(wire=1)
    tunnel = Tunnel(server, client, target)
    tunnel.assert_works()
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


@pytest.mark.parametrize("tls", [0, 1, 2])
def test_a_v1_server_is_told_apart_and_used(stack: contextlib.ExitStack, authority: Authority, tls: int) -> None:
    server = stack.enter_context(V1Server(tls, authority.local))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env_of(authority)))
    client.wait_until_connected(tls=tls, wire=1)
    tunnel = Tunnel(server, client, target)
    tunnel.assert_works()
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


def test_a_v2_peer_is_told_apart_on_either_end(stack: contextlib.ExitStack, server: OurServer) -> None:
    stack.enter_context(V2Client(server.tunnel_address))
    server.wait_for_client(wire=2)
    peer = stack.enter_context(V2Server())
    client = stack.enter_context(OurClient(peer.tunnel_address, ("127.0.0.1", 9)))
    client.wait_until_connected(wire=2)
