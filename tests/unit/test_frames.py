"""Frames of UDP lanes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.wire.frames import HEADER, TEXT, FrameBuffer, encode_addresses, encode_frame
from tests.support.table import each_row

LARGEST = 65507  # bytes of a UDP datagram


def test_a_frame_is_flow_length_and_payload() -> None:
    assert encode_frame(0x01020304, b"hi") == b"\x01\x02\x03\x04\x00\x02hi"


def test_addresses_are_a_frame_whose_length_no_datagram_has() -> None:
    frame = encode_addresses(0x01020304, "192.0.2.7:4711", "[::1]:53")
    assert frame == b"\x01\x02\x03\x04\xff\xff\x00\x1ffrom=192.0.2.7:4711&to=[::1]:53"


@each_row("payload", [b"", b"x", b"x" * LARGEST])
@each_row("flow", [0, 2**32 - 1])
def test_a_datagram_arrives_as_it_was_sent(flow: int, payload: bytes) -> None:
    buffer = FrameBuffer()
    assert list(buffer.feed(encode_frame(flow, payload))) == [(flow, payload)]
    assert not buffer._held


frames = st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=3000))
texts = st.integers(0, 2**32 - 1).map(lambda flow: encode_addresses(flow, "192.0.2.7:4711", "192.0.2.8:53"))


@given(st.lists(st.one_of(frames, texts)), st.data())
def test_frames_are_the_same_however_they_arrive_and_texts_are_skipped(
    sent: list[tuple[int, bytes] | bytes], data: st.DataObject
) -> None:
    stream = b"".join(each if isinstance(each, bytes) else encode_frame(*each) for each in sent)
    buffer, got = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += list(buffer.feed(memoryview(bytearray(stream[:size]))))
        stream = stream[size:]
    assert got == [each for each in sent if not isinstance(each, bytes)]
    assert not buffer._held


@given(st.lists(st.binary(max_size=70000), max_size=5))
def test_any_bytes_are_frames_and_what_is_held_is_less_than_one(pieces: list[bytes]) -> None:
    buffer = FrameBuffer()
    for piece in pieces:
        for _, payload in buffer.feed(piece):
            assert len(payload) < 65535
        assert len(buffer._held) < 65535 + 8


@pytest.mark.parametrize("length", [0, 1, 65535])
def test_a_text_of_any_length_is_skipped(length: int) -> None:
    text = b"\0\0\0\1\xff\xff" + length.to_bytes(2, "big") + b"x" * length
    buffer = FrameBuffer()
    for byte in (text[:7], text[7:]):
        assert list(buffer.feed(byte)) == []
    assert list(buffer.feed(encode_frame(2, b"behind"))) == [(2, b"behind")]


@each_row(
    ("text", "addresses"),
    [
        (b"from=192.0.2.1:5&to=[2001:db8::1]:53", ("192.0.2.1:5", "[2001:db8::1]:53")),
        (b"to=b&x=y&from=a&from=c", ("a", "b")),
        (b"", ("", "")),
        (b"\xff\0=&&from", ("", "")),
    ],
)
def test_the_addresses_of_a_flow_are_announced_before_its_first_datagram(
    text: bytes, addresses: tuple[str, str]
) -> None:
    heard: list[object] = []
    buffer = FrameBuffer(lambda *announced: heard.append(announced))
    data = HEADER.pack(7, TEXT) + len(text).to_bytes(2, "big") + text + encode_frame(7, b"hello")
    for at in range(len(data)):  # in any pieces
        heard += buffer.feed(data[at : at + 1])
    assert heard == [(7, *addresses), (7, b"hello")]
