"""TLS of wire v2 on pyOpenSSL, because the standard library's `ssl` has no exporter: contexts, and either end's stream.

The stream runs on memory BIOs, so that one thread may read while another one writes, and one direction may end.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import socket
import threading
from pathlib import Path

from cryptography import x509
from OpenSSL import SSL
from OpenSSL._util import lib

from tests.support.certificates import Certificate
from tests.support.sockets import abort
from tests.support.v1_stream import CHUNK, is_readable

ALPN = b"nodepass/2"
EXPORTER = b"EXPORTER-nodepass-2"
EXPORTED = 32
"""Bytes of the exporter."""

TLS_RECORDS = range(0x14, 0x18)
"""First bytes of an answer that is TLS."""

RECORD = 16384
"""Bytes of the largest record."""


class InTheClearError(ConnectionError):
    """The answer to a ClientHello was not TLS; none of it has been read."""


@functools.cache
def client_context(
    cafile: Path | None = None, alpn: tuple[bytes, ...] = (ALPN,), highest: int = SSL.TLS1_3_VERSION
) -> SSL.Context:
    """How a client does TLS; with a file of authorities it verifies the chain, and the stream the name.

    TLS 1.3 is the least unless the highest version is below that.
    """
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(min(SSL.TLS1_3_VERSION, highest))
    context.set_max_proto_version(highest)
    if alpn:
        context.set_alpn_protos(list(alpn))
    if cafile:
        context.load_verify_locations(str(cafile))
        context.set_verify(SSL.VERIFY_PEER)
    return context


@functools.cache
def server_context(certificate: Certificate) -> SSL.Context:
    """How the servers with this certificate do TLS; one of them resumes another's sessions."""
    return make_server_context(certificate)


def make_server_context(certificate: Certificate, alpn: bytes = ALPN, highest: int = SSL.TLS1_3_VERSION) -> SSL.Context:
    """How a server does TLS: a client that offers other protocols only gets the alert, one that offers none goes on."""
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(highest)
    context.use_certificate_chain_file(str(certificate.crt))
    context.use_privatekey_file(str(certificate.key))
    context.set_session_id(b"scripted")

    def select(_: SSL.Connection, offered: list[bytes]) -> bytes:
        if alpn not in offered:
            raise ConnectionError(f"offered {offered}")
        return alpn

    context.set_alpn_select_callback(select)
    return context


class SecureStream:
    """A stream inside TLS, after its handshake."""

    def __init__(
        self,
        sock: socket.socket,
        context: SSL.Context,
        *,
        is_server: bool = False,
        name: str = "",
        session: SSL.Session | None = None,
    ) -> None:
        """name: what the server's certificate must be for, where the context verifies. session: to be resumed."""
        self.sock = sock
        self.connection = SSL.Connection(context)
        self._state = threading.Lock()
        self._writing = threading.Lock()
        self._received = b""
        self._ended = False
        if is_server:
            self.connection.set_accept_state()
        else:
            self._begin(name, session)
        self._handshake()
        if name and context.get_verify_mode() != SSL.VERIFY_NONE:
            check_name(self.connection, name)

    def _begin(self, name: str, session: SSL.Session | None) -> None:
        self.connection.set_connect_state()
        if session:
            self.connection.set_session(session)
        if name and not is_address(name):
            self.connection.set_tlsext_host_name(name.encode())
        with contextlib.suppress(SSL.WantReadError):
            self.connection.do_handshake()
        self._flush()
        first = self.sock.recv(1, socket.MSG_PEEK)
        if first and first[0] not in TLS_RECORDS:
            raise InTheClearError(f"answered in the clear: {first!r}")

    def _handshake(self) -> None:
        while True:
            try:
                self.connection.do_handshake()
            except SSL.WantReadError:
                self._flush()
                self._feed()
            except (SSL.Error, ConnectionError) as error:
                self._flush()  # the alert that says why
                raise ConnectionError(f"no TLS: {error}") from error
            else:
                self._flush()
                return self._decrypt()

    def _flush(self) -> None:
        with contextlib.suppress(SSL.WantReadError):
            while True:
                self.sock.sendall(self.connection.bio_read(CHUNK))

    def _feed(self) -> None:
        data = self.sock.recv(CHUNK)
        if not data:
            raise ConnectionError("the stream was cut without a close_notify")
        self.connection.bio_write(data)

    def _decrypt(self) -> None:
        try:
            while not self._ended:
                self._received += self.connection.recv(RECORD)
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self._ended = True
        except SSL.Error as error:
            raise ConnectionError(f"TLS failed: {error}") from error

    @property
    def channel(self) -> str:
        """X: the exporter in hex."""
        return self.connection.export_keying_material(EXPORTER, EXPORTED).hex()

    @property
    def alpn(self) -> bytes:
        """The protocol that both ends agreed on, or nothing."""
        return self.connection.get_alpn_proto_negotiated()

    @property
    def version(self) -> str:
        """The version of TLS."""
        return self.connection.get_protocol_version_name()

    @property
    def is_resumed(self) -> bool:
        """Whether an earlier session was resumed."""
        return bool(lib.SSL_session_reused(self.connection._ssl))

    def session(self) -> SSL.Session | None:
        """What a later connection may resume, once a ticket has been read."""
        return self.connection.get_session()

    def peer_certificate(self) -> x509.Certificate | None:
        """What the server has shown."""
        return self.connection.get_peer_certificate(as_cryptography=True)

    def read_available(self) -> bytes | None:
        """What one read of the socket brings, if nothing has been left from before; None at the end of the stream."""
        if not self._received and not self._ended:
            data = self.sock.recv(CHUNK)
            with self._state:
                if not data:
                    raise ConnectionError("the stream was cut without a close_notify")
                self.connection.bio_write(data)
                self._decrypt()
        data, self._received = self._received, b""
        return None if self._ended and not data else data

    @property
    def has_data(self) -> bool:
        """Whether `read_available` would return at once without a look at the socket."""
        return bool(self._received) or self._ended

    def recv(self, size: int) -> bytes:
        while not (data := self.read_available()):
            if data is None:
                return b""
        data, self._received = data[:size], data[size:]
        return data

    def send(self, data: bytes) -> None:
        with self._writing:
            for start in range(0, len(data), RECORD):
                with self._state:
                    try:
                        self.connection.sendall(data[start : start + RECORD])
                    except SSL.Error as error:  # this end has been ended meanwhile
                        raise ConnectionError(f"TLS: {error}") from None
                self._send_encrypted()

    def _send_encrypted(self) -> None:
        while True:
            with self._state:
                try:
                    encrypted = self.connection.bio_read(CHUNK)
                except SSL.WantReadError:
                    return
            self.sock.sendall(encrypted)

    def end(self) -> None:
        with self._writing:
            with self._state, contextlib.suppress(SSL.Error):
                self.connection.shutdown()
            self._send_encrypted()

    def is_readable(self) -> bool:
        return self.has_data or is_readable(self.sock)

    def is_ended(self) -> bool:
        """Whether an idle stream has been closed; only while no other thread reads it."""
        while not self.has_data and is_readable(self.sock):
            try:
                with self._state:
                    self._feed()
                    self._decrypt()
            except OSError:
                self._ended = True
        return self._ended and not self._received

    def abort(self) -> None:
        """Close with a close_notify, unless a write is stuck."""
        if self._writing.acquire(blocking=False):
            try:
                with self._state, contextlib.suppress(OSError, SSL.Error):
                    self.connection.shutdown()
                    self.sock.send(self.connection.bio_read(CHUNK), socket.MSG_DONTWAIT)
            finally:
                self._writing.release()
        abort(self.sock)


def is_address(name: str) -> bool:
    """Whether a name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def check_name(connection: SSL.Connection, name: str) -> None:
    """Raise ConnectionError where the server's certificate is for other names."""
    shown = connection.get_peer_certificate(as_cryptography=True)
    assert shown
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    if name not in names.get_values_for_type(x509.DNSName) + addresses:
        raise ConnectionError(f"the certificate is not for {name}")
