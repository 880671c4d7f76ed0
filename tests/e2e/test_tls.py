"""TLS: what is verified and what is not, what a refusal says, and what is on the wire."""

from __future__ import annotations

import contextlib
import datetime
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
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
from tests.support.wire2.ours import OurClients, OurServers

DAY = datetime.timedelta(days=1)


def trusting(authority: Authority) -> dict[str, str]:
    return {**CALM, "SSL_CERT_FILE": str(authority.crt)}


@contextlib.contextmanager
def serving(leaves: Mapping[str, Certificate]) -> Iterator[OurServers]:
    """One process with a server for each certificate."""
    with OurServers({label: f"tls=2&crt={leaf.crt}&key={leaf.key}" for label, leaf in leaves.items()}) as servers:
        yield servers


def refusals(servers: OurServers, labels: Iterable[str], env: dict[str, str]) -> dict[str, Entry]:
    """What clients of ours log about each server, after checking that they serve nobody."""
    where = {label: (servers[label].tunnel, "tls=0") for label in labels}
    with Target() as target, OurClients(where, target.address, env=env) as clients:
        entries = {
            label: clients.wait_in(label, "server.rejected", level="error", reason="certificate") for label in where
        }
        for label in where:
            with contextlib.suppress(ConnectionResetError), connect(servers[label].visitors) as visitor:
                visitor.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    assert is_over(visitor)
        assert clients.is_running
        return entries


def test_a_certificate_of_another_name_or_authority_or_that_has_expired_is_refused_with_the_reason(
    authority: Authority, tmp_path: Path
) -> None:
    leaves = {
        "name": authority.issue("elsewhere.example"),
        "expired": authority.issue(start=-20 * DAY, end=-1 * DAY),
        "chain": Authority(tmp_path / "other", "another authority").local,
        "good": authority.local,
    }
    with serving(leaves) as servers:
        entries = refusals(servers, ("name", "expired", "chain"), trusting(authority))
        for check, entry in entries.items():
            assert entry["check"] == check
            assert "127.0.0.1" in entry["error"]
        assert "elsewhere.example" in entries["name"]["error"]
        of_system = refusals(servers, ["good"], dict(CALM))  # without SSL_CERT_FILE the system's authorities decide
        assert of_system["good"]["check"] == "chain"


@pytest.fixture(scope="module")
def modes(authority: Authority) -> Iterator[OurServers]:
    """A server in each mode, whose clients are led by hand."""
    with OurServers({mode: f"tls={mode}" for mode in "012"}, authority.local) as servers:
        yield servers


@pytest.mark.programs
def test_a_server_is_verified_by_its_dns_name(stack: contextlib.ExitStack, authority: Authority) -> None:
    server = stack.enter_context(OurServer(2, authority.issue("localhost")))
    target = stack.enter_context(Target())
    address = ("localhost", server.tunnel_address[1])
    client = stack.enter_context(OurClient(address, target.address, env=trusting(authority)))
    Tunnel(server, client, target).assert_works()


@pytest.mark.programs
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


@pytest.mark.parametrize("mode", ["1", "2"])
def test_the_fingerprint_in_the_log_is_that_of_the_certificate_shown(
    modes: OurServers, authority: Authority, mode: str
) -> None:
    with V1Client(modes[mode].tunnel, cafile=authority.crt, automatic=False) as client:
        client.connect()
        logged = modes.wait_in(mode, "certificate.loaded", level="info", self_signed=mode == "1")["sha256"]
        assert client.fingerprint() == logged
        assert mode == "1" or logged == authority.local.fingerprint


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_2_and_1_3_are_spoken(stack: contextlib.ExitStack, modes: OurServers, version: ssl.TLSVersion) -> None:
    client = lead_by_hand(stack, modes, "1")
    context = lenient()
    context.minimum_version = context.maximum_version = version
    stream = TLSStream(connect(client.data_address), context, "localhost")
    stack.callback(stream.abort)
    assert len(stream.recv(8)) == 8


def test_tls_1_1_is_refused(stack: contextlib.ExitStack, modes: OurServers) -> None:
    client = lead_by_hand(stack, modes, "1")
    context = lenient()
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLS"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with connect(client.data_address) as sock, pytest.raises((ssl.SSLError, ConnectionError)):
        TLSStream(sock, context, "localhost")


def lead_by_hand(stack: contextlib.ExitStack, modes: OurServers, mode: str) -> V1Client:
    """A v1 client that has only connected to the server of this mode."""
    client = stack.enter_context(V1Client(modes[mode].tunnel, automatic=False))
    client.connect()
    return client


def lenient() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.programs
def test_a_server_without_tls_says_that_the_tunnel_is_in_the_clear() -> None:
    with Nodepass("server://127.0.0.1:0/127.0.0.1:0") as server:
        server.wait_for("server.listening", tls=0)
        server.wait_for("tunnel.security", level="warn", tls=0, key=False)


@pytest.mark.parametrize("mode", ["0", "1"])
def test_only_the_modes_with_tls_hide_what_is_said(stack: contextlib.ExitStack, modes: OurServers, mode: str) -> None:
    client = lead_by_hand(stack, modes, mode)
    raw = stack.enter_context(connect(client.data_address))
    if mode == "0":
        assert all(byte in b"0123456789abcdef" for byte in receive_exactly(raw, 8))
    else:
        raw.settimeout(0.3)
        with pytest.raises(TimeoutError):
            raw.recv(1)


@pytest.mark.programs
def test_a_certificate_about_to_expire_is_warned_about_at_start(authority: Authority) -> None:
    with serving({"old": authority.issue(end=5 * DAY), "fresh": authority.local}) as servers:
        servers.wait_in("old", "certificate.expiring", level="warn", days=lambda days: 4 < days <= 5)
        servers.wait_in("fresh", "certificate.loaded")
        assert not servers.find_in("fresh", "certificate.expiring")
