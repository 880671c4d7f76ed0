"""A connection inside TLS to an https:// proxy, as a socket: so that everything else takes it for a plain connection.

The tunnel's own TLS runs inside the proxy's, and all that handles connections has a socket of the kernel: options,
TCP_INFO, splice. So there are two sockets of this machine, connected to each other. One is returned, and a relay moves
the bytes between the other one and the proxy's TLS. It costs a greenlet, two sockets and another pass over the bytes,
for https:// proxies only. They are sockets of TCP, because a cut stream must end in a reset, which a Unix socket lacks.

A proxy may keep its side open when the connection here is over, and a proxy that has vanished never ends it. So a
bridge has the deadlines of sessions: it ends when either of its two connections is gone, or takes no bytes any more.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from gevent.socket import wait_read

from nodepass.net.deadlines import Deadlines
from nodepass.net.relay import relay
from nodepass.net.sockets import Endpoint, Socket, dial, set_stream_options
from nodepass.net.stream import Stream, TCPStream
from nodepass.stats import Stats

_HERE = Endpoint(socket.AF_INET, ("127.0.0.1", 0))
_TRIES = 16  # connections of others that may come to the listener before ours
_PROBE_EVERY = 60.0  # seconds: a socket that was closed answers probes for as long, if its peer has not closed
_uncounted = Stats()  # the bytes are counted where they are payload
_deadlines = Deadlines(idle=0, first_byte=0, data_is_near=True)


def open_bridge(stream: Stream, spawn: Callable[..., object], timeout: float) -> Socket:
    """A socket whose bytes go through the stream, which belongs to the bridge from now on. Raises OSError.

    `spawn`: runs a function in a greenlet of this name, whose owner ends it.
    """
    near, far = _connected_pair(timeout)
    # The proxy's stream is the near one: what followed the proxy's answer in a record is read from it at once.
    spawn("relay to the proxy", relay, stream, TCPStream(far), _uncounted, None, _deadlines)
    return near


def _connected_pair(timeout: float) -> tuple[Socket, Socket]:
    """Two sockets connected to each other, and to no other process of this machine. Raises OSError."""
    listener = Socket(_HERE.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(_HERE.sockaddr)
        listener.listen(_TRIES)
        near = dial([Endpoint(_HERE.family, listener.getsockname())], timeout)
        try:
            return near, _accept_from(listener, near.getsockname(), timeout)
        except BaseException:
            near.close()
            raise
    finally:
        listener.close()


def _accept_from(listener: Socket, peer: object, timeout: float) -> Socket:
    """The connection that comes from this socket; those of other processes are closed. Raises OSError."""
    for _ in range(_TRIES):
        wait_read(listener.fileno(), timeout, TimeoutError(errno.ETIMEDOUT, "no connection within this machine"))
        descriptor, source = listener._accept()  # type: ignore[attr-defined]  # below socket.accept
        sock = Socket(fileno=descriptor)
        if source == peer:
            sock.setblocking(False)
            set_stream_options(sock, _PROBE_EVERY)
            return sock
        sock.close()
    raise OSError(errno.ECONNABORTED, "other processes connect to a socket of this one")
