"""Peers of a server that speak TLS, in the ways that wire v2, wire v1 and others do, for tests inside this process."""

from __future__ import annotations

from contextlib import ExitStack

from gevent import socket
from OpenSSL import SSL

from nodepass.errors import TLSError
from nodepass.net.sockets import as_plain
from nodepass.tls.contexts import ALPN
from nodepass.tls.stream import TLSStream

V2 = (SSL.TLS1_3_VERSION, [ALPN])
V1: tuple[int, list[bytes]] = (SSL.TLS1_3_VERSION, [])
OLD_V1: tuple[int, list[bytes]] = (SSL.TLS1_2_VERSION, [])
OLD_V2 = (SSL.TLS1_2_VERSION, [ALPN])
OTHER = (SSL.TLS1_3_VERSION, [b"http/1.1"])


class SecurePeer:
    """A connection whose handshake is over, with the calls of a socket; a cut stream is an end like any other."""

    def __init__(self, stack: ExitStack, sock: socket.socket, kind: tuple[int, list[bytes]] = V2) -> None:
        """`kind`: the TLS version and the ALPN protocols. Raises TLSError."""
        version, protocols = kind
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_max_proto_version(version)
        if protocols:
            context.set_alpn_protos(protocols)
        connection = SSL.Connection(context, None)
        connection.set_connect_state()
        plain = as_plain(sock)
        plain.setblocking(False)
        self.stream = TLSStream(plain, connection)
        stack.callback(self.stream.close)
        self.stream.handshake()

    def sendall(self, data: bytes) -> None:
        self.stream.write(data)

    def recv(self, size: int) -> bytes:
        buffer = memoryview(bytearray(size))
        try:
            return bytes(buffer[: self.stream.recv_into(buffer)])
        except TLSError:
            return b""

    def close(self) -> None:
        self.stream.close()
