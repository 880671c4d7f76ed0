"""The TLS sessions that the data connections of one control connection may resume.

A store belongs to one control connection of a client and ends with it. Its first session is that of the control
connection, given once the offer was accepted; each data connection gives one and takes one. It knows no wire: `client`
calls it.
"""

from __future__ import annotations

from collections import deque

from nodepass.net.stream import Stream
from nodepass.tls.stream import Session, TLSStream
from nodepass.tls.verify import Expected

MOST = 64  # sessions in a store; each takes 2 KB, or 7 where the handshake was a full one


class Sessions:
    """At most `MOST` sessions that meet what is expected of data connections, the newest taken first."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._kept: deque[Session] = deque(maxlen=MOST)
        self._is_over = False

    def offer(self, stream: Stream) -> None:
        """Keep the session of a connection from which payload has been read, unless it is not as good as expected."""
        session = stream.session() if isinstance(stream, TLSStream) else None
        if session and session.meets(self._expected) and not self._is_over:
            self._kept.append(session)

    def take(self) -> Session | None:
        """A session, for one connection: a ticket used twice would show that both are of one client."""
        return self._kept.pop() if self._kept else None

    def forget(self) -> None:
        """The control connection has ended: give no session any more, and keep none that a late dial offers."""
        self._is_over = True
        self._kept.clear()
