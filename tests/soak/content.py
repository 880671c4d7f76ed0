"""What sessions and datagrams are filled with: each seed has its own endless bytes, cheap to make and to check."""

from __future__ import annotations

import hashlib
import random

CHUNK = 1 << 18
"""Bytes of a part, at most."""

_PERIOD = (1 << 20) + 7  # no buffer's size divides it, so that bytes out of place are wrong bytes
_BLOCK = random.Random(2).randbytes(_PERIOD)
_STREAM = _BLOCK + _BLOCK[:CHUNK]


class Content:
    """The bytes that belong to one seed."""

    def __init__(self, seed: int) -> None:
        self._from = seed * 7919 % _PERIOD

    def part(self, start: int, size: int) -> bytes:
        """At most CHUNK bytes from a place on."""
        begin = (self._from + start) % _PERIOD
        return _STREAM[begin : begin + min(size, CHUNK)]

    def digest(self, size: int) -> bytes:
        """The hash of so many bytes from the first on."""
        digest, done = new_digest(), 0
        while done < size:
            part = self.part(done, size - done)
            digest.update(part)
            done += len(part)
        return digest.digest()


def new_digest() -> hashlib.blake2b:
    """The hash that every session's bytes go through."""
    return hashlib.blake2b(digest_size=16)
