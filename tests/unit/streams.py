"""Connected pairs of streams on gevent's sockets, for tests that run inside this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gevent import socket

from nodepass.net.sockets import set_stream_options
from nodepass.net.stream import TCPStream


@contextmanager
def tcp_pair() -> Iterator[tuple[TCPStream, socket.socket]]:
    """A stream as the program sees it, and the peer's socket."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        peer = socket.create_connection(listener.getsockname())
        peer.settimeout(10)
        sock, _ = listener.accept()
    set_stream_options(sock)
    with peer, sock:
        yield TCPStream(sock), peer


def receive_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def reset(sock: socket.socket) -> None:
    """Close with a TCP reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
