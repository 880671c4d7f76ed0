"""Sessions in every TLS mode and with v1 peers: no byte lost or reordered, ends and resets passed on.

Also datagrams, one in and one back, of every allowed size: in one file the tunnels of all kinds are started once.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading

import pytest

from tests.e2e.conftest import TunnelFactory, every_pair
from tests.support.sockets import (
    connect,
    datagram_socket,
    format_address,
    free_port,
    is_closed_both_ways,
    is_over,
    is_silent,
    receive_all,
    receive_exactly,
    reset,
)
from tests.support.tunnel import BRISK, CALM, OurClient, OurServer, Tunnel, assert_connected

MEGABYTE = 1 << 20
BLOCKS = [random.Random(number).randbytes(MEGABYTE) for number in range(7)]
"""Blocks in a cycle that no power of two divides, so that a block in the wrong place changes the hash."""


class Transfer:
    """A direction of a session in two threads: one sends and ends the stream, one receives to the end."""

    def __init__(self, source: socket.socket, sink: socket.socket, megabytes: int) -> None:
        self._source, self._sink, self._megabytes = source, sink, megabytes
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self.size = 0
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            for number in range(self._megabytes):
                block = BLOCKS[number % len(BLOCKS)]
                self.sent.update(block)
                self._source.sendall(block)
            self._source.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._sink.recv(1 << 18):
                self.received.update(data)
                self.size += len(data)

    def check(self) -> None:
        """Wait for the end and compare what arrived with what was sent."""
        for thread in self._threads:
            thread.join()
        assert self.size == self._megabytes * MEGABYTE
        assert self.received.digest() == self.sent.digest()


def transfer_both_ways(tunnel: Tunnel, megabytes: int) -> None:
    with tunnel.session() as (visitor, service):
        directions = Transfer(visitor, service, megabytes), Transfer(service, visitor, megabytes)
        for direction in directions:
            direction.check()


def test_a_visitor_talks_to_the_service(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        assert_connected(visitor, service)


def test_the_service_may_speak_first(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        service.sendall(b"220 ready\r\n")
        assert receive_exactly(visitor, 11) == b"220 ready\r\n"


def test_more_sessions_than_the_pool_holds_follow_each_other(any_tunnel: Tunnel) -> None:
    for _ in range(40):
        any_tunnel.assert_works()


def test_many_sessions_are_open_at_once(any_tunnel: Tunnel) -> None:
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connect(any_tunnel.visitor_address)) for _ in range(60)]
        services = [stack.enter_context(any_tunnel.target.accept()) for _ in visitors]
        for number, visitor in enumerate(visitors):
            visitor.sendall(b"%04d" % number)
        for service in services:
            service.sendall(receive_exactly(service, 4))
        for number, visitor in enumerate(visitors):
            assert receive_exactly(visitor, 4) == b"%04d" % number


@every_pair
def test_a_half_close_passes_in_both_directions(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        visitor.sendall(b"question")
        visitor.shutdown(socket.SHUT_WR)
        assert receive_all(service) == b"question"
        service.sendall(b"answer")
        assert receive_exactly(visitor, 6) == b"answer"
        service.sendall(b", and the rest")
        service.shutdown(socket.SHUT_WR)
        assert receive_all(visitor) == b", and the rest"


def test_a_service_that_ends_first_still_hears_the_visitor(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        service.sendall(b"goodbye")
        service.shutdown(socket.SHUT_WR)
        assert receive_all(visitor) == b"goodbye"
        for _ in range(3):
            assert_one_way(visitor, service)
        visitor.shutdown(socket.SHUT_WR)
        assert receive_all(service) == b""


def assert_one_way(source: socket.socket, sink: socket.socket) -> None:
    source.sendall(b"still here")
    assert receive_exactly(sink, 10) == b"still here"


def test_a_visitor_that_ends_at_once_is_told_the_answer(any_tunnel: Tunnel) -> None:
    with connect(any_tunnel.visitor_address) as visitor:
        visitor.shutdown(socket.SHUT_WR)
        with any_tunnel.target.accept() as service:
            assert receive_all(service) == b""
            service.sendall(b"answer")
        assert receive_all(visitor) == b"answer"


def test_a_reset_by_the_visitor_reaches_the_service(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        reset(visitor)
        assert is_closed_both_ways(service)


def test_a_reset_by_the_service_reaches_the_visitor(any_tunnel: Tunnel) -> None:
    with any_tunnel.session() as (visitor, service):
        assert_connected(visitor, service)
        reset(service)
        assert is_closed_both_ways(visitor)


def test_a_reset_is_never_taken_for_an_end_of_stream(our_tunnel: Tunnel) -> None:
    """Else a visitor would take half an answer for a whole one."""
    for end in (0, 1):
        with our_tunnel.session() as ends:
            assert_connected(*ends)
            reset(ends[end])
            with pytest.raises(ConnectionResetError):
                ends[1 - end].recv(1)


@every_pair
def test_megabytes_pass_both_ways_at_once_with_any_peer(any_tunnel: Tunnel) -> None:
    transfer_both_ways(any_tunnel, 5)


def test_50_megabytes_pass_both_ways_at_once_unharmed(our_tunnel: Tunnel) -> None:
    transfer_both_ways(our_tunnel, 50)


def test_a_reader_that_pauses_loses_nothing_and_holds_up_nobody(our_tunnel: Tunnel) -> None:
    block = BLOCKS[0] * 16
    with our_tunnel.session() as (visitor, service):
        writer = threading.Thread(target=lambda: service.sendall(block))
        writer.start()
        receive_exactly(visitor, 1000)
        our_tunnel.assert_works()
        assert receive_exactly(visitor, len(block) - 1000) == block[1000:]
        writer.join()


@pytest.mark.programs
def test_a_session_may_stay_silent_for_many_heartbeats(tunnel: TunnelFactory) -> None:
    brisk = tunnel(1, server_env=BRISK, client_env=BRISK)
    with brisk.session() as (visitor, service):
        assert is_silent(visitor, 1.0)
        assert is_silent(service, 0.1)
        assert_connected(visitor, service)


def test_a_visitor_is_closed_when_the_service_refuses(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(OurServer())
    absent = ("127.0.0.1", free_port())
    client = stack.enter_context(OurClient(server.tunnel_address, absent))
    client.wait_until_connected()
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError), connect(server.visitor_address) as visitor:
            assert is_over(visitor)
    client.wait_for("target.unreachable", target=format_address(absent), reason="unreachable")


@pytest.mark.programs
def test_the_limit_of_sessions_makes_visitors_wait_and_drops_none(tunnel: TunnelFactory) -> None:
    limited = tunnel(server_env={**CALM, "SEMAPHORE_LIMIT": "2"})
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connect(limited.visitor_address)) for _ in range(4)]
        for number, visitor in enumerate(visitors):
            visitor.sendall(b"%d" % number)
        first, second = (stack.enter_context(limited.target.accept()) for _ in range(2))
        heard = {receive_exactly(first, 1), receive_exactly(second, 1)}
        with pytest.raises(TimeoutError):
            limited.target.accept(timeout=0.3)
        for end in (first, second, *(visitors[int(number)] for number in heard)):
            end.close()
        for _ in range(2):
            heard.add(receive_exactly(stack.enter_context(limited.target.accept()), 1))
    assert heard == {b"0", b"1", b"2", b"3"}


@pytest.mark.parametrize("tls", [pytest.param(0, marks=pytest.mark.programs), 1])
def test_descriptors_of_ended_sessions_are_given_back(tunnel: TunnelFactory, tls: int) -> None:
    fixed = {**CALM, "MAX_POOL_CAPACITY": "16"}  # a pool that grew would hold more afterwards
    started = tunnel(tls, server_env=fixed, client_env=fixed)
    started.assert_works()
    before = [run.settled_descriptors() for run in (started.our_server, started.our_client)]
    for _ in range(20):
        with started.session() as (visitor, service):
            assert_connected(visitor, service)
            reset(visitor)
            assert is_over(service)
    for run, count in zip((started.our_server, started.our_client), before, strict=True):
        run.wait_for_descriptors(count)


@pytest.mark.parametrize(("tls", "victim"), [(0, "server"), pytest.param(1, "client", marks=pytest.mark.programs)])
def test_a_killed_process_never_makes_a_cut_stream_look_whole(tunnel: TunnelFactory, tls: int, victim: str) -> None:
    started = tunnel(tls)
    with started.session() as (visitor, service):
        assert_connected(visitor, service)
        (started.our_server if victim == "server" else started.our_client).kill()
        for end in (visitor, service):
            with pytest.raises(ConnectionResetError):
                end.recv(1)


# Datagrams

SIZES = (1, 100, 999, 1000, 1200, 1400, 4096, 8192)


@every_pair
def test_a_datagram_of_any_size_passes_exactly(any_tunnel: Tunnel) -> None:
    for size in SIZES:
        question, answer = random.Random(size).randbytes(size), random.Random(-size).randbytes(size)
        assert any_tunnel.exchange(question, answer) == (question, answer)


def test_many_visitors_each_get_their_own_answer(any_tunnel: Tunnel) -> None:
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(datagram_socket()) for _ in range(32)]
        for number, visitor in enumerate(visitors):
            visitor.sendto(b"question %d" % number, any_tunnel.visitor_address)
        for _ in visitors:
            question, client = any_tunnel.target.udp.recvfrom(100)
            any_tunnel.target.udp.sendto(question.replace(b"question", b"answer"), client)
        for number, visitor in enumerate(visitors):
            assert visitor.recv(100) == b"answer %d" % number


def test_a_visitor_may_ask_again_and_again(any_tunnel: Tunnel) -> None:
    with datagram_socket() as visitor:
        for number in range(20):
            visitor.sendto(b"%d" % number, any_tunnel.visitor_address)
            question, client = any_tunnel.target.udp.recvfrom(100)
            any_tunnel.target.udp.sendto(question * 2, client)
            assert visitor.recv(100) == b"%d" % number * 2


def test_the_answer_comes_from_the_address_that_was_asked(any_tunnel: Tunnel) -> None:
    with datagram_socket() as visitor:
        visitor.connect(any_tunnel.visitor_address)
        visitor.send(b"question")
        _, client = any_tunnel.target.udp.recvfrom(100)
        any_tunnel.target.udp.sendto(b"answer", client)
        assert visitor.recv(100) == b"answer"


def test_tcp_and_udp_share_one_address(our_tunnel: Tunnel) -> None:
    with our_tunnel.session() as (visitor, service):
        assert our_tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
        visitor.sendall(b"tcp")
        visitor.shutdown(socket.SHUT_WR)
        assert service.recv(10) == b"tcp"
    with connect(our_tunnel.visitor_address), our_tunnel.target.accept():
        pass
