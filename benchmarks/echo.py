"""The target of the scenes with small messages: sends back what it gets, by TCP and UDP on one port.

Run as `python -m benchmarks.echo PORT`. One thread, one epoll, no work per message but the system calls.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys

BACKLOG = 8192  # connections; the hold scene opens thousands at once
CHUNK = 65536  # bytes of one read; also larger than any datagram
BURST = 64  # accepts or datagrams in a row before the other sockets get their turn


def bind(kind: socket.SocketKind, port: int) -> socket.socket:
    """Return a non-blocking socket on the loopback port."""
    bound = socket.socket(type=kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    bound.setblocking(False)
    return bound


def answer_datagrams(datagrams: socket.socket) -> None:
    """Send back the datagrams that are waiting."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(BURST):
            payload, sender = datagrams.recvfrom(CHUNK)
            datagrams.sendto(payload, sender)


def accept_all(listener: socket.socket, poller: select.epoll, streams: dict[int, socket.socket]) -> None:
    """Take in the connections that are waiting."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(BURST):
            stream, _ = listener.accept()
            stream.setblocking(False)
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            streams[stream.fileno()] = stream
            poller.register(stream, select.EPOLLIN)


def answer_stream(stream: socket.socket) -> bool:
    """Send back what can be read now; returns False when the stream is over."""
    try:
        chunk = stream.recv(CHUNK)
        if chunk and chunk[0]:  # zeros are a flood's, and only swallowed
            stream.send(chunk)  # the scenes send single bytes: never more than fits
    except BlockingIOError:
        return True
    except OSError:
        return False
    return bool(chunk)


def serve(port: int) -> None:
    """Echo until the process is ended."""
    datagrams = bind(socket.SOCK_DGRAM, port)
    listener = bind(socket.SOCK_STREAM, port)
    listener.listen(BACKLOG)
    streams: dict[int, socket.socket] = {}
    poller = select.epoll()
    poller.register(datagrams, select.EPOLLIN)
    poller.register(listener, select.EPOLLIN)
    while True:
        for number, _ in poller.poll():
            if number == datagrams.fileno():
                answer_datagrams(datagrams)
            elif number == listener.fileno():
                accept_all(listener, poller, streams)
            elif not answer_stream(streams[number]):
                streams.pop(number).close()  # closing takes it out of the epoll too


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(int(sys.argv[1]))
