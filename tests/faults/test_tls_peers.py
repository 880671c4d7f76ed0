"""Peers that misuse TLS on a data connection they were allowed to make: renegotiation and key updates without end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading

import pytest

from tests.support.key_updates import handshake, key_updates
from tests.support.proc import cpu_seconds, resident_bytes
from tests.support.process import Nodepass
from tests.support.scope import Closes
from tests.support.sockets import format_address, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_tunnel import KEYED

MANY = 60
"""Commands given to it, one after another."""

FLOOD = 20_000
"""Key updates in a row, half a megabyte, which would take OpenSSL half a second."""

LITTLE = 0.2
"""Seconds of CPU time for what costs milliseconds."""


class Openssl(Closes):
    """A data connection made with `openssl s_client`, told by letters what to do; a context manager."""

    def __init__(self, address: tuple[str, int], version: str) -> None:
        self._command = ["openssl", "s_client", "-connect", format_address(address), f"-{version}"]

    def __enter__(self) -> Openssl:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self.heard = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        return self

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            stream.close()

    def _read(self) -> None:
        assert self._process.stdout
        while part := self._process.stdout.read(1 << 16):
            self.heard += part

    @property
    def is_over(self) -> bool:
        """Whether the connection has ended."""
        return self._process.poll() is not None

    def say(self, letter: str, times: int, answer: bytes) -> None:
        """Give a command again and again, each time when it has taken the one before; until the connection ends."""
        assert self._process.stdin
        for number in range(times):
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(f"{letter}\n".encode())
            until(lambda: self.heard.count(answer) > number or self.is_over)  # noqa: B023  # called in this round


@pytest.fixture
def tunnel(stack: contextlib.ExitStack) -> Tunnel:
    """Without a key: from the client's address anybody may make a data connection."""
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(1, env=CALM, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=CALM, log="info"))
    client.wait_until_connected()
    return Tunnel(server, client, target)


def assert_unharmed(tunnel: Tunnel, peer: Openssl, letter: str, answer: bytes, times: int = MANY) -> None:
    """That a session goes on beside it, nothing spins, and visitors are served once the peer has gone."""
    server: Nodepass = tunnel.our_server
    with tunnel.session() as (visitor, service):
        with peer:
            until(lambda: b"Verify return code" in peer.heard, what="no handshake")
            used = cpu_seconds(server.pid)
            peer.say(letter, times, answer)
            assert_connected(visitor, service)
            assert cpu_seconds(server.pid) - used < 5
        assert_connected(visitor, service)
    until(lambda: works(tunnel), what="serves nobody")
    assert not server.find("client.disconnected") + server.find_crashes()
    assert server.stop() == 0


def works(tunnel: Tunnel) -> bool:
    """Whether a visitor is served; the first may get the connection of the peer that has gone."""
    with contextlib.suppress(AssertionError, OSError):
        tunnel.assert_works()
        return True
    return False


@pytest.mark.programs("openssl")
@pytest.mark.parametrize("letter", ["k", "K"], ids=["its own keys", "both ends' keys"])
def test_key_updates_without_end_are_borne(tunnel: Tunnel, letter: str) -> None:
    assert_unharmed(tunnel, Openssl(tunnel.our_server.data_address, "tls1_3"), letter, b"KEYUPDATE")


@pytest.mark.programs
@pytest.mark.parametrize("keyed", [False, True], ids=["idle in the pool", "before its proof of the key"])
def test_a_flood_of_key_updates_ends_its_connection_and_keeps_nobody_waiting(
    stack: contextlib.ExitStack, keyed: bool
) -> None:
    """With a key it is a stranger that comes so far; without one it has to come from the client's address."""
    env = KEYED if keyed else CALM
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(1, env=env, log="info"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env=env, log="info"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    source = "127.0.0.2" if keyed else "127.0.0.1"
    peer = stack.enter_context(socket.create_connection(server.data_address, 20, source_address=(source, 0)))
    flood = key_updates(handshake(peer), FLOOD)
    used, memory = cpu_seconds(server.pid), resident_bytes(server.pid)
    with contextlib.suppress(ConnectionError):  # it may end while we are still talking
        peer.sendall(flood)
        while peer.recv(1 << 16):
            pass
    assert cpu_seconds(server.pid) - used < LITTLE
    assert resident_bytes(server.pid) - memory < len(flood)
    if keyed:
        server.wait_for("data.rejected", reason="tls", peer=format_address(peer.getsockname()))
    tunnel.assert_works()
    assert not server.find("client.disconnected") + server.find_crashes()
    assert server.stop() == 0


@pytest.mark.programs("openssl")
def test_a_renegotiation_is_not_entered_into(tunnel: Tunnel) -> None:
    assert_unharmed(tunnel, Openssl(tunnel.our_server.data_address, "tls1_2"), "R", b"RENEGOTIATING", 1)
