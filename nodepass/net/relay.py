"""The relay: bytes between two streams, both ways, until both directions have ended.

The directions run by themselves, called back by the event loop (see `direction`); the session's own greenlet only waits
for the end. How a direction ends:

* end of stream at the source: a half-close of the sink; the other direction goes on;
* a read fails: the source is gone, so the sink is reset, once it has acknowledged what was written to it;
* a write fails: the sink takes no more, but what it said before is still read and passed on by the other direction.

A cut stream is never made to look like a whole one.
"""

from __future__ import annotations

from nodepass.net.pump import Direction
from nodepass.net.session import Session, Traffic
from nodepass.net.sockets import wait_delivered
from nodepass.net.stream import Stream
from nodepass.stats import Stats

DELIVERY_GRACE = 1.0  # seconds for a peer to acknowledge what was written before it is told of the reset


def exchange(near: Stream, far: Stream, stats: Stats, began: float | None = None) -> Traffic:
    """Move bytes until both directions have ended; up is from `near` to `far`. Both streams are closed on return.

    With `began`, in time.monotonic(), the time from then to the first byte of the way back is counted.
    """
    session = Session(stats, began)
    traffic = session.traffic
    for stream in (near, far):
        stream.reset_on_close(True)  # should this process be killed, the cut streams must not look whole
    stats.tcp.begin()
    try:
        _run(session, near, far)
        if session.broken:
            session.broken.abort()
        if traffic.failure:
            for stream in (near, far):
                wait_delivered(stream.sock, DELIVERY_GRACE)
                stream.abort()
    finally:
        stats.tcp.end(traffic.outcome)
        for stream in (near, far):
            stream.reset_on_close(traffic.ended < 2)
            stream.close()
    return traffic


def _run(session: Session, near: Stream, far: Stream) -> None:
    """Both directions, until both are over or one is broken; raises what crashed one."""
    directions = Direction(session, "up", near, far), Direction(session, "down", far, near)
    try:
        for direction in directions:
            direction.start()
        session.wait()
    finally:
        for direction in directions:
            direction.stop()
