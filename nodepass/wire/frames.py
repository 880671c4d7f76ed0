"""Frames of a UDP lane (wire v2): `flow` (u32), `length` (u16), payload, big-endian. No I/O.

Either end sends one for each datagram; `tunnel.udp` carries them. A length that no datagram has means text about the
flow instead: a second length (u16) and `from=<addr>&to=<addr>`, which a server sends in front of a flow's first
datagram where the client wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

HEADER = struct.Struct(">IH")
TEXT = 0xFFFF  # in place of a length: no datagram is so long
_TEXT_LENGTH = struct.Struct(">H")


def encode_frame(flow: int, payload: bytes) -> bytes:
    """One datagram of a flow."""
    return HEADER.pack(flow, len(payload)) + payload


def encode_addresses(flow: int, visitor: str, local: str) -> bytes:
    """Where a flow's datagrams come from, and where the visitor sent them: `ip:port` each."""
    text = f"from={visitor}&to={local}".encode()
    return HEADER.pack(flow, TEXT) + _TEXT_LENGTH.pack(len(text)) + text


class FrameBuffer:
    """Splits a byte stream into frames. It holds less than one frame, 64 KiB at most.

    `announce` is called with a flow and the addresses of its announcement, where they are; without it text is skipped.
    """

    def __init__(self, announce: Callable[[int, str, str], object] | None = None) -> None:
        self._held = b""
        self._announce = announce

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """The flow and the payload of each frame that `data` completes. `data` is not looked at after the first one."""
        data = self._held + data
        self._held = b""
        start, size, header = 0, len(data), HEADER.size
        while size - start >= header:
            flow, length = HEADER.unpack_from(data, start)
            begin = start + header
            if length == TEXT:
                begin += _TEXT_LENGTH.size
                if begin > size:
                    break
                (length,) = _TEXT_LENGTH.unpack_from(data, begin - _TEXT_LENGTH.size)
            end = begin + length
            if end > size:
                break
            if begin == start + header:
                yield flow, data[begin:end]
            elif self._announce:
                self._announce(flow, *_parse_addresses(bytes(data[begin:end])))
            start = end
        self._held = data[start:]


def _parse_addresses(text: bytes) -> tuple[str, str]:
    """What an announcement calls `from` and `to`, unchecked; empty where it has none, or is no such text."""
    pairs = [each.partition("=") for each in text.decode("ascii", "replace").split("&")]
    named = {name: value for name, _, value in reversed(pairs)}  # the first of two counts
    return named.get("from", ""), named.get("to", "")
