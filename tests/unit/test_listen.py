"""Listeners: what is opened for an address, what an error leaves behind, and how connections are accepted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import gevent
import pytest
from gevent import socket

from nodepass.config.kinds import Ports
from nodepass.config.urls import Address
from nodepass.errors import ListenError
from nodepass.log import Log
from nodepass.net import listen, sockets
from nodepass.net.activation import Inherited, PassedSocket
from nodepass.net.listen import (
    ACCEPT_PAUSES,
    ACCEPTS_PER_TURN,
    CHOICES,
    accept_forever,
    accept_waiting,
    close_all,
    listen_both,
    listen_in_range,
    listen_tcp,
    listen_udp,
    port_of,
)
from nodepass.net.sockets import PROBES, Endpoint, wait_readable
from tests.support.sockets import free_port, has_ipv6

HOST = "127.0.0.1"
OTHER = "127.0.0.2"
needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")

Sockets = list[Any]  # the standard library's for the program, gevent's here


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> ExitStack:
    """Sockets are gevent's, as in the patched program."""
    monkeypatch.setattr(sockets, "socket", socket)
    monkeypatch.setattr(listen, "socket", socket)
    return stack


def closed_by(stack: ExitStack, opened: Sockets) -> Sockets:
    stack.callback(close_all, opened)
    return opened


def one(stack: ExitStack, host: str = HOST) -> Any:
    """A listener on a free port."""
    return closed_by(stack, listen_tcp(Address(host, 0), "here"))[0]


def occupy(stack: ExitStack, port: int = 0, host: str = HOST, kind: int = socket.SOCK_STREAM) -> int:
    """Bind a port, so that nothing else can listen on it."""
    sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
    sock.bind((host, port))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return port_of([sock])


def is_free(port: int, host: str = HOST, kind: int = socket.SOCK_STREAM) -> bool:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def connect(stack: ExitStack, listener: Any, host: str = HOST) -> Any:
    peer = stack.enter_context(socket.create_connection((host, port_of([listener])), 10))
    peer.settimeout(10)
    return peer


def resolve_to(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Have every name resolve to these IPv4 addresses."""

    def resolve(address: Address) -> list[Endpoint]:
        return [Endpoint(socket.AF_INET, (host, address.port)) for host in hosts]

    monkeypatch.setattr(listen, "resolve", resolve)


# Opening


@needs_ipv6
def test_an_empty_host_is_one_listener_for_both_families(stack: ExitStack) -> None:
    opened = closed_by(stack, listen_tcp(Address("", 0), "here"))
    assert len(opened) == 1
    accepted = accept_forever(opened[0], Log("test"))
    for host in (HOST, "::1"):
        peer = connect(stack, opened[0], host)
        sock, endpoint = next(accepted)
        sock.close()
        assert endpoint.host == host  # IPv4 as IPv4
        assert endpoint.sockaddr[1] == peer.getsockname()[1]


@needs_ipv6
def test_a_host_of_one_family_leaves_the_port_free_for_the_other(stack: ExitStack) -> None:
    port = free_port()
    closed_by(stack, listen_tcp(Address("::1", port), "here"))
    closed_by(stack, listen_tcp(Address(HOST, port), "here"))
    with pytest.raises(ListenError):
        listen_tcp(Address("::1", port), "here")


def test_a_name_is_listened_on_at_all_its_addresses_with_one_port(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, HOST, OTHER, HOST)
    opened = closed_by(stack, listen_tcp(Address("name", 0), "here"))
    assert [each.getsockname() for each in opened] == [(HOST, port_of(opened)), (OTHER, port_of(opened))]


def test_an_address_that_this_machine_lacks_is_left_out_beside_one_that_it_has(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, HOST, "192.0.2.1")
    assert len(closed_by(stack, listen_tcp(Address("name", 0), "here"))) == 1
    resolve_to(monkeypatch, "192.0.2.1")
    with pytest.raises(ListenError) as caught:
        listen_tcp(Address("name", 0), "here")
    assert caught.value.errno == errno.EADDRNOTAVAIL


@pytest.mark.parametrize("opener", [listen_tcp, listen_udp])
def test_an_error_closes_what_was_opened_before_it_and_keeps_its_errno(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, opener: Callable[[Address, str], Sockets]
) -> None:
    kind = socket.SOCK_STREAM if opener is listen_tcp else socket.SOCK_DGRAM
    port = occupy(stack, free_port(), host=OTHER, kind=kind)
    resolve_to(monkeypatch, HOST, OTHER)
    with pytest.raises(
        ListenError, match=f"^cannot listen on the place name:{port}: Address already in use$"
    ) as caught:
        opener(Address("name", port), "the place")
    assert caught.value.errno == errno.EADDRINUSE
    assert is_free(port, HOST, kind)


def test_a_name_that_cannot_be_resolved_is_an_error_that_names_it() -> None:
    with pytest.raises(
        ListenError, match=r"cannot listen on here nowhere\.invalid:0: cannot resolve 'nowhere\.invalid'"
    ):
        listen_tcp(Address("nowhere.invalid", 0), "here")


@pytest.mark.parametrize(("keepalive", "seconds"), [(15.0, 15), (0.2, 1), (1e6, 32767)])
def test_accepted_connections_inherit_keepalive_and_no_delay(stack: ExitStack, keepalive: float, seconds: int) -> None:
    listener = closed_by(stack, listen_tcp(Address(HOST, 0), "here", keepalive=keepalive))[0]
    connect(stack, listener)
    sock, _ = next(accept_forever(listener, Log("test")))
    options = (socket.TCP_NODELAY, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert tuple(sock.getsockopt(socket.IPPROTO_TCP, each) for each in options) == (1, seconds, seconds, PROBES)
    sock.close()


# TCP and UDP on one port


def test_both_protocols_get_one_port_also_where_the_kernel_chooses_it(stack: ExitStack) -> None:
    listeners, datagrams = listen_both(Address(HOST, 0), "here")
    closed_by(stack, [*listeners, *datagrams])
    assert listeners[0].getsockname() == datagrams[0].getsockname()
    assert port_of(listeners)


@pytest.mark.parametrize(("tcp", "udp"), [(True, False), (False, True)])
def test_a_protocol_that_is_off_is_not_opened(stack: ExitStack, tcp: bool, udp: bool) -> None:
    port, kind = free_port(), socket.SOCK_DGRAM if tcp else socket.SOCK_STREAM  # one that no other program is given
    listeners, datagrams = listen_both(Address(HOST, port), "here", tcp=tcp, udp=udp)
    closed_by(stack, [*listeners, *datagrams])
    assert (len(listeners), len(datagrams)) == (tcp, udp)
    occupy(stack, port, kind=kind)


def test_a_connection_that_is_closed_unserved_is_reset(stack: ExitStack) -> None:
    listeners, datagrams = listen_both(Address(HOST, 0), "here")
    closed_by(stack, [*listeners, *datagrams])
    peer = connect(stack, listeners[0])
    next(accept_forever(listeners[0], Log("test")))[0].close()
    with pytest.raises(ConnectionResetError):
        peer.recv(1)


def test_a_port_that_is_taken_for_udp_is_an_error_and_is_given_back_for_tcp(stack: ExitStack) -> None:
    port = occupy(stack, free_port(), kind=socket.SOCK_DGRAM)
    with pytest.raises(ListenError, match=f"here \\(udp\\) {HOST}:{port}: Address already in use") as caught:
        listen_both(Address(HOST, port), "here")
    assert caught.value.errno == errno.EADDRINUSE
    assert is_free(port)


@pytest.mark.parametrize("failures", [1, CHOICES])
def test_where_the_kernel_chooses_a_port_that_is_taken_for_udp_another_is_tried(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    taken: list[int] = []

    def listen_udp_or_not(address: Address, *args: Any) -> Sockets:
        if len(taken) < failures:
            taken.append(occupy(stack, address.port, kind=socket.SOCK_DGRAM))
        return closed_by(stack, listen_udp(address, *args))

    monkeypatch.setattr(listen, "listen_udp", listen_udp_or_not)
    if failures < CHOICES:
        listeners, _ = listen_both(Address(HOST, 0), "here")
        closed_by(stack, listeners)
        assert port_of(listeners) not in taken
    else:
        with pytest.raises(ListenError):
            listen_both(Address(HOST, 0), "here")
    assert len(taken) == failures
    assert all(is_free(port) for port in taken)


# A range of ports


def neighbours(count: int) -> list[int]:
    """Ports in a row that are all free for TCP."""
    for first in range(20000, 30000, count):
        ports = list(range(first, first + count))
        if all(map(is_free, ports)):
            return ports
    raise AssertionError("no ports in a row are free")


def test_the_first_free_port_of_a_range_is_taken(stack: ExitStack) -> None:
    first, second, third = neighbours(3)
    occupy(stack, first)
    for port in (second, third):
        assert port_of(closed_by(stack, listen_in_range(HOST, Ports(first, third), "here"))) == port
    with pytest.raises(ListenError, match=f"{HOST}:{third}: Address already in use"):
        listen_in_range(HOST, Ports(first, third), "here")


def test_a_name_that_cannot_be_resolved_is_not_looked_up_for_each_port_of_a_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookups = []

    def resolve(address: Address) -> list[Endpoint]:
        lookups.append(address.port)
        raise OSError("no such name")

    monkeypatch.setattr(listen, "resolve", resolve)
    with pytest.raises(ListenError, match="no such name"):
        listen_in_range("name", Ports(1, 9), "here")
    assert lookups == [1]


def test_a_port_that_was_passed_is_taken_before_the_first_free_one(stack: ExitStack) -> None:
    first, second = neighbours(2)
    with socket.create_server((HOST, second)) as passed:
        share = Inherited([PassedSocket("a.socket", passed)]).share()
        assert (
            port_of(closed_by(stack, listen_in_range(HOST, Ports(first, second), "here", share.of("data")))) == second
        )


def test_a_socket_that_is_named_after_another_role_is_left_alone_and_named_in_the_error(stack: ExitStack) -> None:
    passed = stack.enter_context(socket.create_server((HOST, 0)))
    address = Address(HOST, port_of([passed]))
    share = Inherited([PassedSocket("cat", passed)], roles=("cat", "dog")).share()
    with pytest.raises(ListenError, match=f"in use; systemd passed {HOST}:{address.port} \\(tcp, cat\\), which is not"):
        listen_tcp(address, "here", share.of("dog"))
    taken = closed_by(stack, listen_tcp(Address(HOST, 0), "here", share.of("cat")))
    assert port_of(taken) == address.port


# Accepting


class Trouble:
    """Has `accept` fail with these errors, one after the other, and then go well; notes the pauses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: int) -> None:
        self.pauses: list[float] = []
        self.errors = list(errors)
        accept = listen._accept

        def accept_or_not(listener: Any) -> Any:
            if self.errors:
                number = self.errors.pop(0)
                raise OSError(number, os.strerror(number))
            return accept(listener)

        monkeypatch.setattr(listen, "_accept", accept_or_not)
        monkeypatch.setattr(gevent, "sleep", self.pauses.append)


class Lines(Log):
    """Notes what is logged."""

    def __init__(self) -> None:
        super().__init__("test")
        self.fields: list[dict[str, object]] = []

    def warning(self, event: str, sentence: str, /, limit: object = None, **fields: object) -> None:
        assert (event, sentence) == ("accept.failed", "cannot accept connections: %(error)s")
        assert limit
        self.fields.append(fields)


def test_pauses_after_accept_errors_double_to_a_limit_and_start_again_after_a_success(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, log = one(stack), Lines()
    trouble = Trouble(monkeypatch, *[errno.EMFILE] * 10)
    accepted = accept_forever(listener, log)
    connect(stack, listener)
    next(accepted)[0].close()
    first, longest = ACCEPT_PAUSES
    assert trouble.pauses == [min(first * 2**number, longest) for number in range(10)]
    assert trouble.pauses[-2:] == [longest, longest]
    assert log.fields == [{"error": os.strerror(errno.EMFILE), "errno": errno.EMFILE}] * 10
    trouble.pauses.clear()
    trouble.errors = [errno.ENFILE]
    connect(stack, listener)
    next(accepted)[0].close()
    assert trouble.pauses == [first]


def test_a_peer_that_is_gone_before_it_is_accepted_costs_neither_a_pause_nor_a_line(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, log = one(stack), Lines()
    trouble = Trouble(monkeypatch, *[errno.ECONNABORTED] * 3)
    connect(stack, listener)
    next(accept_forever(listener, log))[0].close()
    assert not trouble.errors
    assert not trouble.pauses
    assert not log.fields


def test_accepting_ends_when_the_listener_is_closed_meanwhile(stack: ExitStack) -> None:
    listener = one(stack)
    running = gevent.spawn(list, accept_forever(listener, Log("test")))
    gevent.idle()
    assert not running.ready()
    listener.close()
    assert running.get() == []


def test_accepting_ends_when_the_listener_is_closed_between_two_connections(stack: ExitStack) -> None:
    listener = one(stack)
    accepted = accept_forever(listener, Log("test"))
    connect(stack, listener)
    next(accepted)[0].close()
    listener.close()
    assert list(accepted) == []


def test_nothing_is_accepted_before_the_caller_is_ready(stack: ExitStack) -> None:
    listener, ready = one(stack), gevent.event.Event()
    connect(stack, listener)
    running = gevent.spawn(next, accept_forever(listener, Log("test"), ready.wait))
    gevent.idle()
    assert not running.ready()
    ready.set()
    running.get()[0].close()


def test_a_flood_of_connections_lets_other_greenlets_run_every_few_accepts(stack: ExitStack) -> None:
    listener, rounds = one(stack), 5
    for _ in range(rounds * ACCEPTS_PER_TURN):
        connect(stack, listener)
    busy, peer = socket.socketpair()
    peer.send(b"!")
    turns: list[int] = []
    count = 0

    def look() -> None:
        while True:
            wait_readable(busy)
            turns.append(count)

    with busy, peer:
        looking = gevent.spawn(look)
        wait_readable(listener)
        turns.clear()
        accepted = accept_forever(listener, Log("test"))
        for count in range(1, rounds * ACCEPTS_PER_TURN + 1):  # noqa: B007
            next(accepted)[0].close()
        looking.kill()
    assert len(turns) == rounds - 1
    assert {later - earlier for earlier, later in pairwise(turns)} == {ACCEPTS_PER_TURN}


def test_connections_that_wait_are_accepted_before_a_listener_is_closed_and_no_more_is_waited_for(
    stack: ExitStack,
) -> None:
    listener = one(stack)
    peers = [connect(stack, listener) for _ in range(3)]
    asked: list[int] = []
    accepted = list(accept_waiting(listener, lambda: asked.append(1)))
    assert [peer.sockaddr for _, peer in accepted] == [peer.getsockname() for peer in peers]
    assert len(asked) == len(peers) + 1
    for sock, _ in accepted:
        sock.close()
    listener.close()
    assert list(accept_waiting(listener, lambda: None)) == []
