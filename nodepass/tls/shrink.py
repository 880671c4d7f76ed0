"""What OpenSSL's memory BIOs keep of a stream that has been busy: given back once the stream is quiet.

A memory BIO grows with the largest batch that went through it and never shrinks, so a connection that has moved bulk
once in each direction would hold 350 KB for as long as it lives. `tls` tells of large batches; a timer, which runs only
while there are such streams, puts fresh BIOs in the place of those that nobody has used since its last look.
"""

from __future__ import annotations

from typing import Protocol

from nodepass.tasks import IdleTimer

LARGE = 1024  # bytes; batches up to this size leave too little behind to be worth a look
QUIET = 0.05  # seconds without a large batch, up to twice as many


class Busy(Protocol):
    """A stream that has moved a large batch."""

    moved_much: bool  # since the last look

    def shrink(self) -> bool:
        """Give back what was for large batches; False where bytes wait in it still."""


_busy: set[Busy] = set()


def note(stream: Busy) -> None:
    """A stream has moved a large batch."""
    stream.moved_much = True
    if stream not in _busy:
        _busy.add(stream)
        _timer.start()


def forget(stream: Busy) -> None:
    """A stream is closed."""
    _busy.discard(stream)


def _shrink_quiet() -> bool:
    for stream in list(_busy):
        if stream.moved_much:
            stream.moved_much = False
        elif stream.shrink():
            _busy.discard(stream)
    return bool(_busy)


_timer = IdleTimer(QUIET, _shrink_quiet)
