"""Certificate files are looked at again, on SIGHUP and unasked; a bad pair never replaces a good one."""

from __future__ import annotations

import contextlib
import datetime
import signal

import pytest

from tests.support.certificates import Authority, Certificate
from tests.support.process import Environment
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client

WATCHING: Environment = {**CALM, "RELOAD_INTERVAL": "100ms"}


@pytest.fixture
def files(authority: Authority) -> Certificate:
    """A good pair that the test may overwrite."""
    return authority.issue()


def led_by_hand(stack: contextlib.ExitStack, server: OurServer, authority: Authority) -> V1Client:
    """A connected v1 client, to ask for the certificate that data connections are shown now."""
    client = V1Client(server.tunnel_address, cafile=authority.crt, automatic=False)
    stack.enter_context(client).connect()
    return client


def test_sighup_reloads_the_certificate(stack: contextlib.ExitStack, authority: Authority, files: Certificate) -> None:
    server = stack.enter_context(OurServer(2, files))
    client = led_by_hand(stack, server, authority)
    assert client.fingerprint() == files.fingerprint
    renewed = authority.issue()
    files.overwrite(renewed)
    server.send(signal.SIGHUP)
    server.wait_for("certificate.reloaded", sha256=renewed.fingerprint)
    assert client.fingerprint() == renewed.fingerprint


def test_a_changed_certificate_is_found_without_being_told(
    stack: contextlib.ExitStack, authority: Authority, files: Certificate
) -> None:
    server = stack.enter_context(OurServer(2, files, env=WATCHING))
    client = led_by_hand(stack, server, authority)
    renewed = authority.issue()
    files.overwrite(renewed)
    server.wait_for("certificate.reloaded")
    assert client.fingerprint() == renewed.fingerprint


def test_files_that_stay_the_same_are_not_reloaded(
    stack: contextlib.ExitStack, authority: Authority, files: Certificate
) -> None:
    server = stack.enter_context(OurServer(2, files, env={**CALM, "RELOAD_INTERVAL": "50ms"}))
    led_by_hand(stack, server, authority).fingerprint()
    files.overwrite(authority.issue())
    server.wait_for("certificate.reloaded")
    assert len(server.find("certificate.reloaded")) == 1


def break_key(files: Certificate, authority: Authority) -> None:
    files.key.write_bytes(authority.issue().key.read_bytes())


def break_certificate(files: Certificate, _: Authority) -> None:
    files.crt.write_text("not a certificate")


def remove_key(files: Certificate, _: Authority) -> None:
    files.key.unlink()


@pytest.mark.parametrize("watching", [False, True], ids=["sighup", "by-itself"])
def test_a_bad_new_pair_keeps_the_old_one(
    stack: contextlib.ExitStack, authority: Authority, files: Certificate, watching: bool
) -> None:
    server = stack.enter_context(OurServer(2, files, env=WATCHING if watching else CALM))
    client = led_by_hand(stack, server, authority)
    for damage in (break_key, break_certificate, remove_key):
        before, mark, renewed = client.fingerprint(), server.mark(), authority.issue()
        damage(files, authority)
        if not watching:
            server.send(signal.SIGHUP)
        assert server.wait_for("certificate.kept", after=mark, level="error", sha256=before)["error"]
        assert client.fingerprint() == before
        files.overwrite(renewed)
        if not watching:
            server.send(signal.SIGHUP)
        server.wait_for("certificate.reloaded", after=mark)
        assert client.fingerprint() == renewed.fingerprint


def test_a_reload_leaves_sessions_and_the_client_alone(
    stack: contextlib.ExitStack, authority: Authority, files: Certificate
) -> None:
    server = stack.enter_context(OurServer(2, files))
    target = stack.enter_context(Target())
    trusting = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=trusting))
    tunnel = Tunnel(server, client, target)
    with tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        files.overwrite(authority.issue())
        server.send(signal.SIGHUP)
        server.wait_for("certificate.reloaded")
        assert_connected(visitor, service)
        tunnel.assert_works()
    assert not client.find("server.disconnected")


def test_a_renewal_that_expires_soon_is_warned_about(
    stack: contextlib.ExitStack, authority: Authority, files: Certificate
) -> None:
    server = stack.enter_context(OurServer(2, files))
    assert not server.find("certificate.expiring")
    files.overwrite(authority.issue(end=datetime.timedelta(days=10)))
    server.send(signal.SIGHUP)
    server.wait_for("certificate.expiring", level="warn", days=lambda days: 9 < days <= 10)


@pytest.mark.parametrize("tls", [0, 1])
def test_sighup_without_certificate_files_is_survived(stack: contextlib.ExitStack, tls: int) -> None:
    server = stack.enter_context(OurServer(tls))
    server.send(signal.SIGHUP)
    with V1Client(server.tunnel_address):
        server.wait_for_client()
    assert server.is_running
