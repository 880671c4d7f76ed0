"""What is read and closed with care on a stream, in the clear and under TLS."""

from __future__ import annotations

from contextlib import ExitStack
from typing import cast

import gevent
import pytest
from gevent import socket

from nodepass.errors import ClosedError, ProtocolError
from nodepass.net.stream import Stream, TCPStream, close_gently, read_only_line, recv_exactly
from nodepass.tls.stream import TLSStream
from tests.unit.controls import connect_ends, run, run_tls
from tests.unit.streams import reset

LONGEST = 20
SECURED = pytest.mark.parametrize("secured", [False, True], ids=["clear", "tls"])


def connect(stack: ExitStack, secured: bool) -> tuple[Stream, Stream]:
    """This end and the peer's."""
    ends = connect_ends(stack)
    return run_tls(stack, ends) if secured else (TCPStream(ends.server), TCPStream(ends.client))


def read_rest(stream: Stream) -> bytes:
    """Everything up to the end of the stream, which must be in order."""
    got, buffer = b"", memoryview(bytearray(4096))
    while received := stream.recv_into(buffer):
        got += buffer[:received]
    return got


# One line


@SECURED
@pytest.mark.parametrize("line", [b"", b"//tls", b"x" * LONGEST], ids=["empty", "short", "longest"])
def test_a_line_is_read_without_its_newline(stack: ExitStack, secured: bool, line: bytes) -> None:
    stream, peer = connect(stack, secured)
    peer.write(line + b"\n")
    assert read_only_line(stream, LONGEST) == line


@SECURED
def test_a_line_may_come_in_pieces_and_what_follows_the_answer_is_still_there(stack: ExitStack, secured: bool) -> None:
    stream, peer = connect(stack, secured)
    reading = run(stack, read_only_line, stream, LONGEST)
    for byte in b"//tls\n":
        peer.write(bytes([byte]))
        gevent.sleep(0)
    assert reading.get() == b"//tls"
    peer.write(b"next\n")
    assert read_only_line(stream, LONGEST) == b"next"


@SECURED
@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"x" * (LONGEST + 1), "longer than 20 bytes"),
        (b"x" * (LONGEST + 1) + b"\n", "longer than 20 bytes"),
        (b"x" * 1000, "longer than 20 bytes"),
        (b"//tls\nx", "follow a line"),
        (b"//tls\n\n", "follow a line"),
        (b"//tls\n" + b"x" * 1000, "follow a line"),
    ],
    ids=["one byte", "one byte and a newline", "far", "a byte behind", "a line behind", "much behind"],
)
def test_a_longer_line_and_anything_behind_it_are_refused(
    stack: ExitStack, secured: bool, said: bytes, words: str
) -> None:
    """No more is read than that takes."""
    stream, peer = connect(stack, secured)
    peer.write(said)
    with pytest.raises(ProtocolError, match=words):
        read_only_line(stream, LONGEST)
    left = len(said) - (LONGEST + 1)
    if left > 0:
        assert recv_exactly(stream, left) == said[LONGEST + 1 :]


@SECURED
@pytest.mark.parametrize("said", [b"", b"//tl"])
def test_an_end_before_the_end_of_the_line_is_a_close(stack: ExitStack, secured: bool, said: bytes) -> None:
    stream, peer = connect(stack, secured)
    if said:
        peer.write(said)
    peer.half_close()
    with pytest.raises(ClosedError):
        read_only_line(stream, LONGEST)


@SECURED
@pytest.mark.parametrize("size", [0, 3, 8])
def test_an_exact_number_of_bytes_is_read_or_none(stack: ExitStack, secured: bool, size: int) -> None:
    stream, peer = connect(stack, secured)
    peer.write(b"12345678"[:size] + b"rest!")
    peer.half_close()
    assert recv_exactly(stream, size) == b"12345678"[:size]
    with pytest.raises(ClosedError, match="after 5 of 6 bytes"):
        recv_exactly(stream, 6)


# A gentle close


def is_closed(stream: Stream) -> bool:
    return stream.sock.fileno() < 0


@SECURED
def test_what_was_written_arrives_although_the_peer_has_said_more_than_was_read(
    stack: ExitStack, secured: bool
) -> None:
    """A close would be a reset, which would overtake it."""
    stream, peer = connect(stack, secured)
    peer.write(b"x" * 5000)
    stream.write(b"//error?reason=busy\n")
    closing = run(stack, close_gently, stream, 10.0)
    assert read_rest(peer) == b"//error?reason=busy\n"
    assert not closing.ready()
    peer.write(b"y" * 5000)
    peer.half_close()
    closing.get()
    assert is_closed(stream)


@SECURED
def test_a_peer_that_does_not_end_its_side_is_not_waited_for(stack: ExitStack, secured: bool) -> None:
    stream, peer = connect(stack, secured)
    close_gently(stream, 0.02)
    assert is_closed(stream)
    assert read_rest(peer) == b""


@SECURED
def test_a_peer_that_goes_on_talking_is_not_listened_to(stack: ExitStack, secured: bool) -> None:
    stream, peer = connect(stack, secured)

    def talk() -> None:
        while True:
            peer.write(b"x" * 5000)
            gevent.sleep(0)

    talking = run(stack, talk)
    close_gently(stream, 10.0, 20000)
    assert is_closed(stream)
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        talking.get()


@SECURED
def test_a_peer_that_reads_nothing_is_not_waited_for(stack: ExitStack, secured: bool) -> None:
    """Under TLS the end of the stream has to be written, too."""
    stream, _ = connect(stack, secured)
    while not stream.send(b"x" * 65536):
        pass
    close_gently(stream, 0.02)
    assert is_closed(stream)


@SECURED
def test_a_connection_that_was_reset_is_closed_without_an_error(stack: ExitStack, secured: bool) -> None:
    stream, peer = connect(stack, secured)
    reset(cast(socket.socket, peer.sock))
    close_gently(stream)
    assert is_closed(stream)


@SECURED
def test_a_close_that_is_cut_short_is_a_close(stack: ExitStack, secured: bool) -> None:
    stream, _ = connect(stack, secured)
    closing = run(stack, close_gently, stream, 10.0)
    gevent.sleep(0)
    closing.kill()
    assert is_closed(stream)


# The channel


def test_only_a_tls_stream_has_a_channel(stack: ExitStack) -> None:
    for secured in (False, True):
        stream, peer = connect(stack, secured)
        assert stream.plain == (not isinstance(stream, TLSStream)) == (not secured)
        assert stream.exporter() == peer.exporter()
        assert len(stream.exporter()) == (32 if secured else 0)
