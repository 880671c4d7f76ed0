"""One direction of a relay: what it does when there are bytes to read, and when there is room to write again.

It is no greenlet but these two callbacks of the event loop, so an idle connection costs no greenlet and no buffer, and
a message costs three system calls and one Python call: with two pumping greenlets in a session there were 25,300
requests per second where there are 54,500 now. Every read goes into one buffer that the whole process shares: `read`
and `send` (see `stream.Stream`) never switch, and what the sink does not take is copied. A plain stream that is busy is
spliced: the kernel moves the bytes. The ends that a direction can come to are in `relay`, which alone uses this.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from typing import Any, Literal

import gevent

from nodepass.net.pipes import Pipe, pipes
from nodepass.net.session import Session
from nodepass.net.sockets import end_reading, set_low_water_mark
from nodepass.net.stream import Stream, TCPStream

BUSY_READ = 64 * 1024  # bytes: a read of at least so many is one of a busy stream
SPLICE_AFTER = 4  # busy reads in a row
GATHER_AFTER = 32  # busy reads in a row; from then on the source wakes us for much at once only
GATHER = 1024 * 1024  # bytes: a wake-up costs as much as moving 20 KiB; this saves a sixth of the CPU time per byte
GATHER_LOOK = 0.002  # seconds after which a source that has stalled with less than that is read all the same

_shared = memoryview(mmap.mmap(-1, TCPStream.batch))  # unlike a bytearray it takes no memory before it is used


class Direction:
    """One way: either its source is watched, or, while its sink is full, its sink."""

    __slots__ = (
        "_buffer",
        "_busy_reads",
        "_gathering",
        "_looked_at",
        "_moved",
        "_over",
        "_pipe",
        "_read",
        "_rest",
        "_send",
        "_session",
        "_sink",
        "_source",
        "_spliceable",
        "_up",
        "_way",
    )

    def __init__(self, session: Session, name: Literal["up", "down"], source: Stream, sink: Stream) -> None:
        self._session = session
        self._up = name == "up"
        self._source = source
        self._sink = sink
        self._read = source.read if self._up or session.began is None else self._read_first
        self._send = sink.send
        self._buffer = _shared[: sink.batch]
        self._moved = 0  # bytes
        self._way = session.stats.tcp.up if self._up else session.stats.tcp.down
        self._over = False  # though the sink may still have to be told
        self._rest: bytes | memoryview = b""  # read, and not yet taken by the sink
        self._pipe: Pipe | None = None  # with bytes that are not yet taken by the sink
        self._spliceable = source.plain and sink.plain
        self._busy_reads = 0  # in a row
        self._gathering: Any = None  # a timer, which has no type, while the source has a low-water mark
        self._looked_at = 0  # busy reads when it last ran

    def start(self) -> None:
        """Begin with what is there already: often first bytes have come before the session, answers never."""
        self._source.watch(self._on_readable)
        if self._up:
            self._on_readable()

    def stop(self) -> None:
        """End it where it is."""
        if self._gathering:
            self._stop_gathering()
        self._source.unwatch()
        self._sink.unwatch_writable()
        if self._pipe:
            self._give_back_pipe()
        self._read = self._source.read
        if self._up:
            self._session.traffic.up = self._moved
        else:
            self._session.traffic.down = self._moved

    def _on_readable(self) -> None:
        try:
            if self._busy_reads >= SPLICE_AFTER and self._spliceable:
                self._splice()
                return
            self._copy()
            while self._source.pending and self._may_read():
                self._copy()
        except Exception as error:  # noqa: BLE001  # a bug, which would otherwise be called back for ever
            self._session.crash(error)

    def _may_read(self) -> bool:
        return not (self._over or self._rest)

    def _read_first(self, buffer: memoryview) -> int:
        """The first read of the way back that brings something is the one whose time is taken."""
        received = self._source.read(buffer)
        self._read = self._source.read
        if received and self._session.began is not None:
            self._session.stats.first_bytes.observe(time.monotonic() - self._session.began)
        return received

    def _copy(self) -> None:
        try:
            received = self._read(self._buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail_source(error)
            return
        if not received:
            self._end()
            return
        try:
            self._rest = self._send(self._buffer[:received])
        except OSError as error:
            self._fail_sink(error)
            return
        self._moved += received
        self._way.bytes += received
        if received >= BUSY_READ or self._rest:
            self._go_on_busily(received)
        else:
            self._busy_reads = 0

    def _splice(self) -> None:
        pipe = pipes.borrow()
        if pipe is None:
            self._busy_reads = 0
            return
        self._pipe = pipe
        try:
            received = pipe.fill_from(self._source.sock.fileno())
        except OSError as error:
            self._give_back_pipe()
            if not isinstance(error, BlockingIOError):
                self._fail_source(error)
            return
        if not received:
            self._give_back_pipe()
            self._end()
            return
        self._moved += received
        self._way.bytes += received
        try:
            drained = pipe.drain_to(self._sink.sock.fileno())
        except OSError as error:
            self._fail_sink(error)
            return
        if drained:
            self._give_back_pipe()
        self._go_on_busily(received)

    def _go_on_busily(self, received: int) -> None:
        """After a large read, or one that the sink has not taken whole."""
        self._busy_reads = self._busy_reads + 1 if received >= BUSY_READ else 0
        if self._spliceable and self._busy_reads >= GATHER_AFTER and not self._gathering:
            self._start_gathering()
        if self._rest or self._pipe:
            self._source.unwatch()
            self._sink.watch_writable(self._on_writable)

    def _start_gathering(self) -> None:
        set_low_water_mark(self._source.sock, GATHER)
        self._gathering = gevent.get_hub().loop.timer(GATHER_LOOK, GATHER_LOOK)
        self._gathering.start(self._look)

    def _look(self) -> None:
        try:
            if self._looked_at == self._busy_reads:
                self._stop_gathering()
            self._looked_at = self._busy_reads
        except Exception as error:  # noqa: BLE001  # as above
            self._session.crash(error)

    def _stop_gathering(self) -> None:
        self._gathering.close()
        self._gathering = None
        self._busy_reads = 0
        with contextlib.suppress(OSError):  # it is closed
            set_low_water_mark(self._source.sock, 1)

    def _on_writable(self) -> None:
        try:
            if self._pipe:
                if not self._pipe.drain_to(self._sink.sock.fileno()):
                    return
                self._give_back_pipe()
            else:
                self._rest = self._sink.try_rest(self._rest)
                if self._rest:
                    return
            self._sink.unwatch_writable()
            if self._over:
                self._session.end_one()
            else:
                self._source.watch(self._on_readable)
                if self._source.pending:
                    self._on_readable()
        except OSError as error:
            self._fail_sink(error)
        except Exception as error:  # noqa: BLE001  # a bug, which would otherwise be nobody's
            self._session.crash(error)

    def _end(self) -> None:
        """End of stream, or only the echo of the other direction's failure."""
        self._over = True
        if self._session.traffic.failure:
            self._source.unwatch()
            self._session.end_one()  # this end of stream is only the echo of the other direction's failure
            return
        self._session.traffic.ended += 1
        self._source.unwatch()
        if self._session.is_last and self._sink.plain:
            self._session.end_one()  # both are closed now, which says the same with one system call less
            return
        try:
            self._rest = self._sink.end()
        except OSError:
            end_reading(self._sink.sock)  # it is gone already; the other direction hears that from its reads
        if self._rest:
            self._sink.watch_writable(self._on_writable)
        else:
            self._session.end_one()

    def _fail_source(self, error: OSError) -> None:
        self._over = True
        self._session.note(error)
        self._session.end_broken(self._source)

    def _fail_sink(self, error: OSError) -> None:
        self._over = True
        self._session.note(error)
        self.stop()
        end_reading(self._sink.sock)
        self._session.end_one()

    def _give_back_pipe(self) -> None:
        assert self._pipe
        pipes.give_back(self._pipe)
        self._pipe = None
