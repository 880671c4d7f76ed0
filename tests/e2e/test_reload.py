"""Certificate files are looked at again, on SIGHUP and unasked; a bad pair never replaces a good one."""

from __future__ import annotations

import contextlib
import datetime
import signal
from collections.abc import Iterator

import pytest

from tests.support.certificates import Authority, Certificate
from tests.support.process import Environment
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.wire2.ours import OurServers

WATCHING: Environment = {**CALM, "RELOAD_INTERVAL": "100ms"}


@pytest.fixture(scope="module")
def files(authority: Authority) -> Certificate:
    """A pair that each test overwrites, and leaves good."""
    return authority.issue()


@pytest.fixture(scope="module")
def server(files: Certificate) -> Iterator[OurServer]:
    """A server that looks at its files when it is told."""
    with OurServer(2, files) as running:
        yield running
        assert not running.find_crashes()


@pytest.fixture(scope="module")
def watched(authority: Authority) -> Certificate:
    """Likewise, for the server that looks by itself."""
    return authority.issue()


@pytest.fixture(scope="module")
def watching(watched: Certificate) -> Iterator[OurServer]:
    with OurServer(2, watched, env=WATCHING) as running:
        yield running
        assert not running.find_crashes()


def led_by_hand(stack: contextlib.ExitStack, server: OurServer, authority: Authority) -> V1Client:
    """A connected v1 client, to ask for the certificate that data connections are shown now."""
    client = V1Client(server.tunnel_address, cafile=authority.crt, automatic=False)
    stack.enter_context(client).connect()
    return client


def test_sighup_reloads_the_certificate(
    stack: contextlib.ExitStack, server: OurServer, authority: Authority, files: Certificate
) -> None:
    client = led_by_hand(stack, server, authority)
    renewed = authority.issue()
    files.overwrite(renewed)
    server.send(signal.SIGHUP)
    server.wait_for("certificate.reloaded", sha256=renewed.fingerprint)
    assert client.fingerprint() == renewed.fingerprint


def test_a_changed_certificate_is_found_without_being_told(
    stack: contextlib.ExitStack, watching: OurServer, authority: Authority, watched: Certificate
) -> None:
    client = led_by_hand(stack, watching, authority)
    renewed = authority.issue()
    mark = watching.mark()
    watched.overwrite(renewed)
    watching.wait_for("certificate.reloaded", after=mark, sha256=renewed.fingerprint)
    assert client.fingerprint() == renewed.fingerprint


def test_files_that_stay_the_same_are_not_reloaded(
    watching: OurServer, authority: Authority, watched: Certificate
) -> None:
    """Each of two renewals is one line, however often the files are looked at."""
    for renewed in (authority.issue(), authority.issue()):
        watched.overwrite(renewed)
        watching.wait_for("certificate.reloaded", sha256=renewed.fingerprint)
        assert len(watching.find("certificate.reloaded", sha256=renewed.fingerprint)) == 1


def break_key(files: Certificate, authority: Authority) -> None:
    files.key.write_bytes(authority.issue().key.read_bytes())


def break_certificate(files: Certificate, _: Authority) -> None:
    files.crt.write_text("not a certificate")


def remove_key(files: Certificate, _: Authority) -> None:
    files.key.unlink()


@pytest.mark.parametrize("by_itself", [False, True], ids=["sighup", "by-itself"])
def test_a_bad_new_pair_keeps_the_old_one(
    stack: contextlib.ExitStack, authority: Authority, request: pytest.FixtureRequest, by_itself: bool
) -> None:
    found: OurServer = request.getfixturevalue("watching" if by_itself else "server")
    pair: Certificate = request.getfixturevalue("watched" if by_itself else "files")
    client = led_by_hand(stack, found, authority)
    for damage in (break_key, break_certificate, remove_key):
        before, mark, renewed = client.fingerprint(), found.mark(), authority.issue()
        damage(pair, authority)
        if not by_itself:
            found.send(signal.SIGHUP)
        assert found.wait_for("certificate.kept", after=mark, level="error", sha256=before)["error"]
        assert client.fingerprint() == before
        pair.overwrite(renewed)
        if not by_itself:
            found.send(signal.SIGHUP)
        found.wait_for("certificate.reloaded", after=mark)
        assert client.fingerprint() == renewed.fingerprint


def test_a_reload_leaves_sessions_and_the_client_alone(
    stack: contextlib.ExitStack, server: OurServer, authority: Authority, files: Certificate
) -> None:
    target = stack.enter_context(Target())
    trusting = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=trusting))
    tunnel = Tunnel(server, client, target)
    with tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        mark = server.mark()
        files.overwrite(authority.issue())
        server.send(signal.SIGHUP)
        server.wait_for("certificate.reloaded", after=mark)
        assert_connected(visitor, service)
        tunnel.assert_works()
    assert not client.find("server.disconnected")


def test_a_renewal_that_expires_soon_is_warned_about(
    server: OurServer, authority: Authority, files: Certificate
) -> None:
    assert not server.find("certificate.expiring")
    files.overwrite(authority.issue(end=datetime.timedelta(days=10)))
    server.send(signal.SIGHUP)
    server.wait_for("certificate.expiring", level="warn", days=lambda days: 9 < days <= 10)


def test_sighup_without_certificate_files_is_survived() -> None:
    with OurServers({mode: f"tls={mode}" for mode in "01"}) as servers:
        servers.send(signal.SIGHUP)
        servers.wait_for("process.reloading")
        for mode, place in servers.places.items():
            with V1Client(place.tunnel) as client:
                client.wait_until_full()
                servers.wait_in(mode, "client.connected")
        assert not servers.find_crashes()
