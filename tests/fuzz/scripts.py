"""Bytes read as a script: which pieces a stream arrives in, what a peer does next."""

from __future__ import annotations

from collections.abc import Iterator

LONG = b"\xfe"
"""Stands for a thousand bytes, so that a short input makes a long line."""


class Script:
    """Takes small numbers and byte strings from the front of some bytes; zeros and nothing once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._left = data

    def __bool__(self) -> bool:
        return bool(self._left)

    def number(self, size: int = 1) -> int:
        """The next number, of so many bytes."""
        return int.from_bytes(self.take(size), "big")

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken, self._left = self._left[:size], self._left[size:]
        return taken

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._left))

    def sizes(self) -> list[int]:
        """A few sizes from 1 to 256; one at least."""
        return [size + 1 for size in self.take(self.number() % 8 + 1)] or [1]


def pieces(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, over and over."""
    turn = 0
    while stream:
        size = sizes[turn % len(sizes)]
        yield stream[:size]
        stream, turn = stream[size:], turn + 1
