"""The records of a TLS connection, in and out of OpenSSL's memory BIOs.

It owns the buffers that all connections share, the limits on a peer that makes OpenSSL work without sending payload,
and the memory that a connection's BIOs hold. It knows no socket and no context; `tls.stream` alone calls it.

There are two implementations of `Records`. `PrivateRecords` saves a fifth of the CPU time per byte: pyOpenSSL's own
calls make a new buffer for every read, copy into it and out of it again, and raise an exception where there is nothing
to read. It rests on private names of pyOpenSSL, the same from 24.3 to 26.4. `PublicRecords` uses only what pyOpenSSL
documents. The import of this module looks for each private name once, and chooses.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

from OpenSSL import SSL

from nodepass.errors import TLSError
from nodepass.log import Log
from nodepass.tasks import IdleTimer

BATCH = 131072  # bytes per read from the kernel and of payload per write; from 32 to 256 KiB this took least CPU
RECORD = 16384  # bytes of payload in one TLS record, at most
HEADER = 5  # bytes of a record's header; the last two are the length of what follows
RECORD_OVERHEAD = 64  # bytes that TLS adds to a record, at most
# Records without payload that more input follows, on one connection. A key update costs some 20 microseconds for its 27
# bytes; to OpenSSL's own read functions it counts twice.
STOPS = 64
HANDSHAKE_RECORDS = 2048  # that `PublicRecords` passes on before payload; each costs some 10 microseconds
UNSENT = 4096  # bytes of OpenSSL's own that wait for the next write: answers to 150 key updates
LARGE = 1024  # bytes; smaller batches leave too little in a BIO to be worth giving back
QUIET = 0.05  # seconds without a large batch, up to twice as many, after which BIOs are replaced
MOST_HELD = 2 << 20  # bytes of large batches, over all connections: their BIOs take up to three times as much

# Mapped, so that they take no memory before they are used.
inbox = memoryview(mmap.mmap(-1, BATCH))  # for records from the kernel
_outbox = memoryview(mmap.mmap(-1, 2 * BATCH))  # for records to the kernel

# Private names of pyOpenSSL that `PrivateRecords` uses: of its binding to OpenSSL, of cffi's, and of a connection.
_OPENSSL_NAMES = (
    "BIO_get_mem_data",
    "BIO_new",
    "BIO_new_mem_buf",
    "BIO_read",
    "BIO_s_mem",
    "BIO_set_mem_eof_return",
    "BIO_write",
    "SSL_ERROR_WANT_READ",
    "SSL_ERROR_ZERO_RETURN",
    "SSL_MODE_AUTO_RETRY",
    "SSL_clear_mode",
    "SSL_get_error",
    "SSL_pending",
    "SSL_read",
    "SSL_set_bio",
    "SSL_write",
)
_FFI_NAMES = ("NULL", "from_buffer")
_CONNECTION_NAMES = ("_from_ssl", "_into_ssl", "_raise_ssl_error", "_ssl")


def missing_names(ssl: Any) -> list[str]:
    """The private names in use here that this pyOpenSSL lacks; `ssl` is its module `SSL`."""
    connection = ssl.Connection(ssl.Context(ssl.TLS_METHOD), None)
    owners = (
        (getattr(ssl, "_lib", None), _OPENSSL_NAMES),
        (getattr(ssl, "_ffi", None), _FFI_NAMES),
        (connection, _CONNECTION_NAMES),
    )
    return [name for owner, names in owners for name in names if not hasattr(owner, name)]


_missing = missing_names(SSL)
if not _missing:
    _lib: Any = SSL._lib  # type: ignore[attr-defined]
    _ffi: Any = SSL._ffi  # type: ignore[attr-defined]
    _INBOX = _ffi.from_buffer("char[]", inbox)
    _OUTBOX = _ffi.from_buffer("char[]", _outbox)


class Records(Protocol):
    """The records of one connection. What a call leaves in a shared buffer is valid until the next call of any."""

    unread: bool  # OpenSSL may have something to read

    def feed(self, size: int) -> None:
        """Copy this many bytes of the `inbox` for the next call of OpenSSL; nothing may be `unread`."""

    def lend(self, size: int) -> None:
        """As `feed`, but OpenSSL may read them in the `inbox`; `decrypt` must come next."""

    def take(self) -> memoryview:
        """What OpenSSL wants sent; send or copy it before the next call."""

    def encrypt(self, data: bytes | memoryview) -> None:
        """Make records of payload. Raises SSL.Error."""

    def decrypt(self, buffer: memoryview) -> int:
        """The payload at hand, as much as fits; 0 where there is none. Raises SSL.Error, TLSError.

        The end of the stream is SSL.ZeroReturnError; where it follows payload, the next call raises it.
        """

    def go_on(self) -> bool:
        """After OpenSSL wanted to read: whether there is more, so that the call must be repeated. Raises TLSError.

        Without it OpenSSL would hold the whole process for seconds at a flood of key updates, and keep its answers.
        """

    def finish_handshake(self) -> None:
        """The handshake is complete: payload may follow, and may have arrived with its last record."""

    def shrink(self) -> bool:
        """Give back the memory of large batches; False while bytes are unread."""

    def close(self) -> None:
        """The connection is closed."""


class PrivateRecords:
    """By private names of pyOpenSSL: OpenSSL reads and writes in the shared buffers.

    What comes from the kernel is either fed, which is a copy, or lent: OpenSSL then reads it in the `inbox`, and what
    is left there when `decrypt` returns is copied. A loan takes a new BIO: for few bytes a copy is cheaper.
    """

    __slots__ = ("_connection", "_from_ssl", "_into_ssl", "_lent", "_ssl", "_stops", "moved_much", "unread")

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection: Any = connection
        self._ssl = self._connection._ssl
        self._into_ssl, self._from_ssl = self._connection._into_ssl, self._connection._from_ssl
        self._lent = False  # the incoming BIO is one of the inbox
        self._stops = 0
        self.moved_much = False  # a large batch, since the timer last looked
        self.unread = False
        # OpenSSL then stops after each record without payload with SSL_ERROR_WANT_READ: see `go_on`.
        _lib.SSL_clear_mode(self._ssl, _lib.SSL_MODE_AUTO_RETRY)

    def feed(self, size: int) -> None:
        if self._lent:
            self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), self._from_ssl)
        _lib.BIO_write(self._into_ssl, _INBOX, size)
        self.unread = True
        if size > LARGE:
            _note_large(self, size)

    def lend(self, size: int) -> None:
        bio = _lib.BIO_new_mem_buf(_INBOX, size)
        _lib.BIO_set_mem_eof_return(bio, -1)  # its end is not the end of the stream
        self._set_bios(bio, self._from_ssl)
        self._lent = self.unread = True

    def take(self) -> memoryview:
        size = _lib.BIO_get_mem_data(self._from_ssl, _ffi.NULL)
        if not size:
            return _outbox[:0]
        if size <= len(_outbox):
            _lib.BIO_read(self._from_ssl, _OUTBOX, size)
            return _outbox[:size]
        large = bytearray(size)
        _lib.BIO_read(self._from_ssl, _ffi.from_buffer("char[]", large), size)
        return memoryview(large)

    def encrypt(self, data: bytes | memoryview) -> None:
        start, done, size = _ffi.from_buffer("char[]", data), 0, len(data)
        if size > LARGE:
            _note_large(self, size)
        while done < size:  # before pyOpenSSL 25.2 a call makes one record
            result = _lib.SSL_write(self._ssl, start + done, size - done)
            if result <= 0:
                self._connection._raise_ssl_error(self._ssl, result)
            done += result

    def decrypt(self, buffer: memoryview) -> int:
        start, done, size = _ffi.from_buffer("char[]", buffer), 0, len(buffer)
        while done < size:
            result: int = _lib.SSL_read(self._ssl, start + done, size - done)
            if result > 0:
                done += result
                if result < RECORD and self._is_empty():  # most often so, and cheaper than a read that brings nothing
                    self.unread = False
                    return done
                continue
            error = _lib.SSL_get_error(self._ssl, result)
            if error == _lib.SSL_ERROR_WANT_READ:
                if self.go_on():
                    continue
                return done
            if error == _lib.SSL_ERROR_ZERO_RETURN and done:
                break
            self._connection._raise_ssl_error(self._ssl, result)
        if self._lent:
            self._keep()
        return done

    def _is_empty(self) -> bool:
        return not (_lib.BIO_get_mem_data(self._into_ssl, _ffi.NULL) or _lib.SSL_pending(self._ssl))

    def go_on(self) -> bool:
        self.unread = not self._is_empty()
        self._stops += self.unread
        if self._stops > STOPS or _lib.BIO_get_mem_data(self._from_ssl, _ffi.NULL) > UNSENT:
            raise _too_many_records()
        return self.unread

    def _keep(self) -> None:
        """Copy what is left of a loan."""
        left = bytearray(_lib.BIO_get_mem_data(self._into_ssl, _ffi.NULL))
        if left:
            _lib.BIO_read(self._into_ssl, _ffi.from_buffer("char[]", left), len(left))
        self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), self._from_ssl)
        if left:
            _lib.BIO_write(self._into_ssl, _ffi.from_buffer("char[]", left), len(left))
        if len(left) > LARGE:
            _note_large(self, len(left))

    def finish_handshake(self) -> None:
        self.unread = not self._is_empty()

    def shrink(self) -> bool:
        if self.unread:
            return False
        waiting = self.take()  # an answer to a key update, for one, waits for the next write
        outgoing = _lib.BIO_new(_lib.BIO_s_mem())
        if waiting:
            _lib.BIO_write(outgoing, _ffi.from_buffer(waiting), len(waiting))
        self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), outgoing)
        return True

    def close(self) -> None:
        _large.pop(self, None)

    def _set_bios(self, incoming: Any, outgoing: Any) -> None:
        _lib.SSL_set_bio(self._ssl, incoming, outgoing)  # it frees those that are not set again
        self._into_ssl, self._from_ssl, self._lent = incoming, outgoing, False
        self._connection._into_ssl, self._connection._from_ssl = incoming, outgoing


class PublicRecords:
    """By what pyOpenSSL documents: OpenSSL gets one record at a time and makes one at a time.

    pyOpenSSL sets SSL_MODE_AUTO_RETRY, so OpenSSL handles records without payload until it has no more input: one
    record at a time bounds that. It bounds the memory too: a BIO never shrinks and cannot be replaced here, but none
    grows past a handshake's flight or a record, so that a connection that has moved bulk once in each direction keeps
    about 45 KB where `PrivateRecords` keeps nothing.
    """

    __slots__ = ("_connection", "_missing", "_output", "_stops", "_waiting", "unread")

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection
        self._waiting: bytes | memoryview = b""  # from the peer, not yet given to OpenSSL
        self._missing = 0  # bytes that OpenSSL has not got of the record that it has begun
        self._output = bytearray()
        self._stops = -HANDSHAKE_RECORDS  # the private calls do not stop in a handshake
        self.unread = False

    def feed(self, size: int) -> None:
        self._waiting = memoryview(bytes(self._waiting) + inbox[:size])
        self.unread = self._give_record()

    lend = feed

    def take(self) -> memoryview:
        self._collect_output()
        output, self._output = self._output, bytearray()
        return memoryview(output)

    def encrypt(self, data: bytes | memoryview) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += self._connection.send(view[done : done + RECORD])
            self._collect_output()

    def decrypt(self, buffer: memoryview) -> int:
        done = 0
        while done < len(buffer):
            try:
                done += self._connection.recv_into(buffer[done:], RECORD)
            except SSL.WantReadError:
                if not self.go_on():
                    break
            except SSL.ZeroReturnError:
                if not done:
                    raise
                break
            else:
                self._find_unread()
                if not self.unread:
                    break
        return done

    def go_on(self) -> bool:
        self._collect_output()
        self.unread = self._give_record()
        self._stops += self.unread
        if self._stops > STOPS or len(self._output) > UNSENT:
            raise _too_many_records()
        return self.unread

    def finish_handshake(self) -> None:
        self._stops = 0
        self._find_unread()

    def shrink(self) -> bool:
        return not self.unread

    def close(self) -> None:
        self._waiting = b""

    def _find_unread(self) -> None:
        self.unread = self._connection.pending() > 0 or self._give_record()

    def _give_record(self) -> bool:
        """Give OpenSSL, which has read all it had, one record or what has arrived of it; False where nothing has."""
        if not self._missing and len(self._waiting) >= HEADER:
            self._missing = HEADER + int.from_bytes(self._waiting[HEADER - 2 : HEADER], "big")
        part = self._waiting[: self._missing]
        if part:
            self._connection.bio_write(part)
            self._missing -= len(part)
            self._waiting = self._waiting[len(part) :]
        if len(self._waiting) < HEADER:
            self._waiting = bytes(self._waiting)  # a view would keep the whole batch
        return bool(part)

    def _collect_output(self) -> None:
        size = RECORD + RECORD_OVERHEAD
        part = b"."
        while part:
            try:
                part = self._connection.bio_read(size)
            except SSL.WantReadError:
                return
            self._output += part


def _too_many_records() -> TLSError:
    return TLSError("TLS: too many records without payload")


# A memory BIO grows with the largest batch that went through it and never shrinks: a connection that has moved bulk
# once in each direction would hold 350 KB until it is closed.
_large: dict[PrivateRecords, int] = {}  # and the largest batch that went through its BIOs, the oldest first


def _note_large(records: PrivateRecords, size: int) -> None:
    records.moved_much = True
    if size > _large.get(records, 0):
        _large[records] = size
        _timer.start()
        if sum(_large.values()) > MOST_HELD:
            _shrink_oldest(records)


def _shrink_oldest(but: PrivateRecords) -> None:
    for records in list(_large):
        if records is not but and records.shrink():  # at most a few of them are unread now
            del _large[records]
            if sum(_large.values()) <= MOST_HELD:
                return


def _shrink_quiet() -> bool:
    for records in list(_large):
        if records.moved_much:
            records.moved_much = False
        elif records.shrink():
            del _large[records]
    return bool(_large)


_timer = IdleTimer(QUIET, _shrink_quiet)

Implementation: type[PrivateRecords | PublicRecords] = PublicRecords if _missing else PrivateRecords
if _missing:
    Log("nodepass").info(
        "tls.public_api",
        "pyOpenSSL lacks %(missing)s: TLS uses its public API and more CPU time per byte",
        missing=", ".join(_missing),
    )


def open_records(connection: SSL.Connection) -> Records:
    """The records of a connection that has just been made."""
    return Implementation(connection)
