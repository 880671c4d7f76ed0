"""Datagrams inside a tunnel: what both ends of UDP share.

In wire v2 the datagrams of one visitor's address are a flow, and a few long-lived data connections, the lanes, carry
the frames of many flows. A `Lane` is one such connection: frames to be sent wait in a bounded queue, and one write
takes all that wait. Which visitor or which socket a flow belongs to is decided by `server.udp_flows` and
`client.udp_flows`.

In wire v1 a session is one datagram and its answer: `read_datagram` and `ask_target`, called by
`server.datagram_listener` and `client.launches`.

A lane that cannot take more bytes loses datagrams, as a full network does. Each loss is counted and logged, by
`drop_datagram`.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Callable

import gevent
from gevent import Greenlet
from gevent.event import Event

from nodepass.errors import ProtocolError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Bind, Endpoint, stalled
from nodepass.net.stream import Stream
from nodepass.net.udp import AnyPort, dial_udp
from nodepass.stats import Stats
from nodepass.wire.frames import FrameBuffer, encode_addresses, encode_frame

QUEUE = 1 << 20  # bytes that may wait for a lane: a moment's burst, not seconds of delay
OVERHEAD = 64  # bytes of memory that a queued frame takes beyond its own
UNSENT = 128 * 1024  # bytes that the kernel takes beyond what is in transit, for the same reason
STALLED = 1.0  # seconds without an acknowledgement after which the lane of a replaced client is lost
READS_PER_TURN = 16  # of a lane, before others get their turn,
FRAMES_PER_TURN = 64  # and frames: one that begins a flow takes some 50 microseconds
# Seconds: one iteration of the event loop. `gevent.sleep(0)` would let 50 turns pass before it looks at other sockets.
TURN = 1e-9

# Wire v1: a datagram is what one read returns.
SPLIT_FROM = 1000  # bytes: a first read of this size can be the beginning of a datagram (Go's first TLS records)
REST_WITHIN = 0.005  # seconds for the next piece
ANSWER_GRACE = 1.0  # seconds beyond UDP_READ_TIMEOUT that the server waits, so that the client's verdict arrives first

_shared = memoryview(mmap.mmap(-1, 256 * 1024))  # takes no memory before it is used


class Lane:
    """One data connection that carries frames, or will once it is launched."""

    def __init__(self) -> None:
        self.id = ""  # of its data connection, once it has one
        self.flows = 0  # that the lane's end gave to it
        self.ended = False
        self.orphaned = False  # its client is not the connected one any more
        self._frames: list[bytes] = []
        self._queued = 0  # bytes, of frames that wait or are being written
        self._wake = Event()
        self._stream: Stream | None = None
        self._crash: Exception | None = None  # of the writer

    def __repr__(self) -> str:
        state = "ended" if self.ended else "open" if self._stream else "waiting"
        return f"<Lane {state}, {self.flows} flows, {self._queued} bytes queued>"

    def name_flow(self, number: int) -> str:
        """A flow's name in the access logs of both ends: the lane's id and its number; "" before it has a lane."""
        return f"{self.id}.{number}" if self.id else ""

    def send(self, flow: int, payload: bytes) -> bool:
        """Queue one datagram; False if the lane cannot take it. Never blocks."""
        return self._queue(encode_frame(flow, payload))

    def announce(self, flow: int, visitor: str, local: str) -> bool:
        """Queue the addresses of a flow, in front of its first datagram; as `send`."""
        return self._queue(encode_addresses(flow, visitor, local))

    def _queue(self, frame: bytes) -> bool:
        if self.ended or self._queued + len(frame) > QUEUE:
            return False
        self._frames.append(frame)
        self._queued += len(frame) + OVERHEAD
        self._wake.set()
        return True

    def run(
        self,
        stream: Stream,
        deliver: Callable[[int, bytes], object],
        announce: Callable[[int, str, str], object] | None = None,
    ) -> str:
        """Carry frames until the connection ends; the stream is closed then. Returns what cut it, "" if nothing did.

        `deliver` gets the flow and the payload of each frame that arrives, `announce` a flow's addresses. A bug in one
        of them or in the writer is raised.
        """
        self._stream = stream
        if self.ended:  # before it could begin
            stream.close()
            return ""
        stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        writer = Greenlet.spawn(self._write, stream)
        try:
            self._read(stream, deliver, FrameBuffer(announce))
            self._close_in_order(stream)
            return ""
        except OSError as error:
            if self._crash:
                raise self._crash from None
            return "" if self.ended else reason(error)
        finally:
            self.ended = True
            writer.kill()
            stream.abort()

    def lost(self) -> bool:
        """Whether it has ended, or is a replaced client's that acknowledges nothing any more."""
        if self.ended or not self.orphaned:
            return self.ended
        try:
            return self._stream is None or stalled(self._stream.sock, STALLED)
        except OSError:
            return True

    def close(self) -> None:
        """End the lane: `run` returns."""
        self.ended = True
        if self._stream:
            self._close_in_order(self._stream)

    def _close_in_order(self, stream: Stream) -> None:
        """Close so that the peer sees the end of the stream, unless a frame is half written."""
        if not self._queued:
            with contextlib.suppress(OSError):
                stream.reset_on_close(False)
                stream.end()
        stream.close()

    def _write(self, stream: Stream) -> None:
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                frames = b"".join(self._frames)
                self._frames.clear()
                stream.write(frames)
                self._queued = sum(map(len, self._frames)) + OVERHEAD * len(self._frames)
        except OSError:
            stream.abort()  # the reader reports why
        except Exception as error:  # noqa: BLE001  # a bug, which `run` raises
            self._crash = error
            stream.abort()

    def _read(self, stream: Stream, deliver: Callable[[int, bytes], object], frames: FrameBuffer) -> None:
        buffer = _shared[: stream.batch]
        reads = count = 0
        while received := stream.recv_into(buffer):
            for flow, payload in frames.feed(buffer[:received]):
                deliver(flow, payload)
                count += 1
                if count % FRAMES_PER_TURN == 0:
                    gevent.sleep(TURN)
            reads += 1
            if reads % READS_PER_TURN == 0:
                gevent.sleep(TURN)


def read_datagram(stream: Stream, largest: int, timeout: float) -> bytes:
    """The datagram that a peer wrote; empty if it closed without one.

    Raises TimeoutError after `timeout` seconds, ProtocolError if there are more than `largest` bytes.
    """
    buffer = memoryview(bytearray(largest + 1))
    with gevent.Timeout(timeout, TimeoutError(f"no datagram within {timeout:g}s")):
        size = received = stream.recv_into(buffer)
    while received and SPLIT_FROM <= size <= largest:
        received = 0
        with contextlib.suppress(TimeoutError), gevent.Timeout(REST_WITHIN, TimeoutError()):
            received = stream.recv_into(buffer[size:])
        size += received
    if size > largest:
        raise ProtocolError(f"a datagram of {size} bytes or more is larger than UDP_DATA_BUF_SIZE ({largest})")
    return bytes(buffer[:size])


def ask_target(
    endpoint: Endpoint, question: bytes, largest: int, timeout: float, any_port: bool = False, bind: Bind | None = None
) -> bytes:
    """The target's answer to one datagram; with `any_port` from any port of its host. `bind`: where it comes from.

    Raises TimeoutError after `timeout` seconds, ConnectionRefusedError if nothing listens, ProtocolError if the answer
    is longer than `largest` bytes.
    """
    with contextlib.closing(AnyPort(endpoint, bind) if any_port else dial_udp(endpoint, bind=bind)) as sock:
        sock.send(question)
        try:
            if isinstance(sock, AnyPort):
                answer = sock.wait(timeout)
            else:
                sock.settimeout(timeout)
                answer = sock.recv(65536)
        except TimeoutError:
            raise TimeoutError(f"no reply from the target within {timeout:g}s") from None
    if len(answer) > largest:
        raise ProtocolError(f"a reply of {len(answer)} bytes is larger than UDP_DATA_BUF_SIZE ({largest})")
    return answer


def drop_datagram(log: Log, stats: Stats, why: str, words: str, **fields: object) -> None:
    """Count and log a datagram that is lost here; `why` is one of `stats.UDP_DROPS`, `words` describe it."""
    stats.udp_drops[why] += 1
    log.warning("datagram.dropped", "dropped " + words, Limit(why, burst=3), reason=why, **fields)
