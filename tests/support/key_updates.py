"""A TLS 1.3 client that changes its keys again and again, and asks the other end for the same (RFC 8446, 4.6.3).

No library does that by the thousand, so the records are made here, from the secret that OpenSSL tells of a connection
that it has set up.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import islice

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

KEY_UPDATE = b"\x18\0\0\1\1"
"""The message: its type, its length, and that the other end is to do likewise."""

HANDSHAKE = b"\x16"
TAG = 16
"""Bytes that the cipher adds."""


def handshake(sock: socket.socket) -> bytes:
    """Set up TLS 1.3 on a connection, which has no timeout afterwards; the client's first secret for data."""
    sock.settimeout(None)
    lines: list[bytes] = []
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_alpn_protos([b"nodepass/2"])
    context.set_keylog_callback(lambda _connection, line: lines.append(line))
    connection = SSL.Connection(context, sock)
    connection.set_connect_state()
    connection.do_handshake()
    assert "_AES_" in str(connection.get_cipher_name())
    return next(bytes.fromhex(line.split()[2].decode()) for line in lines if line.startswith(b"CLIENT_TRAFFIC_SECRET"))


def key_updates(secret: bytes, number: int) -> bytes:
    """So many records in a row, each under the keys that the one before has led to."""
    return b"".join(islice(_records(secret), number))


def _records(secret: bytes) -> Iterator[bytes]:
    message = KEY_UPDATE + HANDSHAKE
    header = b"\x17\3\3" + (len(message) + TAG).to_bytes(2, "big")
    while True:
        size = 16 if len(secret) == SHA256.digest_size else 32  # TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384
        key, nonce = _expand(secret, b"key", size), _expand(secret, b"iv", 12)  # for record 0, the only one
        yield header + AESGCM(key).encrypt(nonce, message, header)
        secret = _expand(secret, b"traffic upd", len(secret))


def _expand(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label without a context."""
    label = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
    algorithm = SHA256() if len(secret) == SHA256.digest_size else SHA384()
    return HKDFExpand(algorithm, length, info).derive(secret)
