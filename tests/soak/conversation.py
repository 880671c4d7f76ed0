"""One end of a TCP session: sends and receives at once, and keeps what it needs to be judged by."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.soak.content import CHUNK, Content, new_digest
from tests.support.sockets import reset

PATIENCE = 60.0
"""Seconds without a byte after which a session counts as stuck; no fault lasts half as long."""

LOOK = 0.25
"""Seconds between looks at whether this end has been told to go."""

Ended = Literal["", "end", "reset", "stuck"]


@dataclass(frozen=True)
class Part:
    """What one end is to say and to hear, and whether it leaves before."""

    says: Content
    size: int
    hears: Content
    leaves_after: int | None = None  # bytes, both ways together
    leaves_by: Literal["close", "reset"] = "close"
    bite: int = CHUNK  # bytes of a read, at most
    pause: float = 0.0  # seconds between reads
    listens_first: bool = False  # to the end, before it says anything
    delay: float = 0.0  # seconds before it says anything


@dataclass
class End:
    """What one end has done and seen."""

    part: Part
    sent: int = 0  # bytes that the kernel has taken
    said_end: bool = False  # it has ended its stream in good order
    received: int = 0
    heard: Ended = ""  # how the other's stream ended
    has_left: bool = False
    digest: bytes = b""

    @property
    def is_right(self) -> bool:
        """Whether all that was received is what belongs there."""
        return self.digest == self.part.hears.digest(self.received)


@dataclass
class Conversation:
    """Plays one end on its socket."""

    sock: socket.socket
    end: End
    is_cancelled: Callable[[], bool]
    patience: float = PATIENCE

    def run(self, prologue: bytes = b"") -> None:
        """To the end of both directions, or to the point where this end leaves; the socket is closed then."""
        digest = new_digest()
        end = self.end
        self.sock.setblocking(False)
        try:
            self._run(prologue, digest.update)
        finally:
            end.digest = digest.digest()
            if end.has_left and self._has_to_leave() and end.part.leaves_by == "close":
                end.said_end = True
                self.sock.close()
            elif end.heard == "end" and end.said_end:
                self.sock.close()
            else:
                with contextlib.suppress(OSError):
                    reset(self.sock)

    def _run(self, prologue: bytes, update: Callable[[bytes], None]) -> None:
        end, part = self.end, self.end.part
        poll = select.poll()
        last = began = time.monotonic()
        unsent = prologue
        while not (end.heard and (end.said_end or end.heard != "end")):
            may_begin = time.monotonic() - began >= part.delay and (not part.listens_first or bool(end.heard))
            may_say = not end.said_end and (bool(unsent) or may_begin)
            wanted = (0 if end.heard else select.POLLIN) | (select.POLLOUT if may_say else 0)
            poll.register(self.sock, wanted)
            happened = poll.poll(LOOK * 1000)
            now = time.monotonic()
            if self.is_cancelled() or self._has_to_leave():
                end.has_left = True
                return
            if not happened:
                if now - last > self.patience:
                    end.heard = "stuck"
                continue
            last = now
            try:
                if not end.heard and happened[0][1] & ~select.POLLOUT:
                    self._receive(update)
                if may_say and happened[0][1] & select.POLLOUT:
                    unsent = self._send(unsent)
            except BlockingIOError:
                continue
            except OSError:
                end.heard = "reset"

    def _has_to_leave(self) -> bool:
        limit = self.end.part.leaves_after
        return limit is not None and self.end.sent + self.end.received >= limit

    def _receive(self, update: Callable[[bytes], None]) -> None:
        end, part = self.end, self.end.part
        data = self.sock.recv(part.bite)
        if not data:
            end.heard = "end"
            return
        update(data)
        end.received += len(data)
        if part.pause:
            time.sleep(part.pause)

    def _send(self, unsent: bytes) -> bytes:
        """Send what is left of the prologue, then content, then the end of the stream."""
        end, part = self.end, self.end.part
        if unsent:
            return unsent[self.sock.send(unsent) :]
        size = part.size - end.sent
        if part.leaves_after is not None:
            size = min(size, max(1, part.leaves_after - end.sent - end.received))
        if size > 0 and end.sent < part.size:
            end.sent += self.sock.send(part.says.part(end.sent, size))
        if end.sent == part.size:
            self.sock.shutdown(socket.SHUT_WR)
            end.said_end = True
        return b""
