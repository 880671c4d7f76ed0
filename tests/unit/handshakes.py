"""TLS handshakes between the two ends of a socket pair, each in a greenlet of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import gevent
from OpenSSL import SSL

from nodepass.net.sockets import Socket
from nodepass.tls.certificates import load_pair
from nodepass.tls.contexts import server_context
from nodepass.tls.stream import TLSStream, accept_tls, connect_tls
from nodepass.tls.verify import Expected
from tests.support.certificates import Authority

HOST = "tunnel.example"
PATIENCE = 10.0
"""Seconds for a handshake; it takes milliseconds."""


def context_for(authority: Authority, *names: str) -> SSL.Context:
    leaf = authority.issue(*names)
    identity = load_pair(str(leaf.crt), str(leaf.key))
    return server_context(identity.chain, identity.key)


@contextmanager
def socket_pair() -> Iterator[tuple[Socket, Socket]]:
    ends = []
    for end in socket.socketpair():
        sock = Socket(end.family, end.type, end.proto, end.detach())
        sock.setblocking(False)
        ends.append(sock)
    with closing(ends[0]), closing(ends[1]), gevent.Timeout(PATIENCE):
        yield ends[0], ends[1]


@contextmanager
def connected(accept: Callable[[Socket], Any], connect: Callable[[Socket], Any]) -> Iterator[tuple[Any, Any]]:
    """What both ends return; what either raises is in its place."""

    def attempt(end: Callable[[Socket], Any], sock: Socket) -> Any:
        try:
            return end(sock)
        except OSError as error:
            sock.close()
            return error

    with socket_pair() as (near, far):
        both = gevent.spawn(attempt, accept, near), gevent.spawn(attempt, connect, far)
        gevent.joinall(both, raise_error=True)
        results = both[0].value, both[1].value
        yield results
        for stream in results:
            if isinstance(stream, TLSStream):
                stream.close()


@contextmanager
def handshake(server: SSL.Context, expected: Expected, v2: bool = True) -> Iterator[tuple[Any, Any]]:
    """The server's end and the client's."""
    with connected(lambda sock: accept_tls(sock, server), lambda sock: connect_tls(sock, expected, v2)) as ends:
        yield ends
