"""The kernel's buffers of sessions: what each session gets of a limit, on real sockets."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from nodepass.net.sockets import Socket
from nodepass.tunnel import buffers
from nodepass.tunnel.buffers import LEAST, LEAST_SIZES, KernelBuffers
from tests.unit.streams import tcp_pair

MIB = 1 << 20
OPTIONS = (socket.SO_RCVBUF, socket.SO_SNDBUF)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connections(stack: ExitStack) -> tuple[Socket, Socket]:
    """Those of one session."""
    streams = [stack.enter_context(tcp_pair())[0] for _ in range(2)]
    return streams[0].sock, streams[1].sock


def sizes(pair: tuple[Socket, Socket]) -> list[int]:
    return [sock.getsockopt(socket.SOL_SOCKET, option) for sock in pair for option in OPTIONS]


def limited(left: int) -> KernelBuffers:
    limited = KernelBuffers()
    limited.limit(left)
    return limited


def test_without_a_limit_the_kernel_sizes_the_buffers(stack: ExitStack) -> None:
    pair = connections(stack)
    before = sizes(pair)
    with KernelBuffers().share(*pair):
        assert sizes(pair) == before


def test_with_plenty_left_the_kernel_sizes_the_buffers_and_what_they_can_take_is_reserved(stack: ExitStack) -> None:
    pair, free = connections(stack), limited(1 << 40)
    before = sizes(pair)
    with free.share(*pair):
        assert sizes(pair) == before
        assert free.left == (1 << 40) - 2 * (buffers._largest("tcp_rmem") + buffers._largest("tcp_wmem"))
    assert free.left == 1 << 40


def test_with_nothing_left_a_session_gets_the_least(stack: ExitStack) -> None:
    pair, none = connections(stack), limited(0)
    with none.share(*pair):
        assert sizes(pair) == 2 * [LEAST_SIZES[option] for option in OPTIONS]
        assert sum(sizes(pair)) == LEAST
        assert none.left == 0
    assert none.left == 0


def test_sessions_never_get_more_than_there_is_and_give_it_back(stack: ExitStack) -> None:
    size = 8 * MIB
    tight = limited(size)
    pairs = [connections(stack) for _ in range(40)]
    with ExitStack() as sessions:
        for pair in pairs:
            before = tight.left
            sessions.enter_context(tight.share(*pair))
            assert before is not None
            assert tight.left is not None
            assert tight.left == before - (sum(sizes(pair)) - LEAST)
            assert 0 <= tight.left <= before
        assert tight.left < size // 2
        last = sum(sizes(pairs[-1]))
    assert tight.left == size
    with tight.share(*pairs[0]):
        assert sum(sizes(pairs[0])) > last
