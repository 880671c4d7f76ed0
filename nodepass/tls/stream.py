"""TLS on control and data connections: the handshakes of both ends, and `TLSStream`.

Servers and clients import this room only when TLS is on: OpenSSL takes 10 MB. OpenSSL works on memory BIOs (`bio`) and
the kernel's non-blocking socket does the I/O, so waiting suspends the greenlet only. Errors of pyOpenSSL become
`TLSError`s here; no other room sees them.

Wire v2 is TLS 1.3 with the ALPN protocol `ALPN`. Wire v1 has no ALPN and allows TLS 1.2. A server's context serves
both: what a connection speaks is known after its handshake, and the caller decides what to do with it.

A client may resume a session of TLS 1.3, which saves the certificate and its verification: a resumed handshake calls no
verification callback. So a `Session` knows for which host it was verified, and is offered for no other demand. There is
always a new key exchange (psk_dhe_ke, the default of OpenSSL), so each connection has its own exporter, and never early
data. `sessions` keeps them.
"""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

from gevent.socket import wait_read
from OpenSSL import SSL
from OpenSSL.crypto import X509

from nodepass.errors import (
    CertificateRefusedError,
    ClearAnswer,
    OtherProtocolError,
    ProtocolError,
    TLSError,
    VerificationError,
)
from nodepass.net.sockets import Socket
from nodepass.net.stream import Data, SocketStream
from nodepass.tls.bio import BATCH, RECORD, RECORD_OVERHEAD, inbox, open_records
from nodepass.tls.contexts import ALPN, client_context, refused, translated
from nodepass.tls.verify import Expected, Rejection, Verify, is_ip
from nodepass.wire.lines import RECOGNIZED, recognize
from nodepass.wire.negotiation import SLASH, TLS_RECORDS, answers_in
from nodepass.wire.signals import BYES, CERTIFICATE

EXPORTER_LABEL = b"EXPORTER-nodepass-2"
EXPORTER_LENGTH = 32  # bytes

_REFUSED = re.compile(r"alert (?:unknown ca|.*\bcertificate)")  # alerts about a certificate, in OpenSSL's words
FEEDS = 8  # reads from the kernel in a row that bring no payload: key updates, tickets, alerts
_TLS_13 = "TLSv1.3"


class TLSStream(SocketStream):
    """A connection under TLS.

    A client's has what its handshake brought. `rejection`: why the certificate is rejected, where it was looked at.
    `verified_for`: the host for which chain and name are right; "" where they are not, or were not looked at.
    `resumed`: whether a session was resumed, with its verdict.
    """

    __slots__ = ("_connection", "_records", "rejection", "resumed", "verified_for")

    batch = BATCH
    plain = False

    def __init__(self, sock: Socket, connection: SSL.Connection) -> None:
        super().__init__(sock)
        self._connection = connection
        self._records = open_records(connection)
        self.rejection: Rejection | None = None
        self.verified_for = ""
        self.resumed = False

    @property
    def alpn(self) -> bytes:
        """The ALPN protocol that both ends agreed on; b"" where there is none."""
        return self._connection.get_alpn_proto_negotiated()

    @property
    def version(self) -> str:
        """The TLS version, as OpenSSL names it."""
        return self._connection.get_protocol_version_name()

    @property
    def group(self) -> str:
        """The group of the key exchange; "" where pyOpenSSL cannot tell, before its version 26.0."""
        get_name = getattr(self._connection, "get_group_name", None)
        return (get_name() or "") if get_name else ""

    @property
    def speaks_v2(self) -> bool:
        """Whether the handshake allows wire v2."""
        return self.alpn == ALPN and self.version == _TLS_13

    def exporter(self) -> bytes:
        """32 bytes that both ends of this connection know and no end of another connection. Raises TLSError."""
        try:
            return self._connection.export_keying_material(EXPORTER_LABEL, EXPORTER_LENGTH)
        except SSL.Error as error:
            raise translated(error) from None

    def session(self) -> Session | None:
        """The session that a client's later connection may resume; None under TLS 1.2.

        It can be resumed once payload has been read, which the server's tickets come before, and for as long as this
        connection is open or its end was sent: OpenSSL forgets the session of a connection that was cut.
        """
        handle = self._connection.get_session() if self.version == _TLS_13 else None
        return Session(handle, self._connection.get_context(), self.verified_for) if handle else None

    @property
    def pending(self) -> bool:
        return self._records.unread

    def read(self, buffer: memoryview) -> int:
        records = self._records
        for _ in range(FEEDS):
            if records.unread and (received := self._decrypt(buffer)) is not None:
                return received
            size = self._receive(len(buffer))
            if size > RECORD:
                records.lend(size)
            else:
                records.feed(size)
        received = self._decrypt(buffer)
        if received is None:
            raise BlockingIOError  # others get their turn, then the event loop calls again
        return received

    def send(self, data: Data) -> Data:
        try:
            self._records.encrypt(data)
        except SSL.Error as error:
            raise translated(error) from None
        return self._send_records()

    def end(self) -> Data:
        try:
            self._connection.shutdown()
        except SSL.Error as error:
            raise translated(error) from None
        return self._send_records()

    def peek(self) -> bool | None:
        try:
            for _ in range(FEEDS):
                try:
                    return bool(self._connection.recv(1, socket.MSG_PEEK))
                except SSL.WantReadError:
                    if not self._records.go_on():
                        self._records.feed(self._receive(RECORD))
            return False  # no well-behaved peer sends so much without payload
        except BlockingIOError:
            return None
        except (OSError, SSL.Error):
            return False

    def close(self) -> None:
        self._records.close()
        super().close()

    def handshake(self, is_server: bool = False) -> None:
        """Complete the handshake; its deadline is the caller's. Raises OSError, TLSError among them."""
        while True:
            try:
                self._connection.do_handshake()
                # Under TLS 1.3 a server has only tickets left to send. They go with its first payload, which saves it a
                # system call, and the client a wait.
                if not is_server or self.version != _TLS_13:
                    self._flush()
                self._records.finish_handshake()
                self._records.shrink()
                return
            except SSL.WantReadError:
                self._flush()
                if self._records.go_on():
                    continue
            except SSL.Error as error:
                self._flush()  # the alert that tells the peer why
                raise translated(error) from None
            self._records.feed(self._receive_flight())

    def wait_for_answer(self) -> None:
        """Send the ClientHello and look at the first byte of the answer before OpenSSL does.

        Raises ClearAnswer where a line in the clear begins, which is left in the socket; else OSError.
        """
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            self._flush()
        first = self._peek_raw()
        if first and first[0] == SLASH:
            raise ClearAnswer("the server answered the ClientHello in the clear")
        if first and first[0] not in TLS_RECORDS:
            if protocol := recognize(first):
                raise OtherProtocolError(protocol, answers_in(protocol))
            first = first[:1]
            raise ProtocolError(f"the server's answer to the ClientHello begins with {first!r}: neither TLS nor a line")

    def _peek_raw(self) -> bytes:
        while True:
            try:
                return bytes(self._raw.recv(RECOGNIZED, socket.MSG_PEEK))
            except BlockingIOError:
                self.wait_readable()

    def _flush(self) -> None:
        self._send_all(self._send_records())

    def _receive_flight(self) -> int:
        while True:
            try:
                size = int(self._raw.recv_into(inbox[:RECORD]))
            except BlockingIOError:
                self.wait_readable()
            else:
                if not size:
                    raise TLSError("the peer closed the connection during the TLS handshake")
                return size

    def _receive(self, wanted: int) -> int:
        """Read records with about as much payload as is wanted, and one at least: the kernel keeps the others."""
        size: int = self._raw.recv_into(inbox[: max(wanted, RECORD) + RECORD_OVERHEAD])
        if not size:
            raise TLSError("the connection ended without TLS close_notify: the stream is cut")
        return size

    def _send_records(self) -> Data:
        """Send at once what the kernel takes of what OpenSSL has made; returns a copy of the rest."""
        return bytes(self.try_rest(records)) if (records := self._records.take()) else b""

    def _decrypt(self, buffer: memoryview) -> int | None:
        """Fill the buffer with the records at hand; 0 at the peer's close_notify, None when more must be read."""
        try:
            return self._records.decrypt(buffer) or None
        except SSL.ZeroReturnError:
            return 0
        except SSL.Error as error:
            raise translated(error) from None


class Session(NamedTuple):
    """What a client needs to resume a session of TLS 1.3."""

    handle: SSL.Session
    context: SSL.Context  # of the connection that it comes from: OpenSSL wants the same one
    verified_for: str  # as `TLSStream.verified_for`

    def meets(self, expected: Expected) -> bool:
        """Whether a connection that resumes it is as good as one after a full handshake."""
        return expected.verify is Verify.IGNORE or self.verified_for == expected.host


def accept_tls(sock: Socket, context: SSL.Context) -> TLSStream:
    """The server's side of a handshake. Raises OSError, TLSError among them; closing `sock` is the caller's.

    A client without ALPN, or of TLS 1.2, is let through: see `TLSStream.speaks_v2`.
    """
    wait_read(sock.fileno())  # a peer that sends nothing does not get OpenSSL's 140 KiB
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    stream = TLSStream(sock, connection)
    try:
        stream.handshake(is_server=True)
    except TLSError as error:
        if _REFUSED.search(str(error)):
            raise CertificateRefusedError(f"{BYES[CERTIFICATE]} ({error})") from None
        raise
    return stream


def connect_tls(sock: Socket, expected: Expected, v2: bool = True, session: Session | None = None) -> TLSStream:
    """The client's side of a handshake; `v2`: of wire v2, which begins with a look at the first byte of the answer.

    A session that does not meet what is expected is not offered to the server. Where the server does not take one, the
    handshake is a full one.

    Raises OSError. ClearAnswer among them: the server does not speak TLS, and what it said is still in the socket. A
    VerificationError says which check rejected the certificate. The server learns that in the handshake, so it never
    takes a rejected connection for a ready one.
    """
    return _connect(sock, _Judge(expected), v2, session if session and session.meets(expected) else None)


def check_certificate(sock: Socket, expected: Expected, v2: bool = True) -> None:
    """Verify the server's certificate and end the handshake there, so that the server gets no connection from it.

    Raises OSError, VerificationError among them.
    """
    judge = _Judge(expected, accepts=False)
    try:
        _connect(sock, judge, v2)
    except VerificationError:
        raise
    except TLSError:
        if not judge.has_passed:
            raise


class _Judge:
    """OpenSSL's verification callback: called for each certificate of the chain, the server's own last."""

    def __init__(self, expected: Expected, accepts: bool = True) -> None:
        """`accepts`: the handshake goes on with a certificate that is as expected."""
        self.expected = expected
        self._accepts = accepts
        self.was_called = False
        self.has_passed = False
        self.rejection: Rejection | None = None

    @property
    def verified_for(self) -> str:
        """The host for which it has found chain and name to be right; "" where they are not, or not looked at."""
        looked = self.expected.verify is not Verify.IGNORE
        return self.expected.host if looked and self.has_passed and not self.rejection else ""

    def __call__(self, _connection: SSL.Connection, certificate: X509, error: int, depth: int, ok: int) -> bool:
        self.was_called = True
        rejection = self.expected.rejects_chain(error if not ok else 0)
        if not rejection and depth == 0:
            rejection = self.expected.rejects_leaf(certificate)
            self.has_passed = not rejection
        self.rejection = self.rejection or rejection
        if self.expected.verify is Verify.KEEP:
            return True
        return not rejection and (self._accepts or depth > 0)


def _connect(sock: Socket, judge: _Judge, v2: bool, session: Session | None = None) -> TLSStream:
    connection = _client_connection(judge, v2, session)
    stream = TLSStream(sock, connection)
    try:
        if v2:
            stream.wait_for_answer()
        stream.handshake()
    except TLSError:
        if judge.rejection:
            raise refused(judge.rejection) from None
        raise
    if v2 and not stream.speaks_v2:
        raise TLSError(f"TLS: the server did not select the protocol {ALPN.decode()} (ALPN)")
    stream.rejection = judge.rejection
    stream.resumed = session is not None and not judge.was_called  # pyOpenSSL has no other public sign of it
    stream.verified_for = session.verified_for if session and stream.resumed else judge.verified_for
    connection.set_verify(SSL.VERIFY_NONE, None)  # the callback takes more than 1 KB of an idle connection
    return stream


def _client_connection(judge: _Judge, v2: bool, session: Session | None) -> SSL.Connection:
    expected = judge.expected
    connection = SSL.Connection(session.context if session else client_context(expected.verify, v2), None)
    connection.set_connect_state()
    if session:
        connection.set_session(session.handle)
    if not is_ip(expected.host):
        connection.set_tlsext_host_name(expected.host.encode("ascii"))
    if session or expected.verify is not Verify.IGNORE:
        connection.set_verify(SSL.VERIFY_PEER, judge)
    return connection
