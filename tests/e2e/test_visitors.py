"""Which visitors a server serves, by the settings of its URL and by files that are read again at SIGHUP."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import pytest

from tests.support.command import call
from tests.support.sockets import PATIENCE, datagram_socket
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel, assert_connected

FRIEND, OTHER, BUSY, STRANGER = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.9"
MOST = 5


def visit(tunnel: Tunnel, source: str) -> socket.socket:
    """A visitor's connection from an address."""
    return socket.create_connection(tunnel.visitor_address, PATIENCE, (source, 0))


def assert_served(tunnel: Tunnel, source: str) -> None:
    """That an address is served, by TCP and UDP."""
    with visit(tunnel, source) as visitor, tunnel.target.accept() as service:
        assert_connected(visitor, service)
    with datagram_socket(source) as visitor:
        visitor.sendto(source.encode(), tunnel.visitor_address)
        question, client = tunnel.target.udp.recvfrom(64)
        tunnel.target.udp.sendto(question, client)
        assert visitor.recv(64) == source.encode()


def assert_refused(tunnel: Tunnel, source: str, reason: str) -> None:
    """That an address is refused, by TCP and UDP, and the log says so; a datagram of it would arrive first."""
    server, mark = tunnel.our_server, tunnel.our_server.mark()
    with socket.socket() as visitor:
        visitor.settimeout(PATIENCE)
        visitor.bind((source, 0))
        shown = f"{source}:{visitor.getsockname()[1]}"
        with contextlib.suppress(ConnectionResetError):  # already
            visitor.connect(tunnel.visitor_address)
            assert visitor.recv(1), "an orderly end looks like an empty answer"
            pytest.fail("served")
        server.wait_for("visitor.refused", after=mark, level="warn", visitor=shown, reason=reason)
    with datagram_socket(source) as visitor:
        visitor.sendto(b"unwanted", tunnel.visitor_address)
        shown = f"{source}:{visitor.getsockname()[1]}"
        server.wait_for("visitor.refused", after=mark, visitor=shown, reason=reason)


def test_rules_of_a_url_decide_and_files_are_read_again(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    deny = tmp_path / "deny"
    deny.write_text(f"# not these\n{OTHER}\n")
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(query=f"allow=127.0.0.0/29&deny=@{deny}&sessions_per_address={MOST}"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    assert_refused(tunnel, OTHER, "denied")
    assert_refused(tunnel, STRANGER, "not_allowed")
    assert_served(tunnel, FRIEND)

    deny.write_text(f"{FRIEND}/31\n{FRIEND}/30\n")
    server.send(signal.SIGHUP)
    assert str(deny) in server.wait_for("rules.kept", level="error")["error"]
    assert_served(tunnel, FRIEND)
    assert_refused(tunnel, OTHER, "denied")

    with visit(tunnel, FRIEND) as visitor, target.accept() as service:
        deny.write_text(f"{FRIEND}\n")
        server.send(signal.SIGHUP)
        server.wait_for("rules.reloaded")
        assert_connected(visitor, service)
    assert_refused(tunnel, FRIEND, "denied")
    assert_served(tunnel, OTHER)

    for number in range(MOST):
        stack.enter_context(datagram_socket(BUSY)).sendto(b"%d" % number, tunnel.visitor_address)
        assert target.udp.recv(64) == b"%d" % number
    assert_refused(tunnel, BUSY, "address_sessions")
    assert not server.find_crashes()


@pytest.mark.parametrize("content", [None, "192.0.2.1/24\n"])
def test_a_file_that_cannot_be_used_at_start_is_bad_input(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "allow"
    if content:
        path.write_text(content)
    done = call("server://127.0.0.1:0/127.0.0.1:0?tls=0", env={"ALLOW": f"@{path}"})
    assert done.code == 2
    [line] = [each for each in done.lines if "ALLOW" in each]
    assert str(path) in line
    assert not content or "line 1" in line
