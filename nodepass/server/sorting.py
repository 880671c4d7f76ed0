"""One port for control and data connections (`DATA_PORT=tunnel`): a newcomer is sorted by its first bytes."""

from __future__ import annotations

import socket
import time

import gevent

from nodepass.wire.signals import DATA_PREFIX, TLS_RECORD

FIRST_BYTES_WITHIN = 0.25  # seconds; silence is a control connection of wire v1
_STEP = 0.005  # seconds between looks at a beginning that is not yet long enough


def is_data_connection(sock: socket.socket) -> bool:
    """Whether a newcomer is a data connection; what marks it as one is read, anything else stays to be read.

    Raises OSError.
    """
    deadline = time.monotonic() + FIRST_BYTES_WITHIN
    begin = b""
    while (left := deadline - time.monotonic()) > 0:
        begin = _peek(sock, left)
        if begin == DATA_PREFIX:
            sock.recv(len(DATA_PREFIX))
            return True
        if not begin or not DATA_PREFIX.startswith(begin):
            break
        gevent.sleep(_STEP)
    return begin.startswith(TLS_RECORD)


def _peek(sock: socket.socket, timeout: float) -> bytes:
    """The first bytes, as many as are here; none in silence or at the end of the stream."""
    sock.settimeout(timeout)
    try:
        return sock.recv(len(DATA_PREFIX), socket.MSG_PEEK)
    except TimeoutError:
        return b""
    finally:
        sock.settimeout(None)
