"""Signals to and from bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.errors import ProtocolError
from nodepass.protocol import (
    HEARTBEAT,
    MAX_LINE,
    TCP,
    UDP,
    Heartbeat,
    Launch,
    LineBuffer,
    Tunnel,
    Unknown,
    parse_id,
    parse_signal,
    parse_tunnel,
    printable,
)


@pytest.mark.parametrize(
    ("signal", "line"),
    [
        (Launch("deadbeef", TCP), b"//deadbeef#1\n"),
        (Launch("00000000", UDP), b"//00000000#2\n"),
        (HEARTBEAT, b"\n"),
        (Tunnel(10102, 1), b"//10102#1\n"),
    ],
)
def test_a_signal_is_one_line_in_both_directions(signal: Launch | Heartbeat | Tunnel, line: bytes) -> None:
    assert signal.encode() == line
    parse = parse_tunnel if isinstance(signal, Tunnel) else parse_signal
    assert parse(line) == signal


@pytest.mark.parametrize("line", [b"  //deadbeef#1\r", b"\t//deadbeef?v=2&x=1#1"])
def test_white_space_and_a_query_are_ignored(line: bytes) -> None:
    assert parse_signal(line) == Launch("deadbeef", TCP)


@pytest.mark.parametrize("line", [b"//deadbeef#3", b"//deadbeef#", b"//deadbeef", b"//hello?v=2", b"//x#y"])
def test_an_unknown_signal_is_told_from_a_malformed_one(line: bytes) -> None:
    assert parse_signal(line) == Unknown(line)


@pytest.mark.parametrize("line", [b"hello", b"/x#1", b"//deadbee#1", b"//DEADBEEF#1", b"//#1", b"//a b#1", b"\xff\xfe"])
def test_a_malformed_signal_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_signal(line)


@pytest.mark.parametrize(
    "line", [b"", b"//#1", b"//0#1", b"//65536#0", b"//80#3", b"//80", b"//-1#1", b"HTTP/1.1 200 OK"]
)
def test_a_bad_tunnel_signal_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_tunnel(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_signal_or_a_protocol_error(line: bytes) -> None:
    for parse in (parse_signal, parse_tunnel, parse_id):
        with contextlib.suppress(ProtocolError):
            parse(line)


@given(st.lists(st.binary(max_size=50).map(lambda line: line.replace(b"\n", b""))), st.data())
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    buffer, got = LineBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += buffer.feed(stream[:size])
        stream = stream[size:]
    assert got == lines
    assert not buffer.skipped


@given(st.integers(1, 3 * MAX_LINE), st.integers(1, 5000))
def test_an_over_long_line_is_skipped_counted_and_never_held(length: int, piece: int) -> None:
    buffer, got = LineBuffer(), []
    stream = b"x" * length + b"\n//deadbeef#1\n"
    for start in range(0, len(stream), piece):
        got += buffer.feed(stream[start : start + piece])
        assert len(buffer._held) <= MAX_LINE
    assert got[-1] == b"//deadbeef#1"
    assert (len(got), buffer.skipped) == ((2, 0) if length <= MAX_LINE else (1, 1))


def test_a_peers_bytes_cannot_forge_a_log_line() -> None:
    assert printable(b"a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(printable(b"x" * 1000)) < 70
