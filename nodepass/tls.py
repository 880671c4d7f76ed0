"""TLS on data connections: contexts for both ends, the handshakes, and `TLSStream`.

This module, `certificates` and `verification` alone import OpenSSL and cryptography, and are imported only when TLS is
on: that costs 10 MB. OpenSSL works on memory BIOs and a patched plain socket does the I/O, so waiting suspends the
greenlet only. pyOpenSSL's errors become `TLSError`s here, and nothing above knows it.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, cast

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate
from OpenSSL import SSL
from OpenSSL.crypto import X509

from nodepass.errors import ConfigError, TLSError, VerificationError
from nodepass.net import reset
from nodepass.verification import Expected, is_ip

BATCH = 65536  # bytes per read from the kernel and per write to it; 256 KiB was slower
RECORD = 16384  # bytes of payload in one TLS record, at most
RECORD_OVERHEAD = 64  # bytes that TLS adds to a record, at most
_CIPHERS_12 = b"ECDHE+AESGCM:ECDHE+CHACHA20"
# AES-128 first: as safe as anything here needs, and the cheapest per byte.
_CIPHERS_13 = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

PrivateKey = EllipticCurvePrivateKey | Ed448PrivateKey | Ed25519PrivateKey | RSAPrivateKey


class TLSStream:
    """A connection under TLS, with the methods of `net.Stream`. One greenlet reads and one writes at a time."""

    __slots__ = ("_connection", "_raw", "sock")

    batch = BATCH

    def __init__(self, sock: socket.socket, connection: SSL.Connection) -> None:
        self.sock = sock
        self._raw: socket.socket = cast(Any, sock)._sock
        self._connection = connection

    def recv_into(self, buffer: memoryview) -> int:
        while True:
            received = self._decrypt(buffer)
            if received is not None:
                return received
            data = self.sock.recv(BATCH)
            if not data:
                raise TLSError("the connection ended without TLS close_notify: the stream is cut")
            self._connection.bio_write(data)

    def write(self, data: memoryview | bytes) -> None:
        sent, size = 0, len(data)
        try:
            while sent < size:  # all of it before the first switch: the buffer may be shared
                sent += self._connection.send(data[sent:] if sent else data)
        except SSL.Error as error:
            raise _translated(error) from None
        self._flush(size)

    def half_close(self) -> None:
        try:
            self._connection.shutdown()
        except SSL.Error as error:
            raise _translated(error) from None
        self._flush(0)

    def peek(self) -> bool | None:
        try:
            while True:
                try:
                    return bool(self._connection.recv(1, socket.MSG_PEEK))
                except SSL.WantReadError:
                    data = self._raw.recv(BATCH)
                    if not data:
                        return False
                    self._connection.bio_write(data)
        except BlockingIOError:
            return None
        except (OSError, SSL.Error):
            return False

    def close(self) -> None:
        self.sock.close()

    def abort(self) -> None:
        reset(self.sock)

    def handshake(self) -> None:
        """Complete the handshake; its deadline is the caller's. Raises OSError, TLSError among them."""
        while True:
            try:
                self._connection.do_handshake()
                self._flush(0)
                return
            except SSL.WantReadError:
                self._flush(0)
            except SSL.Error as error:
                self._flush(0)  # the alert that tells the peer why
                raise _translated(error) from None
            data = self.sock.recv(BATCH)
            if not data:
                raise TLSError("the peer closed the connection during the TLS handshake")
            self._connection.bio_write(data)

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Fill the buffer with the records at hand; 0 at the peer's close_notify, None when more must be read."""
        done, size = 0, len(buffer)
        try:
            while done < size:
                done += self._connection.recv_into(buffer[done:], min(RECORD, size - done))
        except SSL.ZeroReturnError:
            return done
        except SSL.WantReadError:
            return done or None
        except SSL.Error as error:
            raise _translated(error) from None
        return done

    def _flush(self, payload: int) -> None:
        """Send the records that OpenSSL made of so many bytes of payload."""
        size = payload + (payload // RECORD + 1) * RECORD_OVERHEAD + RECORD
        try:
            while True:
                records = self._connection.bio_read(size)
                self.sock.sendall(records)
                if len(records) < size:
                    return
        except SSL.WantReadError:
            return


def server_context(chain: Sequence[Certificate], key: PrivateKey) -> SSL.Context:
    """A context for a server with this certificate, leaf first, then its issuers. A new one needs a new context.

    Raises ConfigError where OpenSSL will not have them.
    """
    context = _context()
    try:
        context.use_certificate(chain[0])
        for issuer in chain[1:]:
            context.add_extra_chain_cert(issuer)
        context.use_privatekey(key)
    except SSL.Error as error:  # too weak a key, for one
        raise ConfigError(f"the certificate cannot be used: {_translated(error)}") from None
    # A data connection is never resumed, so tickets would be bytes and work for nothing.
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    return context


def client_context(verify: bool) -> SSL.Context:
    """A context for a client; with `verify`, chains are checked against SSL_CERT_FILE or the system's CAs."""
    context = _context()
    if verify:
        context.set_default_verify_paths()
    return context


def accept_tls(sock: socket.socket, context: SSL.Context) -> TLSStream:
    """The server's side of a handshake. Raises OSError, TLSError among them; closing `sock` is the caller's."""
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    stream = TLSStream(sock, connection)
    stream.handshake()
    return stream


def connect_tls(sock: socket.socket, context: SSL.Context, expected: Expected) -> TLSStream:
    """The client's side of a handshake. Raises OSError.

    A VerificationError among them says whether the chain, the name or the fingerprint was refused. The server hears of
    it in the handshake, so it never takes a refused connection for a ready one.
    """
    connection = SSL.Connection(context, None)
    connection.set_connect_state()
    if not is_ip(expected.host):
        connection.set_tlsext_host_name(expected.host.encode("idna"))
    refusals: list[str] = []

    def judge(_connection: SSL.Connection, certificate: X509, error: int, depth: int, ok: int) -> bool:
        refusal = expected.refuses_chain(error if not ok else 0)
        if not refusal and depth == 0:
            refusal = expected.refuses_leaf(certificate)
        if refusal:
            refusals.append(refusal)
        return not refusal

    if expected.verify or expected.fingerprint:
        connection.set_verify(SSL.VERIFY_PEER, judge)
    stream = TLSStream(sock, connection)
    try:
        stream.handshake()
    except TLSError:
        if refusals:
            raise VerificationError(f"certificate {refusals[0]}") from None
        raise
    return stream


def _context() -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(_CIPHERS_12)
    context.set_tls13_ciphersuites(_CIPHERS_13)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    return context


def _translated(error: SSL.Error) -> TLSError:
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return TLSError(f"TLS: {queue[-1][-1] if queue else error.args[-1] if error.args else type(error).__name__}")
