"""TLS: what is verified and what is not, what a refusal says, and what is on the wire."""

from __future__ import annotations

import contextlib
import datetime
import re
import ssl
from pathlib import Path

import pytest

from tests.support.certificates import Authority, Certificate
from tests.support.log import Entry
from tests.support.process import Nodepass
from tests.support.sockets import connect, is_over, receive_exactly
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server
from tests.support.v1_stream import TLSStream

DAY = datetime.timedelta(days=1)


def trusting(authority: Authority) -> dict[str, str]:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt)}


def refusal(stack: contextlib.ExitStack, leaf: Certificate, env: dict[str, str]) -> Entry:
    """What our client logs about a server with this certificate, after checking that it serves nobody."""
    server = stack.enter_context(OurServer(2, leaf))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    entry = client.wait_for("server.rejected", level="error", reason="certificate")
    with connect(server.visitor_address) as visitor:
        visitor.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            assert is_over(visitor)
    assert client.is_running
    return entry


def test_a_certificate_for_another_name_is_refused_by_name(stack: contextlib.ExitStack, authority: Authority) -> None:
    entry = refusal(stack, authority.issue("elsewhere.example"), trusting(authority))
    assert entry["check"] == "name"
    assert "127.0.0.1" in entry["error"]
    assert "elsewhere.example" in entry["error"]


def test_a_certificate_that_has_expired_is_refused(stack: contextlib.ExitStack, authority: Authority) -> None:
    entry = refusal(stack, authority.issue(start=-20 * DAY, end=-1 * DAY), trusting(authority))
    assert entry["check"] == "expired"
    assert "127.0.0.1" in entry["error"]


def test_a_certificate_of_an_unknown_authority_is_refused_for_its_chain(
    stack: contextlib.ExitStack, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger", "somebody else")
    entry = refusal(stack, stranger.local, trusting(authority))
    assert entry["check"] == "chain"
    assert "127.0.0.1" in entry["error"]


def test_without_ssl_cert_file_the_authorities_of_the_system_decide(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    assert refusal(stack, authority.local, dict(CALM))["check"] == "chain"


def test_a_server_is_verified_by_its_dns_name(stack: contextlib.ExitStack, authority: Authority) -> None:
    server = stack.enter_context(OurServer(2, authority.issue("localhost")))
    target = stack.enter_context(Target())
    address = ("localhost", server.tunnel_address[1])
    client = stack.enter_context(OurClient(address, target.address, env=trusting(authority)))
    Tunnel(server, client, target).assert_works()


def test_a_v1_server_with_a_bad_certificate_is_refused_too(stack: contextlib.ExitStack, authority: Authority) -> None:
    server = stack.enter_context(V1Server(2, authority.issue("elsewhere.example")))
    target = stack.enter_context(Target())
    env = trusting(authority)
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env))
    client.wait_for("data.dial_failed", level="error", check="name", error=re.compile(r"elsewhere\.example"))
    with connect(server.visitor_address), pytest.raises(TimeoutError):
        target.accept(timeout=0.3)


def test_mode_1_verifies_nothing(stack: contextlib.ExitStack, authority: Authority) -> None:
    expired = authority.issue("elsewhere.example", start=-20 * DAY, end=-1 * DAY)
    server = stack.enter_context(V1Server(1, expired))
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    Tunnel(server, client, target).assert_works()


@pytest.mark.parametrize("tls", [1, 2])
def test_the_fingerprint_in_the_log_is_that_of_the_certificate_shown(
    stack: contextlib.ExitStack, authority: Authority, tls: int
) -> None:
    server = stack.enter_context(OurServer(tls, authority.local, log="info"))
    client = stack.enter_context(V1Client(server.tunnel_address, cafile=authority.crt, automatic=False))
    client.connect()
    entry = server.wait_for("certificate.loaded", self_signed=tls == 1)
    logged = entry["sha256"]
    assert client.fingerprint() == logged
    assert tls == 1 or logged == authority.local.fingerprint


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(stack: contextlib.ExitStack, version: ssl.TLSVersion) -> None:
    client = lead_by_hand(stack)
    context = lenient()
    context.minimum_version = context.maximum_version = version
    stream = TLSStream(connect(client.data_address), context, "localhost")
    stack.callback(stream.abort)
    assert len(stream.recv(8)) == 8


def test_tls_1_1_is_refused(stack: contextlib.ExitStack) -> None:
    client = lead_by_hand(stack)
    context = lenient()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(client.data_address) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        TLSStream(sock, context, "localhost")


def lead_by_hand(stack: contextlib.ExitStack) -> V1Client:
    """A v1 client that has only connected to a server of ours in mode 1."""
    server = stack.enter_context(OurServer(1))
    client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
    client.connect()
    return client


def lenient() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def test_a_server_without_tls_says_that_the_tunnel_is_in_the_clear(
    stack: contextlib.ExitStack,
) -> None:
    server = stack.enter_context(Nodepass("server://127.0.0.1:0/127.0.0.1:0"))
    server.wait_for("server.listening", tls=0)
    server.wait_for("tunnel.security", level="warn", tls=0, key=False)


@pytest.mark.parametrize("tls", [0, 1])
def test_only_the_modes_with_tls_hide_what_is_said(stack: contextlib.ExitStack, tls: int) -> None:
    server = stack.enter_context(OurServer(tls))
    client = stack.enter_context(V1Client(server.tunnel_address, automatic=False))
    client.connect()
    raw = stack.enter_context(connect(client.data_address))
    if tls == 0:
        assert all(byte in b"0123456789abcdef" for byte in receive_exactly(raw, 8))
    else:
        raw.settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw.recv(1)


def test_a_certificate_about_to_expire_is_warned_about_at_start(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    server = stack.enter_context(OurServer(2, authority.issue(end=5 * DAY)))
    server.wait_for("certificate.expiring", level="warn", days=lambda days: 4 < days <= 5)
    fresh = stack.enter_context(OurServer(2, authority.local))
    fresh.wait_for("certificate.loaded")
    assert not fresh.find("certificate.expiring")
