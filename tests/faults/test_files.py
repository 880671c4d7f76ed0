"""Disks that are full and files that cannot be read."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
from collections.abc import Callable

import pytest

from tests.support.certificates import Authority, Certificate
from tests.support.process import PROGRAM, scrubbed
from tests.support.sockets import connect, free_port, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected

Damage = Callable[[OurServer, Certificate, Authority], None]


def cut_certificate(_server: OurServer, files: Certificate, authority: Authority) -> None:
    """The disk was full while the new one was written."""
    whole = authority.issue().crt.read_bytes()
    files.crt.write_bytes(whole[: len(whole) // 2])


def empty_key(_server: OurServer, files: Certificate, _authority: Authority) -> None:
    """The disk was full before a byte was written."""
    files.key.write_bytes(b"")


def unreadable(_server: OurServer, files: Certificate, _authority: Authority) -> None:
    """Root may read any file, but no directory."""
    files.key.unlink()
    files.key.mkdir()


def no_descriptor(server: OurServer, _files: Certificate, _authority: Authority) -> None:
    """The new pair is good, and cannot be opened."""
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (3, limits[1]))


def test_a_reload_that_fails_keeps_the_old_certificate_and_serves_on(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    files = authority.issue()
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(2, files, log="info"))
    env = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env, log="info"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    with tunnel.session() as (visitor, service):
        for damage in (cut_certificate, empty_key, no_descriptor, unreadable):
            mark = server.mark()
            files.overwrite(authority.issue())
            damage(server, files, authority)
            server.send(signal.SIGHUP)
            assert server.wait_for("certificate.kept", after=mark, level="error")["error"]
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
            assert_connected(visitor, service)
    for _ in range(20):  # more than the pool held before: handshakes go on with the old one
        tunnel.assert_works()
    assert not server.find("certificate.reloaded")
    assert server.stop() == 0


@pytest.mark.programs
def test_a_log_on_a_full_disk_is_given_up_and_nothing_else(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    port = free_port(2)
    url = f"server://127.0.0.1:{port}/127.0.0.1:{port + 1}?tls=0&log=debug"
    with open("/dev/full", "w") as full:
        server = subprocess.Popen([str(PROGRAM), url], env=scrubbed(CALM), stderr=full)
    stack.callback(server.wait)
    stack.callback(server.kill)
    client = stack.enter_context(OurClient(("127.0.0.1", port), target.address))
    client.wait_until_connected()
    for _ in range(5):
        with connect(("127.0.0.1", port + 1)) as visitor, target.accept() as service:
            assert_connected(visitor, service)
    server.send_signal(signal.SIGTERM)
    assert until(lambda: server.poll() is not None)
    assert server.returncode == 0
