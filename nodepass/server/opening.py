"""What a new connection says first, by which a server tells what it is (docs/protocol.md).

The first byte says whether a line in the clear or a TLS handshake follows; inside TLS, ALPN and again the first line.
Total silence is wire v1, which waits for the server to speak. What follows from it is decided by `control_listener` for
the tunnel port and by `data_listener` for the data port; the deadline is theirs, too.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import gevent

from nodepass.errors import ClosedError, OtherProtocolError, ProtocolError, RefusedError
from nodepass.net.sockets import Socket, peek_byte, peek_bytes
from nodepass.net.stream import Stream, TCPStream, read_only_line
from nodepass.wire.lines import MAX_OPENING, PROXY_PROTOCOL, RECOGNIZED, recognize
from nodepass.wire.negotiation import NO_TLS, SLASH, TLS_HANDSHAKE, VERSION, DataHello, Hello, StartTLS, parse_first

if TYPE_CHECKING:
    from nodepass.tls.certificates import ServerCertificate

_CLEAR_HERE = (
    "the client began with TLS, and this server does not use it (tls=0); where the client has a key, set the same here,"
    " else tls=1 or tls=2"
)
SILENCE_OF_V1_DATA = 0.01  # seconds: a v1 client's data connection says nothing, every other one begins at once


class Opening:
    """A new connection, and what it has said; `read` again where it was silent."""

    def __init__(self, sock: Socket, certificate: ServerCertificate | None) -> None:
        """`certificate` is None where the server does not use TLS."""
        self.stream: Stream = TCPStream(sock)
        self.said: Hello | DataHello | None = None
        self.line = b""  # its text
        self.version = 1  # of the wire, as far as it is known
        self.is_silent = True
        self._sock = sock
        self._certificate = certificate

    @property
    def secured(self) -> bool:
        """Whether it is under TLS."""
        return not self.stream.plain

    @property
    def may_be_told(self) -> bool:
        """Whether a line with an error can be read: where TLS has been asked for, nothing more follows in the clear."""
        return self.is_silent or self.secured or not self._certificate

    def wait(self, seconds: float) -> None:
        """Wait so long for the first byte."""
        with contextlib.suppress(TimeoutError), gevent.Timeout(seconds, TimeoutError()):
            self.stream.wait_readable()

    def read(self, has_line: bool = True) -> None:
        """Find out what the connection is. Without `has_line` a v2 connection under TLS says nothing inside.

        Raises OSError: RefusedError where the peer is told why, ProtocolError where it is not.
        """
        first = peek_byte(self._sock)
        if first is None:
            return
        self.is_silent = False
        if first == TLS_HANDSHAKE:
            self._secure(has_line)
        elif first == SLASH:
            self._read_in_the_clear()
        elif first < 0:
            raise ClosedError("closed by the peer before it said anything")
        else:
            raise self._name_other(first)

    def _name_other(self, first: int) -> ProtocolError:
        """The error about first bytes that no version of the wire begins with."""
        protocol = recognize(peek_bytes(self._sock, RECOGNIZED))
        if not protocol:
            return ProtocolError(f"first byte {first:#04x}: neither a line of wire v2 nor TLS")
        words = f"it speaks {protocol}, and this port is for a nodepass client; visitors connect to the target address"
        if protocol == PROXY_PROTOCOL:
            words += ", and ACCEPT_PROXY names proxies"
        return OtherProtocolError(protocol, words)

    def _read_in_the_clear(self) -> None:
        self._read_line()
        if not self._certificate:
            return
        if not isinstance(self.said, Hello):
            raise ProtocolError("a data connection in the clear, and this server uses TLS")
        self.stream.write(StartTLS().encode())
        self.said, self.version = None, 1  # what was said in the clear counts for nothing
        self._secure(has_line=True)
        if not self.said:
            raise ProtocolError("TLS without ALPN behind a hello in the clear")

    def _secure(self, has_line: bool) -> None:
        if not self._certificate:
            raise RefusedError(NO_TLS, _CLEAR_HERE)
        from nodepass.tls.contexts import ALPN
        from nodepass.tls.stream import accept_tls

        stream = self.stream = accept_tls(self._sock, self._certificate.context)
        if stream.alpn != ALPN:
            return  # none: a data connection of wire v1
        if stream.version != "TLSv1.3":
            raise RefusedError(VERSION, f"the client speaks wire v2 under {stream.version}; allowed: TLSv1.3")
        self.version = 2
        if has_line:
            self._read_line()

    def _read_line(self) -> None:
        self.version = 2
        self.line = read_only_line(self.stream, MAX_OPENING)
        self.said = parse_first(self.line)
