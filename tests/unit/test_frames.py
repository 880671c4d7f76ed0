"""Frames of UDP lanes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodepass.wire.frames import FrameBuffer, encode_frame


def test_a_frame_is_flow_length_and_payload() -> None:
    assert encode_frame(0x01020304, b"hi") == b"\x01\x02\x03\x04\x00\x02hi"


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=3000))), st.data())
def test_frames_are_the_same_however_they_arrive(frames: list[tuple[int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(*frame) for frame in frames)
    buffer, got = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += list(buffer.feed(memoryview(bytearray(stream[:size]))))
        stream = stream[size:]
    assert got == frames


@given(st.lists(st.binary(max_size=70000), max_size=5))
def test_any_bytes_are_frames_and_what_is_held_is_less_than_one(pieces: list[bytes]) -> None:
    buffer = FrameBuffer()
    for piece in pieces:
        for _, payload in buffer.feed(piece):
            assert len(payload) <= 65535
        assert len(buffer._held) < 65536 + 6
