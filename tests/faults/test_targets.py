"""A service that refuses, hangs, resets or never reads, and readers slower than writers: back-pressure end to end."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.proc import cpu_seconds, resident_bytes
from tests.support.sockets import Address, connect, format_address, free_port, is_over
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Pair, Tunnel, open_tunnel

QUIET = 0.5
"""Seconds without progress after which a stream is taken to stand still."""

HOPS = 3
"""TCP connections between a writer and a reader."""


MEMORY = 8 << 20
"""Bytes that one stream may cost a process."""


@contextlib.contextmanager
def hanging() -> Iterator[Address]:
    """An address where nobody answers: a listener whose queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address: Address = listener.getsockname()
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(address)
        yield address


@pytest.mark.programs
def test_visitors_of_a_target_that_hangs_are_closed_in_time_and_hold_up_nobody(stack: contextlib.ExitStack) -> None:
    """The second tunnel of the same client has a target that works."""
    env = {**CALM, "HANDSHAKE_TIMEOUT": "1s"}
    address, target = stack.enter_context(hanging()), stack.enter_context(Target())
    servers = [stack.enter_context(OurServer(env=env)) for _ in range(2)]
    dead, alive = (
        stack.enter_context(OurClient(server.tunnel_address, to, env=env))
        for server, to in zip(servers, (address, target.address), strict=True)
    )
    for client in (dead, alive):
        client.wait_until_connected()
    visitors = [stack.enter_context(connect(servers[0].visitor_address)) for _ in range(50)]
    began = time.monotonic()
    Tunnel(servers[1], alive, target).assert_works()
    assert all(map(is_over, visitors))
    assert time.monotonic() - began < 10
    assert dead.find("target.unreachable", level="warn", reason="timeout", target=format_address(address))
    assert len(dead.find("target.unreachable")) <= 2 + (time.monotonic() - began)


def test_visitors_of_a_target_that_refuses_are_reset_at_once(stack: contextlib.ExitStack) -> None:
    """Long before HANDSHAKE_TIMEOUT, and so that nobody takes it for an empty answer; a line a second says why."""
    server = stack.enter_context(OurServer())
    absent = ("127.0.0.1", free_port())
    client = stack.enter_context(OurClient(server.tunnel_address, absent))
    client.wait_until_connected()
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(ConnectionResetError), connect(server.visitor_address) as visitor:
            visitor.recv(1)
    passed = time.monotonic() - began
    assert passed < 5
    lines = client.find("target.unreachable", level="warn", reason="unreachable", target=format_address(absent))
    assert 1 <= len(lines) <= 2 + passed


@pytest.mark.programs
def test_visitors_of_a_target_that_resets_are_reset_and_the_next_is_served(
    stack: contextlib.ExitStack, authority: Authority
) -> None:
    tunnel = stack.enter_context(open_tunnel(Pair("ours", "ours", 0), authority))
    for _ in range(20):
        mark = tunnel.our_client.mark()
        with tunnel.session() as (visitor, service):
            tunnel.our_client.wait_for("target.connected", after=mark)  # else it is a dial that fails
            service.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            service.close()
            with pytest.raises(ConnectionResetError):
                visitor.recv(1)
    tunnel.assert_works()


def in_the_way() -> int:
    """Bytes that the kernel's buffers between a writer and a reader may take at most, with one more to spare."""
    limits = (Path(f"/proc/sys/net/ipv4/tcp_{end}").read_text().split()[2] for end in ("rmem", "wmem"))
    return (HOPS + 1) * sum(map(int, limits))


def pour(sink: socket.socket, data: bytes) -> int:
    """Send until it stands still; how many bytes that were."""
    limit, sent, since = in_the_way(), 0, time.monotonic()
    sink.setblocking(False)
    while time.monotonic() - since < QUIET:
        try:
            sent += sink.send(data[sent % len(data) :])
            since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
        assert sent < limit, "no back-pressure"
    return sent


@pytest.mark.programs
@pytest.mark.parametrize("tls", [0, 1])
@pytest.mark.parametrize("writer", ["visitor", "target"])
def test_a_reader_that_does_not_read_holds_up_its_writer_and_nobody_else(
    stack: contextlib.ExitStack, authority: Authority, writer: str, tls: int
) -> None:
    """What the writer gets rid of is what the kernel's buffers hold; the processes keep next to nothing."""
    tunnel = stack.enter_context(open_tunnel(Pair("ours", "ours", tls), authority))
    tunnel.assert_works()
    runs = tunnel.our_server, tunnel.our_client
    visitor, service = stack.enter_context(tunnel.session())
    fast, slow = (visitor, service) if writer == "visitor" else (service, visitor)
    memory = [resident_bytes(run.pid) for run in runs]
    data = bytes(range(256)) * 4096 + b"odd"
    sent = pour(fast, data)
    assert all(resident_bytes(run.pid) < before + MEMORY for run, before in zip(runs, memory, strict=True))
    used = [cpu_seconds(run.pid) for run in runs]
    for _ in range(5):
        tunnel.assert_works()
    time.sleep(QUIET)
    assert all(cpu_seconds(run.pid) - before < QUIET / 2 for run, before in zip(runs, used, strict=True)), "it spins"
    fast.shutdown(socket.SHUT_WR)
    received, digest = 0, hashlib.sha256()
    while part := slow.recv(1 << 20):
        received += len(part)
        digest.update(part)
    assert received == sent
    whole, rest = divmod(sent, len(data))
    assert digest.digest() == hashlib.sha256(data * whole + data[:rest]).digest()
