"""UDP sockets: where an answer comes from, and what a connected socket receives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import gevent
import pytest
from gevent import socket

from nodepass.config.urls import Address
from nodepass.net import listen, udp
from nodepass.net.listen import close_all, listen_udp, port_of
from nodepass.net.sockets import Endpoint
from nodepass.net.udp import STRAYS_PER_TURN, AnyPort, ReplyAddress, dial_udp, receive_datagram, send_datagram
from tests.support.sockets import has_ipv6

needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> ExitStack:
    """Sockets are gevent's, as in the patched program."""
    for module in (listen, udp):
        monkeypatch.setattr(module, "socket", socket)
    return stack


def receiver(stack: ExitStack, host: str) -> Any:
    """A UDP socket of the program."""
    opened = listen_udp(Address(host, 0), "here")
    stack.callback(close_all, opened)
    return opened[0]


def speak(stack: ExitStack, sock: Any, host: str, payload: bytes = b"question") -> Any:
    """A peer that has sent a datagram to the receiver at this address, and takes answers from there only."""
    peer = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM))
    peer.settimeout(10)
    peer.connect((host, port_of([sock])))
    peer.send(payload)
    return peer


def test_a_send_that_must_not_wait_fails_where_the_socket_is_full(stack: ExitStack, tmp_path: Path) -> None:
    """As in a callback of the event loop. A Unix socket is full sooner than one of UDP."""
    sock, peer = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in range(2)]
    peer.bind(str(tmp_path / "peer"))
    peer_address = ReplyAddress(cast(Any, str(tmp_path / "peer")), ())
    done: list[OSError] = []

    def send_all() -> None:
        try:
            while True:
                send_datagram(sock, bytes(10_000), peer_address, blocking=False)
        except BlockingIOError as error:
            done.append(error)

    gevent.get_hub().loop.run_callback(send_all)
    gevent.sleep(0)
    assert len(done) == 1


@pytest.mark.parametrize(
    ("bound", "spoken_to"),
    [
        ("0.0.0.0", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.2"),
        pytest.param("", "127.0.0.2", marks=needs_ipv6),
        pytest.param("", "::1", marks=needs_ipv6),
        pytest.param("::1", "::1", marks=needs_ipv6),
    ],
)
def test_an_answer_comes_from_the_address_that_was_spoken_to(stack: ExitStack, bound: str, spoken_to: str) -> None:
    sock = receiver(stack, bound)
    peer = speak(stack, sock, spoken_to)
    payload, reply = receive_datagram(sock)
    assert payload == b"question"
    own = peer.getsockname()
    assert str(reply) == (f"[{own[0]}]:{own[1]}" if ":" in own[0] else f"{own[0]}:{own[1]}")
    assert reply.control
    send_datagram(sock, b"answer", reply)
    assert peer.recv(100) == b"answer"


def test_the_largest_datagram_arrives_whole(stack: ExitStack) -> None:
    sock = receiver(stack, "127.0.0.1")
    largest = bytes(range(256)) * 256
    speak(stack, sock, "127.0.0.1", largest[:65507])  # a datagram's 65,535 bytes without the headers of IP and UDP
    assert receive_datagram(sock)[0] == largest[:65507]


def test_control_data_that_is_cut_is_left_out_and_the_answer_still_goes(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock = receiver(stack, "127.0.0.1")
    peer = speak(stack, sock, "127.0.0.1")
    monkeypatch.setattr(udp, "_CONTROL", socket.CMSG_LEN(4))
    _, reply = receive_datagram(sock)
    assert reply.control == ()
    send_datagram(sock, b"answer", reply)
    assert peer.recv(100) == b"answer"


def test_a_connected_socket_receives_only_its_endpoints_datagrams(stack: ExitStack) -> None:
    target, other = receiver(stack, "127.0.0.1"), receiver(stack, "127.0.0.2")
    sock = stack.enter_context(dial_udp(Endpoint(socket.AF_INET, target.getsockname())))
    other.sendto(b"not for you", sock.getsockname())
    target.sendto(b"for you", sock.getsockname())
    assert sock.recv(100) == b"for you"


def test_a_refusal_is_an_error_of_a_connected_socket(stack: ExitStack) -> None:
    gone = receiver(stack, "127.0.0.1")
    sock = stack.enter_context(dial_udp(Endpoint(socket.AF_INET, gone.getsockname())))
    gone.close()
    sock.send(b"question")
    with pytest.raises(ConnectionRefusedError):
        sock.recv(100)


@pytest.mark.usefixtures("stack")
@pytest.mark.parametrize("dial", [dial_udp, AnyPort])
def test_an_endpoint_that_cannot_be_reached_is_an_error_at_once(dial: Callable[[Endpoint], object]) -> None:
    with pytest.raises(PermissionError):
        dial(Endpoint(socket.AF_INET, ("255.255.255.255", 1)))


def test_a_flood_of_other_hosts_neither_holds_up_the_loop_nor_lengthens_the_wait(stack: ExitStack) -> None:
    target, other = receiver(stack, "127.0.0.1"), receiver(stack, "127.0.0.2")
    sock = stack.enter_context(closing(AnyPort(Endpoint(socket.AF_INET, target.getsockname()))))
    sock.send(b"question")
    _, address = target.recvfrom(100)

    def flood() -> None:
        while True:
            for _ in range(2 * STRAYS_PER_TURN):
                other.sendto(b"stray", address)
            gevent.sleep(0)

    flooding = gevent.spawn(flood)
    stack.callback(flooding.kill)
    gevent.sleep(0)
    with pytest.raises(BlockingIOError):  # and others get their turn
        sock.recv(100)
    with pytest.raises(TimeoutError):
        sock.wait(0.1)


def test_a_socket_for_any_port_follows_the_one_that_answers_and_returns_to_the_first(stack: ExitStack) -> None:
    target, worker = receiver(stack, "127.0.0.1"), receiver(stack, "127.0.0.1")
    sock = stack.enter_context(closing(AnyPort(Endpoint(socket.AF_INET, target.getsockname()))))
    sock.send(b"question")
    _, address = target.recvfrom(100)
    receiver(stack, "127.0.0.2").sendto(b"of another host", address)
    worker.sendto(b"answer", address)
    assert sock.wait(10) == b"answer"
    sock.send(b"go on")
    assert worker.recv(100) == b"go on"
    worker.close()
    sock.send(b"lost")
    with pytest.raises(ConnectionRefusedError):
        sock.wait(10)
    with pytest.raises(BlockingIOError):  # the error is not reported for ever
        sock.recv(100)
    with pytest.raises(TimeoutError):
        sock.wait(0.05)  # and does not keep the socket readable
    sock.send(b"from the beginning")
    assert target.recv(100) == b"from the beginning"


def test_a_refusal_that_the_next_datagram_meets_is_an_error_and_it_is_sent_from_the_beginning(stack: ExitStack) -> None:
    target, worker = receiver(stack, "127.0.0.1"), receiver(stack, "127.0.0.1")
    sock = stack.enter_context(closing(AnyPort(Endpoint(socket.AF_INET, target.getsockname()))))
    sock.send(b"question")
    worker.sendto(b"answer", target.recvfrom(100)[1])
    assert sock.wait(10) == b"answer"
    worker.close()
    sock.send(b"lost")
    with pytest.raises(ConnectionRefusedError):
        sock.send(b"refused")
    sock.send(b"from the beginning")
    assert target.recv(100) == b"from the beginning"


def test_a_local_address_that_the_kernel_has_not_reported_is_unknown() -> None:
    assert udp.ReplyAddress(("192.0.2.1", 1), ()).local(80) == ("::", 80)
