"""The pump of one direction of a relay: read, send, wait, until the end of the stream.

It is a generator that the event loop resumes. The callback of a watcher is the generator's `__next__`, and a bare
`yield` waits for what is being watched: the source or, while the sink is full, the sink. So a direction costs no
greenlet and no buffer, and a message costs one read, one send and one call by the loop. With two pumping greenlets in a
session there were 25,300 requests per second where callbacks of the loop gave 54,500. Every read goes into one buffer
of the process: `read` and `send` (see `stream.Stream`) never switch to another greenlet. A plain stream that is busy is
spliced: the kernel moves the bytes.

What the sink does not take is copied, and a sink whose peer does not read keeps that copy for as long as the peer
likes. So a read is of at most MESSAGE bytes. Where it brought as many, the sink is asked how much it takes, and until
that is used up no read is larger: more stays in the source, whose peer is held back. Once all copies of the process
together reach RESTS_AT_MOST, every read is preceded by that question, and hardly anything is copied any more.

Where the rate of a direction is limited, a `Throttle` says when it may read and how much. While it waits for its turn
the source is not watched, so that its peer is held back, as by a full sink.

A pump moves bytes and passes the end of a stream on. What the end or the failure of a direction means for the other one
is decided in `relay`, the only caller. Errors of the source are OSErrors, errors of the sink `SinkError`s.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from nodepass.net.pipes import CAPACITY, Pipe, pipes
from nodepass.net.sockets import Socket, end_reading, room_to_send, set_low_water_mark
from nodepass.net.stopped import stopped_directions
from nodepass.net.stream import Data, Stream, TCPStream
from nodepass.stats import Way
from nodepass.tasks import IdleTimer

MESSAGE = 16 * 1024  # bytes that a direction reads without asking its sink, and keeps at most while that is full
RESTS_AT_MOST = 4 << 20  # bytes that all stopped directions of the process keep together, more or less
LEAST_READ = 1024  # bytes, once they keep as much: a read is what shows that a sink is broken
LARGE_READ = 12 * 1024  # bytes: after a read of at least this size more may wait
BUSY_READ = 64 * 1024  # bytes: a read of at least this size belongs to a busy stream
SPLICE_AFTER = 4  # busy reads in a row
GATHER_AFTER = 32  # busy reads in a row; from then on a wake-up brings GATHER bytes
GATHER = 1024 * 1024  # bytes: a wake-up costs as much as moving 20 KiB; this saves a sixth of the CPU time per byte
GATHER_LOOK = 0.002  # seconds after which a source that has stalled with fewer bytes is read anyway

Steps = Generator[None, None, None]
Resume = Callable[[], object]

_shared = memoryview(mmap.mmap(-1, TCPStream.batch))  # unlike a bytearray it takes no memory before it is used


class SinkError(Exception):
    """A write failed. What the sink's peer sent before can still be read."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Rests:
    """What all directions of the process have read and their sinks have not taken."""

    bytes = 0
    many = False  # RESTS_AT_MOST is reached

    def add(self, size: int) -> None:
        """Count so many more bytes, or less."""
        self.bytes += size
        self.many = self.bytes >= RESTS_AT_MOST


rests = _Rests()


class Throttle(Protocol):
    """Limits the rate of one direction of many sessions, which take turns; the bytes are counted in its `Way`."""

    turn: int  # bytes that may be read in one turn

    def is_free(self) -> bool:
        """Whether a turn may begin now."""

    def queue(self, turn: Resume) -> None:
        """Call back once, when it is this one's turn."""

    def cancel(self, turn: Resume) -> None:
        """Do not call back, if it still waits."""


class Pump:
    """Moves the bytes of one direction and counts them."""

    __slots__ = (
        *("_resume", "_room", "_steps", "_throttle", "_way", "moved", "over", "sink", "source", "source_error"),
        "waits_for_turn",
    )

    def __init__(self, source: Stream, sink: Stream, way: Way, throttle: Throttle | None = None) -> None:
        self.source = source
        self.sink = sink
        self.moved = 0  # bytes
        self._room = 0  # bytes that the sink takes at least, as far as is known
        self.over = False  # the direction has ended, and its source is not watched
        self.waits_for_turn = False  # bytes may wait to be read, and the rate does not allow it
        self.source_error: OSError | None = None  # of a write to the source, which is the other direction's sink
        self._way = way
        self._throttle = throttle
        self._resume: Resume | None = None
        self._steps: Steps | None = None

    def watch(self, steps: Steps) -> None:
        """Have the loop resume `steps`, which has this pump run, when there is something to do, until `unwatch`."""
        self._steps = steps
        self._resume = steps.__next__
        self.source.watch(self._resume)

    def unwatch(self) -> None:
        """End `watch`, whatever the pump waits for."""
        self.source.unwatch()
        self.sink.unwatch_writable()

    def fail(self, error: OSError) -> None:
        """End the direction as if a read had failed; it waits."""
        assert self._steps
        self._steps.throw(error)

    def run(self, on_first_byte: Callable[[], object] | None) -> Steps:
        """Move bytes until the end of the stream. Raises OSError where the source fails, SinkError where the sink does.

        `on_first_byte` is called once, when the first bytes have been read.
        """
        source, sink, way, throttle = self.source, self.sink, self._way, self._throttle
        read, message = source.read, _shared[:MESSAGE]
        received, busy_reads = 0, 0  # in a row
        while True:
            is_large = received >= LARGE_READ or rests.many or throttle
            buffer = (yield from self._fit_buffer()) if is_large else message
            try:
                received = read(buffer)
            except BlockingIOError:
                yield
                continue
            if not received:
                return
            if on_first_byte:
                on_first_byte()
                on_first_byte = None
            try:
                rest = sink.send(buffer[:received])
            except OSError as error:
                raise SinkError(error) from error
            self.moved += received
            self._room -= received
            way.bytes += received
            if rest:
                yield from self._send_rest(rest)
                rest = b""  # no copy stays while the session is quiet
            busy_reads = busy_reads + 1 if received >= BUSY_READ else 0
            if busy_reads >= SPLICE_AFTER and source.plain and sink.plain:
                yield
                if (yield from self._splice_while_busy()):
                    return
                busy_reads = 0
            if not source.pending:
                yield

    def end(self) -> Steps:
        """Pass the end of the stream on, as a half-close. Raises SinkError."""
        try:
            rest = self.sink.end()
        except OSError:
            end_reading(self.sink.sock)  # it is gone already, which the reads of the other direction report
            return
        if rest:
            yield from self._send_rest(rest)

    def _fit_buffer(self) -> Generator[None, None, memoryview]:
        """The shared buffer, as far as the sink takes what is read into it, and the rate allows it."""
        if rests.many:
            yield from self._find_room(MESSAGE)
            size = min(max(self._room, LEAST_READ), MESSAGE)
        else:
            if self._room < self.sink.batch:
                yield from self._find_room(MESSAGE)
            size = min(max(self._room, MESSAGE), self.sink.batch)
        if self._throttle:
            size = min(size, (yield from self._take_turn(self._throttle)))
        return _shared[:size]

    def _take_turn(self, throttle: Throttle) -> Generator[None, None, int]:
        """How many bytes may be read now; waits for the turn if there are any. The end of a stream does not wait."""
        assert self._resume
        if throttle.is_free() or not self.source.peek():
            return throttle.turn
        self.waits_for_turn = True
        throttle.queue(self._begin_turn)
        self.source.unwatch()
        stopped_directions.add(self)
        try:
            while self.waits_for_turn:
                yield  # an error ends the direction
        finally:
            self.waits_for_turn = False
            stopped_directions.discard(self)
            throttle.cancel(self._begin_turn)
        self.source.watch(self._resume)
        return throttle.turn

    def _begin_turn(self) -> None:
        assert self._resume
        self.waits_for_turn = False
        self._resume()

    def _find_room(self, least: int) -> Steps:
        """Ask the sink how many bytes it takes; waits once where those are fewer than `least`.

        Half of a megabyte lasts for several reads, so that a fast sink is not asked for each: that took a tenth more
        CPU time per byte.
        """
        self._room = room_to_send(self.sink.sock)
        if self._room < least:
            yield from self._wait_for_sink()
            self._room = room_to_send(self.sink.sock)

    def _wait_for_sink(self) -> Steps:
        with self._watching_sink():
            yield

    def _send_rest(self, rest: Data) -> Steps:
        kept = len(rest)
        rests.add(kept)
        try:
            with self._watching_sink():
                while rest:
                    yield
                    try:
                        rest = self.sink.try_rest(rest)
                    except OSError as error:
                        raise SinkError(error) from error
        finally:
            rests.add(-kept)

    def _splice_while_busy(self) -> Generator[None, None, bool]:
        """Have the kernel move the bytes for as long as the source is busy; whether the stream has ended."""
        assert self._resume
        sock = self.source.sock
        # A direction that takes turns is seldom woken up by its source: there is nothing to gather.
        with contextlib.closing(_Gathering(sock, None if self._throttle else self._resume)) as gathering:
            while gathering.busy:
                if self._room < CAPACITY // 2:
                    yield from self._find_room(BUSY_READ)
                room = min(self._room, CAPACITY)
                if self._throttle:
                    room = min(room, (yield from self._take_turn(self._throttle)))
                if room < BUSY_READ or not (pipe := pipes.borrow()):
                    return False
                try:
                    received = pipe.fill_from(sock.fileno(), room)
                    if not received:
                        return True
                    self.moved += received
                    self._room -= received
                    self._way.bytes += received
                    gathering.count(received)
                    if not self._drain(pipe):
                        yield from self._drain_rest(pipe)
                except BlockingIOError:
                    return False
                finally:
                    pipes.give_back(pipe)
                if gathering.busy:
                    yield
        return False

    def _drain(self, pipe: Pipe) -> bool:
        try:
            return pipe.drain_to(self.sink.sock.fileno())
        except OSError as error:
            raise SinkError(error) from error

    def _drain_rest(self, pipe: Pipe) -> Steps:
        with self._watching_sink():
            yield
            while not self._drain(pipe):
                yield

    @contextlib.contextmanager
    def _watching_sink(self) -> Iterator[None]:
        """Watch the sink instead of the source: nothing is read before the sink has taken what was."""
        assert self._resume
        self._room = 0  # it was less than believed
        self.source.unwatch()
        self.sink.watch_writable(self._resume)
        stopped_directions.add(self)
        try:
            yield  # an error ends the direction, which watches neither any more
        finally:
            stopped_directions.discard(self)
        self.sink.unwatch_writable()
        self.source.watch(self._resume)


class _Gathering:
    """Whether a source is still busy. After GATHER_AFTER busy reads the kernel reports GATHER bytes at once.

    Such a source may stall with fewer bytes. A timer finds that: the source counts as busy no longer, and the pump is
    resumed to read them.
    """

    __slots__ = ("_reads", "_reads_at_look", "_resume", "_sock", "_timer", "busy")

    def __init__(self, sock: Socket, resume: Resume | None) -> None:
        """`resume`: the pump, None where the kernel goes on reporting every byte."""
        self.busy = True
        self._sock = sock
        self._resume = resume
        self._reads = SPLICE_AFTER  # busy ones in a row
        self._reads_at_look = 0
        self._timer = IdleTimer(GATHER_LOOK, self._look)

    def count(self, received: int) -> None:
        """Count a read of so many bytes."""
        if received < BUSY_READ:
            self.busy = False
            return
        self._reads += 1
        if self._reads == GATHER_AFTER and self._resume:
            set_low_water_mark(self._sock, GATHER)
            self._timer.start()

    def _look(self) -> bool:
        if self._reads != self._reads_at_look:
            self._reads_at_look = self._reads
            return True
        self.busy = False
        if self._resume:
            self._resume()
        return False

    def close(self) -> None:
        """Have the kernel report every byte again."""
        self._timer.stop()
        if self._reads >= GATHER_AFTER:
            with contextlib.suppress(OSError):  # it is closed
                set_low_water_mark(self._sock, 1)
