"""TLS records in and out of OpenSSL's memory BIOs, without the copies that pyOpenSSL makes on the way.

pyOpenSSL's own calls make a new buffer for every read, copy what it gets into it and out of it again, and raise an
exception where there is nothing; its private names, the same from 24.3 on, reach the buffers that the whole process
shares. What a call here leaves in one of those is gone with the next, whoever makes it. Only `tls` calls this.

What comes from the kernel is either fed, which is a copy, or lent: OpenSSL then reads it where it is, in the `inbox`,
and what it has left there when `decrypt` returns is copied. A loan takes a new BIO: for little, a copy is cheaper.
"""

from __future__ import annotations

import mmap
from typing import Any

from OpenSSL import SSL

from nodepass.errors import TLSError

_lib: Any = SSL._lib  # type: ignore[attr-defined]
_ffi: Any = SSL._ffi  # type: ignore[attr-defined]

BATCH = 131072  # bytes per read from the kernel and of payload per write; from 32 to 256 KiB this took least CPU
RECORD = 16384  # bytes of payload in one TLS record, at most
RECORD_OVERHEAD = 64  # bytes that TLS adds to a record, at most
# Stops behind records without payload, on one connection, though more has arrived: a key update makes two, and costs
# some 20 microseconds for its 27 bytes.
STOPS = 64
UNSAID = 4096  # bytes that OpenSSL has to say of its own while nothing is written: answers to 150 key updates

# Mapped, so that they take no memory before they are used.
inbox = memoryview(mmap.mmap(-1, BATCH))  # for records from the kernel
_outbox = memoryview(mmap.mmap(-1, 2 * BATCH))  # for records to the kernel
_INBOX = _ffi.from_buffer("char[]", inbox)
_OUTBOX = _ffi.from_buffer("char[]", _outbox)


class Records:
    """One connection's; `feed`, `lend` and `take` are what comes from and goes to the peer, and can't fail."""

    __slots__ = ("_connection", "_from_ssl", "_into_ssl", "_lent", "_ssl", "_stops", "over")

    def __init__(self, connection: SSL.Connection) -> None:
        private = vars(connection)
        self._connection: Any = connection
        self._ssl = private["_ssl"]
        self._into_ssl, self._from_ssl = private["_into_ssl"], private["_from_ssl"]
        self._lent = False  # the incoming BIO is one of the inbox
        self.over = True  # OpenSSL has nothing left to read
        self._stops = 0
        # Behind each record without payload OpenSSL then stops, and says that it wants to read: see `go_on`.
        _lib.SSL_clear_mode(self._ssl, _lib.SSL_MODE_AUTO_RETRY)

    def feed(self, size: int) -> None:
        """Copy so many bytes of the `inbox`, for whatever call of OpenSSL may come next."""
        if self._lent:
            self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), self._from_ssl)
        _lib.BIO_write(self._into_ssl, _INBOX, size)
        self.over = False

    def lend(self, size: int) -> None:
        """Have so many bytes of the `inbox` read from there; what was fed must be over, and `decrypt` come next."""
        bio = _lib.BIO_new_mem_buf(_INBOX, size)
        _lib.BIO_set_mem_eof_return(bio, -1)  # its end is not the end of the stream
        self._set_bios(bio, self._from_ssl)
        self._lent = True
        self.over = False

    def take(self) -> memoryview:
        """What OpenSSL wants sent; to be sent or copied before anything else is taken."""
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
        """Make records of payload. Raises SSL.Error."""
        start, done, size = _ffi.from_buffer("char[]", data), 0, len(data)
        while done < size:  # before pyOpenSSL 25.1 a call makes one record
            result = _lib.SSL_write(self._ssl, start + done, size - done)
            if result <= 0:
                self._connection._raise_ssl_error(self._ssl, result)
            done += result

    def decrypt(self, buffer: memoryview) -> int:
        """The payload at hand, as much as fits; 0 where there is none. Raises SSL.Error, TLSError.

        The end of the stream is SSL.ZeroReturnError; where it comes behind payload, the next call raises it.
        """
        start, done, size = _ffi.from_buffer("char[]", buffer), 0, len(buffer)
        while done < size:
            result: int = _lib.SSL_read(self._ssl, start + done, size - done)
            if result > 0:
                done += result
                if result < RECORD and self._is_empty():  # most often so, and cheaper than a read that brings nothing
                    self.over = True
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
        """Where OpenSSL wants to read: whether it has only stopped, and is to be called again. Raises TLSError.

        Left to itself it would keep the whole process for seconds at a flood of key updates, and keep its answers.
        """
        self.over = self._is_empty()
        self._stops += not self.over
        if self._stops > STOPS or _lib.BIO_get_mem_data(self._from_ssl, _ffi.NULL) > UNSAID:
            raise TLSError("TLS: too many records without payload")
        return not self.over

    def _keep(self) -> None:
        """Copy what is left of what was lent."""
        left = bytearray(_lib.BIO_get_mem_data(self._into_ssl, _ffi.NULL))
        if left:
            _lib.BIO_read(self._into_ssl, _ffi.from_buffer("char[]", left), len(left))
        self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), self._from_ssl)
        if left:
            _lib.BIO_write(self._into_ssl, _ffi.from_buffer("char[]", left), len(left))

    def look_again(self) -> None:
        """After a call of pyOpenSSL's: find out whether what was fed is over."""
        self.over = self._is_empty()

    def renew_bios(self) -> None:
        """Give the connection fresh BIOs in the place of its own; what was fed must be over.

        What OpenSSL has to say of its own, an answer to a key update for one, waits for the next write, and goes along.
        """
        waiting = self.take()
        outgoing = _lib.BIO_new(_lib.BIO_s_mem())
        if waiting:
            _lib.BIO_write(outgoing, _ffi.from_buffer(waiting), len(waiting))
        self._set_bios(_lib.BIO_new(_lib.BIO_s_mem()), outgoing)

    def _set_bios(self, incoming: Any, outgoing: Any) -> None:
        _lib.SSL_set_bio(self._ssl, incoming, outgoing)  # it frees those that are not set again
        self._into_ssl, self._from_ssl, self._lent = incoming, outgoing, False
        private = vars(self._connection)
        private["_into_ssl"], private["_from_ssl"] = incoming, outgoing
