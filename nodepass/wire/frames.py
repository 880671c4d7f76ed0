"""Frames of a UDP lane (wire v2): `flow` (u32), `length` (u16), payload, big-endian. No I/O.

Either end sends one for each datagram; `tunnel.udp` carries them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct(">IH")


def encode_frame(flow: int, payload: bytes) -> bytes:
    """One datagram of a flow."""
    return HEADER.pack(flow, len(payload)) + payload


class FrameBuffer:
    """Splits a byte stream into frames. It holds less than one frame, 64 KiB at most."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """The flow and the payload of each frame that `data` completes. `data` is not looked at after the first one."""
        data = self._held + data
        self._held = b""
        start, size, header = 0, len(data), HEADER.size
        while size - start >= header:
            flow, length = HEADER.unpack_from(data, start)
            end = start + header + length
            if end > size:
                break
            yield flow, data[start + header : end]
            start = end
        self._held = data[start:]
