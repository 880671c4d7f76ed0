"""TLS where pyOpenSSL lacks a private name that the program uses: the same sessions, by its public API."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from tests.support import without_private_names
from tests.support.certificates import Authority
from tests.support.key_updates import handshake, key_updates
from tests.support.proc import cpu_seconds, resident_bytes
from tests.support.process import Nodepass
from tests.support.sockets import connect, receive_all, receive_exactly, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v1_client import V1Client
from tests.support.v1_server import V1Server

HIDDEN = "BIO_new_mem_buf"
BULK = bytes(range(256)) * (12 << 10)  # 3 MiB: more than the sockets on the way hold
FLOOD = 20_000
"""Key updates in a row, half a megabyte, which would take OpenSSL half a second."""

LITTLE = 0.2
"""Seconds of CPU time for what costs milliseconds."""

Run = TypeVar("Run", bound=Nodepass)


def by_public_api(run: Run) -> Run:
    """Have a run, which has not started, miss a private name."""
    run.program = (sys.executable, str(Path(without_private_names.__file__)), HIDDEN)
    return run


def both_ends(stack: contextlib.ExitStack, authority: Authority, target: Target) -> Tunnel:
    server = stack.enter_context(by_public_api(OurServer(2, authority.local)))
    env = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(by_public_api(OurClient(server.tunnel_address, target.address, env=env)))
    client.wait_until_connected()
    return Tunnel(server, client, target)


def the_server_of_a_v1_client(stack: contextlib.ExitStack, authority: Authority, target: Target) -> Tunnel:
    server = stack.enter_context(by_public_api(OurServer(2, authority.local)))
    peer = V1Client(server.tunnel_address, target.address, cafile=authority.crt, server_name="127.0.0.1")
    client = stack.enter_context(peer)
    client.wait_until_full()
    return Tunnel(server, client, target)


def the_client_of_a_v1_server(stack: contextlib.ExitStack, authority: Authority, target: Target) -> Tunnel:
    server = stack.enter_context(V1Server(2, authority.local))
    env = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    client = stack.enter_context(by_public_api(OurClient(server.tunnel_address, target.address, env=env)))
    client.wait_until_connected()
    return Tunnel(server, client, target)


Start = Callable[[contextlib.ExitStack, Authority, Target], Tunnel]
STARTS: list[Start] = [both_ends, the_server_of_a_v1_client, the_client_of_a_v1_server]


def send_all(sock: socket.socket) -> None:
    """Send the bulk and end the stream."""
    sock.sendall(BULK)
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.programs
@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__)
def test_bulk_and_half_closes_pass_both_ways(stack: contextlib.ExitStack, authority: Authority, start: Start) -> None:
    tunnel = start(stack, authority, stack.enter_context(Target()))
    with tunnel.session() as (visitor, service), ThreadPoolExecutor(1) as sender:
        assert_connected(visitor, service)
        for source, sink in ((visitor, service), (service, visitor)):
            sent = sender.submit(send_all, source)
            assert receive_all(sink) == BULK
            sent.result()
    for _ in range(20):
        tunnel.assert_works()
    assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")


def test_the_log_says_once_that_a_name_is_missing(stack: contextlib.ExitStack) -> None:
    url = "server://127.0.0.1:0/127.0.0.1:0?tls=1&log=info"
    run = stack.enter_context(by_public_api(Nodepass(url, url)))
    until(lambda: len(run.find("server.listening")) == 2)
    assert len(run.find("tls.public_api", level="info", missing=HIDDEN)) == 1


@pytest.mark.programs
def test_a_killed_client_never_makes_a_cut_stream_look_whole(stack: contextlib.ExitStack, authority: Authority) -> None:
    tunnel = both_ends(stack, authority, stack.enter_context(Target()))
    with tunnel.session() as (visitor, service):
        service.sendall(b"half of an ans")
        assert receive_exactly(visitor, 14) == b"half of an ans"
        tunnel.our_client.send(signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            receive_all(visitor)


@pytest.mark.programs
def test_a_flood_of_key_updates_ends_its_connection(stack: contextlib.ExitStack) -> None:
    target = stack.enter_context(Target())
    server = stack.enter_context(by_public_api(OurServer(1)))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    with connect(server.data_address) as peer:
        flood = key_updates(handshake(peer), FLOOD)
        used, memory = cpu_seconds(server.pid), resident_bytes(server.pid)
        with contextlib.suppress(ConnectionError):  # it may end while the flood is being sent
            peer.sendall(flood)
            receive_all(peer)
    assert cpu_seconds(server.pid) - used < LITTLE
    assert resident_bytes(server.pid) - memory < len(flood)
    Tunnel(server, client, target).assert_works()
    assert server.stop() == 0
