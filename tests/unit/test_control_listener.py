"""The tunnel port: which connection becomes the client's, which is refused, and which is a data connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import gevent
import pytest
from gevent import socket

from nodepass.server import control_listener as module
from nodepass.server.client_slot import ClientSlot
from nodepass.server.control_listener import ControlListener, is_data_connection
from nodepass.server.data_listener import DataListener
from nodepass.tunnel import handshake
from nodepass.tunnel.part import Common
from nodepass.wire.auth import Key
from nodepass.wire.signals import DATA_PREFIX, ID_LENGTH, Auth, Challenge, Hello, Offer, parse_opening
from tests.unit.controls import is_closed, read_line, run, until
from tests.unit.servers import a_server_room, connect, listen_on, make_slot, start
from tests.unit.streams import tcp_pair

NONCE = "0" * 32
HELLO = Hello(NONCE).encode()
OFFER = Offer(10102, 0, 5000)
SOON = 0.05  # seconds


@dataclass
class Port:
    """A tunnel port that is served, and what is behind it."""

    stack: ExitStack
    common: Common
    slot: ClientSlot
    listener: ControlListener
    sock: socket.socket

    def connect(self, *lines: bytes, source: str = "127.0.0.1") -> socket.socket:
        """A peer that has said something."""
        peer = connect(self.stack, self.sock, source)
        for line in lines:
            peer.sendall(line)
        return peer

    def connect_client(self) -> socket.socket:
        """A v2 client that has been admitted."""
        client = self.connect(HELLO)
        assert read_line(client) == self.listener._offer.encode()
        return client

    def connect_v1_client(self, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
        """A v1 client that has been admitted; it need not answer heartbeats."""
        with monkeypatch.context() as brief:
            for each in (module, "FIRST_BYTES_WITHIN"), (handshake, "HELLO_WITHIN"):
                brief.setattr(*each, SOON)
            client = self.connect()
            assert read_line(client) == b"//%d#0\n" % self.listener._offer.data_port
            return client


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


def open_port(stack: ExitStack, offer: Offer = OFFER, key: Key | None = None, **settings: object) -> Port:
    common, slot = make_slot(stack, key, **settings)
    sock = listen_on(stack)
    data_listener = start(stack, DataListener(common, [], slot, None))
    listener = start(stack, ControlListener(common, [sock], slot, data_listener, offer))
    return Port(stack, common, slot, listener, sock)


# Clients


def test_a_client_is_admitted_and_gets_heartbeats_until_it_leaves(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = open_port(stack, report_interval=SOON)
    client = port.connect_v1_client(monkeypatch)
    assert [read_line(client) for _ in range(3)] == [b"\n"] * 3
    assert port.slot.version == 1
    assert port.common.stats.connects == 1
    client.close()
    until(lambda: port.slot.control is None)


def test_a_connected_client_is_not_pending(stack: ExitStack) -> None:
    """It is not dropped, however many connections follow."""
    port = open_port(stack)
    port.connect_client()
    assert len(port.listener._pending) == 0


def test_a_second_client_is_refused_while_the_first_is_alive(stack: ExitStack) -> None:
    port = open_port(stack)
    client = port.connect_client()
    second = port.connect(HELLO)
    assert read_line(client) == b"\n"
    client.sendall(b"\n")
    assert read_line(second) == b"//error?reason=busy\n"
    assert second.recv(1) == b""
    assert port.common.stats.control_failures["busy"] == 1
    assert port.common.stats.connects == 1


def test_a_client_without_the_key_is_refused(stack: ExitStack) -> None:
    port = open_port(stack, key=Key("correct horse battery staple"))
    peer = port.connect(HELLO)
    assert isinstance(parse_opening(read_line(peer)), Challenge)
    peer.sendall(Auth("0" * 64).encode())
    assert read_line(peer) == b"//error?reason=key-mismatch\n"
    assert is_closed(peer)
    assert port.slot.control is None


def test_silence_ends_with_the_handshake_timeout_where_a_key_is_required(stack: ExitStack) -> None:
    """The time before the first byte counts."""
    port = open_port(stack, key=Key("correct horse battery staple"), handshake_timeout=SOON)
    silent = port.connect()
    assert read_line(silent) == b"//error?reason=key-required\n"
    assert silent.recv(1) == b""


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000 + b"\n"], ids=["HTTP", "a long line"])
def test_a_peer_that_is_no_client_is_closed_and_counted(stack: ExitStack, words: bytes) -> None:
    port = open_port(stack)
    assert is_closed(port.connect(words))
    assert port.common.stats.control_failures["protocol"] == 1


def test_a_listener_that_stops_refuses_clients_and_keeps_the_one_that_is_connected(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = open_port(stack, report_interval=SOON)
    client = port.connect_v1_client(monkeypatch)
    port.listener.stop(0)
    late = port.connect(HELLO)
    assert read_line(late) == b"//error?reason=shutdown\n"
    assert late.recv(1) == b""
    assert [read_line(client) for _ in range(3)] == [b"\n"] * 3
    assert port.slot.control is not None


def test_a_listener_that_closes_ends_its_client_and_everything_pending(stack: ExitStack) -> None:
    port = open_port(stack)
    client, silent = port.connect_client(), port.connect()
    until(lambda: len(port.listener._pending) == 1)
    port.listener.close()
    assert client.recv(1) == b""
    assert silent.recv(1) == b""
    assert port.slot.control is None
    assert not port.listener.find_ended()


# Data connections at the same port


MUX = Offer(10101, 0, 5000, mux=True)


def test_at_one_port_a_data_connection_goes_to_the_pool(stack: ExitStack) -> None:
    port = open_port(stack, MUX)
    port.connect_client()
    data = port.connect(DATA_PREFIX)
    id = data.recv(ID_LENGTH).decode()
    assert id in port.slot.pool
    assert len(port.listener._pending) == 0


def test_at_one_port_a_client_is_told_from_a_data_connection(stack: ExitStack) -> None:
    port = open_port(stack, MUX)
    port.connect_client()
    assert len(port.slot.pool) == 0


def test_at_one_port_every_connection_from_a_v1_clients_address_is_a_data_connection(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not mark them."""
    port = open_port(stack, MUX)
    port.connect_v1_client(monkeypatch)
    data = port.connect()
    assert data.recv(ID_LENGTH).decode() in port.slot.pool
    other = port.connect(b"//", source="127.0.0.2")
    gevent.sleep(0)
    assert len(port.slot.pool) == 1
    other.close()


# First bytes


def sort(stack: ExitStack, *pieces: bytes) -> tuple[object, bytes]:
    """Whether these are the first bytes of a data connection, and what stays to be read; then the stream ends."""
    stream, peer = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    sorting = run(stack, is_data_connection, stream.sock)
    for piece in pieces:
        gevent.sleep(0)
        peer.sendall(piece)
    is_data = sorting.get()
    peer.close()
    return is_data, stream.sock.recv(100)


@pytest.mark.parametrize("pieces", [[DATA_PREFIX], [b"//da", b"ta\n"], [bytes([byte]) for byte in DATA_PREFIX]])
def test_the_prefix_of_a_data_connection_is_read_however_it_arrives(stack: ExitStack, pieces: list[bytes]) -> None:
    assert sort(stack, *pieces) == (True, b"")


def test_what_follows_the_prefix_stays_to_be_read(stack: ExitStack) -> None:
    assert sort(stack, DATA_PREFIX + b"\x16\x03") == (True, b"\x16\x03")


def test_a_tls_record_is_a_data_connection_and_stays_to_be_read(stack: ExitStack) -> None:
    assert sort(stack, b"\x16\x03\x01") == (True, b"\x16\x03\x01")


@pytest.mark.parametrize("words", [HELLO, b"\n", b"//database\n", b"GET /"])
def test_anything_else_is_no_data_connection_and_stays_to_be_read(stack: ExitStack, words: bytes) -> None:
    assert sort(stack, words) == (False, words)


@pytest.mark.parametrize("words", [b"", b"//da"], ids=["silence", "half of the prefix"])
def test_no_data_connection_is_waited_for_longer_than_first_bytes_may_take(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch, words: bytes
) -> None:
    monkeypatch.setattr(module, "FIRST_BYTES_WITHIN", SOON)
    assert sort(stack, words) == (False, words)


def test_the_end_of_the_stream_is_no_data_connection(stack: ExitStack) -> None:
    stream, peer = stack.enter_context(tcp_pair())
    assert isinstance(stream.sock, socket.socket)
    peer.close()
    assert not is_data_connection(stream.sock)
