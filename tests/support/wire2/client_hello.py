"""What a TLS ClientHello shows to everybody on the path: read from its bytes, without a TLS library."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

HANDSHAKE = 0x16
HEADER = 5
"""Bytes of a record's header."""

ALPN, EARLY_DATA, PSK, PSK_MODES, VERSIONS, SERVER_NAME = 16, 42, 41, 45, 43, 0
TLS_1_3 = b"\x03\x04"
PSK_WITH_KEY_EXCHANGE = b"\x01"


@dataclass(frozen=True)
class ClientHello:
    """The extensions of a ClientHello by their number."""

    extensions: dict[int, bytes]

    @property
    def protocols(self) -> list[bytes]:
        """The protocols of ALPN."""
        return split(self.extensions.get(ALPN, b"\0\0")[2:])

    @property
    def versions(self) -> list[bytes]:
        """The versions of TLS."""
        listed = self.extensions.get(VERSIONS, b"\0")[1:]
        return [listed[at : at + 2] for at in range(0, len(listed), 2)]

    @property
    def psk_modes(self) -> bytes:
        """Ways to resume a session."""
        return self.extensions.get(PSK_MODES, b"\0")[1:]

    @property
    def offers_session(self) -> bool:
        """Whether a session is to be resumed."""
        return PSK in self.extensions

    @property
    def has_early_data(self) -> bool:
        """Whether data is sent before the handshake is done."""
        return EARLY_DATA in self.extensions


def split(names: bytes) -> list[bytes]:
    """Strings that have a byte of length each."""
    found = []
    while names:
        found.append(names[1 : 1 + names[0]])
        names = names[1 + names[0] :]
    return found


def peek(sock: socket.socket) -> ClientHello:
    """The ClientHello that a connection begins with, without taking it. Raises ConnectionError."""
    header = peek_exactly(sock, HEADER)
    assert header[0] == HANDSHAKE, f"not TLS: {header!r}"
    return parse(peek_exactly(sock, HEADER + int.from_bytes(header[3:], "big"))[HEADER:])


def peek_exactly(sock: socket.socket, size: int) -> bytes:
    """The first bytes of a connection, without taking them."""
    data = sock.recv(size, socket.MSG_PEEK | socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError(f"the connection ended after {len(data)} of {size} bytes")
    return data


def parse(message: bytes) -> ClientHello:
    """The handshake message of a ClientHello taken apart."""
    assert message[0] == 1, "not a ClientHello"
    at = 4 + 2 + 32
    at += 1 + message[at]  # legacy session id
    at += 2 + int.from_bytes(message[at : at + 2], "big")  # cipher suites
    at += 1 + message[at]  # compression methods
    end = at + 2 + int.from_bytes(message[at : at + 2], "big")
    at += 2
    extensions = {}
    while at < end:
        kind, size = struct.unpack_from(">HH", message, at)
        extensions[kind] = message[at + 4 : at + 4 + size]
        at += 4 + size
    return ClientHello(extensions)
