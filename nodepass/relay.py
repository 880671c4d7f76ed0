"""The relay: bytes between two streams, both ways, until both directions have ended.

Every read goes into one buffer that the whole process shares, so an idle connection holds none: `recv_into` and `write`
promise (see `net.Stream`) that nobody else runs while the bytes are only there.

How a direction ends:

* end of stream at the source: a half-close of the sink; the other direction goes on;
* a read fails: the source is gone, so the sink is reset, once it has acknowledged what was written to it;
* a write fails: the sink takes no more, but what it said before is still read and passed on by the other direction.

A cut stream is never made to look like a whole one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import gevent
from gevent import Greenlet

from nodepass.net import Stream, TCPStream, end_reading, reason, reset_on_close, wait_delivered
from nodepass.stats import Stats

BYTES_PER_TURN = 1024 * 1024  # then a hot pump lets heartbeats and other sessions run
DELIVERY_GRACE = 1.0  # seconds for a peer to acknowledge what was written before it is told of the reset

_shared = memoryview(bytearray(TCPStream.batch))

Direction = Literal["up", "down"]


@dataclass
class Traffic:
    """What one session moved, in payload bytes, and how it ended."""

    up: int = 0
    down: int = 0
    ended: int = 0  # directions that came to their end of stream
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.up} bytes up, {self.down} bytes down, {self.failure or 'both ends closed'}"


def exchange(near: Stream, far: Stream, stats: Stats) -> Traffic:
    """Move bytes until both directions have ended; up is from `near` to `far`. Both streams are closed on return."""
    traffic = Traffic()
    for stream in (near, far):
        reset_on_close(stream.sock, True)  # should this process be killed, the cut streams must not look whole
    downward = Greenlet.spawn(_pump, far, near, "down", traffic, stats)
    try:
        _pump(near, far, "up", traffic, stats)
        downward.join()
        if traffic.failure:
            _reset(near)
            _reset(far)
    finally:
        downward.kill()
        for stream in (near, far):
            if traffic.ended == 2:
                reset_on_close(stream.sock, False)
                stream.close()
            else:
                stream.abort()
    return traffic


def _pump(source: Stream, sink: Stream, direction: Direction, traffic: Traffic, stats: Stats) -> None:
    """Move bytes one way until this direction ends, in one of the three ways above."""
    buffer = _shared[: min(source.batch, sink.batch)]
    moved = 0
    try:
        while received := source.recv_into(buffer):
            moved += received
            try:
                sink.write(buffer[:received])
            except OSError as error:
                traffic.failure = traffic.failure or reason(error)
                end_reading(sink.sock)
                return
            if moved >= BYTES_PER_TURN:
                _account(direction, moved, traffic, stats)
                moved = 0
                gevent.sleep(0)
        if traffic.failure:
            return  # this end of stream is only the echo of the other direction's failure
        traffic.ended += 1
        _half_close(sink)
    except OSError as error:
        traffic.failure = traffic.failure or reason(error)
        source.abort()
        _reset(sink)
    finally:
        _account(direction, moved, traffic, stats)


def _half_close(sink: Stream) -> None:
    try:
        sink.half_close()
    except OSError:
        end_reading(sink.sock)  # it is gone already; the other direction hears that from its reads


def _reset(stream: Stream) -> None:
    wait_delivered(stream.sock, DELIVERY_GRACE)
    stream.abort()


def _account(direction: Direction, moved: int, traffic: Traffic, stats: Stats) -> None:
    if direction == "up":
        traffic.up += moved
        stats.bytes_up += moved
    else:
        traffic.down += moved
        stats.bytes_down += moved
