"""UDP sessions of wire v1: one datagram there, one answer back, on a data connection of their own.

The wire has no length, so a datagram is what one read returns; a large one that arrives in pieces is waited for a
moment. One that is longer than allowed is dropped and said so, never cut.
"""

from __future__ import annotations

import contextlib
import socket

import gevent

from nodepass.errors import ProtocolError
from nodepass.net.stream import Stream

SPLIT_FROM = 1000  # bytes: a first read of at least so many may be the beginning of a datagram (Go's first TLS records)
REST_WITHIN = 0.005  # seconds for the next piece
ANSWER_GRACE = 1.0  # seconds beyond UDP_READ_TIMEOUT that the server waits, so that the client's verdict arrives first


def read_datagram(stream: Stream, largest: int, timeout: float) -> bytes:
    """The datagram that a peer wrote; empty where it closed without one.

    Raises TimeoutError after `timeout` seconds, ProtocolError where there are more than `largest` bytes.
    """
    buffer = memoryview(bytearray(largest + 1))
    with gevent.Timeout(timeout, TimeoutError(f"no datagram within {timeout:g}s")):
        size = received = stream.recv_into(buffer)
    while received and SPLIT_FROM <= size <= largest:
        received = 0
        with contextlib.suppress(TimeoutError), gevent.Timeout(REST_WITHIN, TimeoutError()):
            received = stream.recv_into(buffer[size:])
        size += received
    if size > largest:
        raise ProtocolError(f"a datagram of {size} bytes or more is larger than UDP_DATA_BUF_SIZE ({largest})")
    return bytes(buffer[:size])


def ask_target(sock: socket.socket, question: bytes, largest: int, timeout: float) -> bytes:
    """The target's one answer on a connected socket.

    Raises TimeoutError after `timeout` seconds, ConnectionRefusedError where nobody listens, ProtocolError where the
    answer is longer than `largest` bytes.
    """
    sock.settimeout(timeout)
    sock.send(question)
    try:
        answer = sock.recv(65536)
    except TimeoutError:
        raise TimeoutError(f"the target gave no answer within {timeout:g}s") from None
    if len(answer) > largest:
        raise ProtocolError(f"an answer of {len(answer)} bytes is larger than UDP_DATA_BUF_SIZE ({largest})")
    return answer
