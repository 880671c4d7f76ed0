"""What OpenSSL's memory BIOs keep of a stream that has been busy: given back once the stream is quiet.

A memory BIO grows with the largest batch that went through it and never shrinks, so a connection that has moved bulk
once in each direction would hold 350 KB for as long as it lives. `tls` tells of large batches; a timer, which runs only
while there are such streams, puts fresh BIOs in the place of those that nobody has used since its last look.
"""

from __future__ import annotations

from typing import Any, Protocol

from gevent import get_hub

LARGE = 1024  # bytes; batches up to this size leave too little behind to be worth a look
QUIET = 0.05  # seconds without a large batch, up to twice as many


class Busy(Protocol):
    """A stream that has moved a large batch."""

    moved_much: bool  # since the last look

    def shrink(self) -> bool:
        """Give back what was for large batches; False where bytes wait in it still."""


_busy: set[Busy] = set()
_timer: Any = None  # gevent's, which has no type; it runs while a stream is busy


def note(stream: Busy) -> None:
    """A stream has moved a large batch."""
    global _timer  # noqa: PLW0603  # one timer for the process
    stream.moved_much = True
    if stream not in _busy:
        _busy.add(stream)
        if _timer is None:
            _timer = get_hub().loop.timer(QUIET, QUIET)
            _timer.start(_look)


def forget(stream: Busy) -> None:
    """A stream is closed."""
    _busy.discard(stream)


def _look() -> None:
    global _timer  # noqa: PLW0603
    for stream in list(_busy):
        if stream.moved_much:
            stream.moved_much = False
        elif stream.shrink():
            _busy.discard(stream)
    if not _busy:
        _timer.close()
        _timer = None
