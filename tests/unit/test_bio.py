"""A connection under TLS whose BIOs are replaced goes on as if nothing had happened."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from OpenSSL import SSL

from nodepass.errors import TLSError
from nodepass.net.sockets import Socket
from nodepass.tls.bio import RECORD, STOPS, UNSAID, Records, inbox
from nodepass.tls.certificates import self_signed
from nodepass.tls.stream import TLSStream, accept_tls, client_context, server_context
from tests.support.key_updates import handshake as introduce
from tests.support.key_updates import key_updates

BATCH = bytes(range(256)) * 512


def handshake(connection: SSL.Connection) -> bool:
    try:
        connection.do_handshake()
    except SSL.WantReadError:
        return False
    return True


def move(source: SSL.Connection, sink: SSL.Connection) -> None:
    """Bring what one has written to the other."""
    try:
        while True:
            sink.bio_write(source.bio_read(1 << 20))
    except SSL.WantReadError:
        pass


def read_all(connection: SSL.Connection) -> bytes:
    received = b""
    try:
        while True:
            received += connection.recv(1 << 20)
    except SSL.WantReadError:
        return received


@pytest.fixture
def pair() -> tuple[SSL.Connection, SSL.Connection]:
    """A client and a server that have shaken hands."""
    identity = self_signed()
    client = SSL.Connection(client_context(verify=False), None)
    server = SSL.Connection(server_context(identity.chain, identity.key), None)
    client.set_connect_state()
    server.set_accept_state()
    while True:
        done = handshake(client)
        move(client, server)
        done = handshake(server) and done
        move(server, client)
        if done:
            return client, server


def test_bytes_arrive_before_and_after(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    for _ in range(3):
        for source, sink in (pair, pair[::-1]):
            source.send(BATCH)
            move(source, sink)
            assert read_all(sink) == BATCH
        Records(client).renew_bios()
        Records(server).renew_bios()


def test_what_waits_to_be_sent_goes_along(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    client.send(b"not yet on its way")
    Records(client).renew_bios()
    client.send(b", but in order")
    move(client, server)
    assert read_all(server) == b"not yet on its way, but in order"


def test_the_memory_of_a_batch_is_given_back(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    before = vars(client)["_from_ssl"]
    client.send(BATCH)
    move(client, server)
    Records(client).renew_bios()
    assert vars(client)["_from_ssl"] != before
    assert vars(client)["_into_ssl"] != before


def fill_inbox(source: SSL.Connection) -> int:
    """Put what a connection wants sent where the kernel would have put it."""
    wire = source.bio_read(len(inbox))
    inbox[: len(wire)] = wire
    return len(wire)


def test_what_was_lent_and_did_not_fit_outlives_the_inbox(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    payload = BATCH[: 3 * RECORD + 1000]
    client.send(payload)
    records, buffer = Records(server), bytearray(RECORD + 10)
    records.lend(fill_inbox(client))
    received = b""
    while not records.over:
        received += buffer[: records.decrypt(memoryview(buffer))]
        inbox[:] = bytes(len(inbox))  # others use it meanwhile
    assert received == payload


def test_a_record_that_comes_in_two_loans_is_one(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    client.send(b"question")
    wire = client.bio_read(len(inbox))
    records, buffer = Records(server), memoryview(bytearray(RECORD))
    for part in (wire[:3], wire[3:10], wire[10:]):
        assert records.over
        inbox[: len(part)] = part
        records.lend(len(part))
        received = records.decrypt(buffer)
        inbox[:] = bytes(len(inbox))
    assert records.over
    assert buffer[:received] == b"question"


def test_the_end_is_told_after_the_payload_before_it(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    client.send(BATCH[: RECORD + 1])
    client.shutdown()
    records, buffer = Records(server), memoryview(bytearray(4 * RECORD))
    records.lend(fill_inbox(client))
    assert records.decrypt(buffer) == RECORD + 1
    with pytest.raises(SSL.ZeroReturnError):
        records.decrypt(buffer)


def test_what_is_fed_after_a_loan_is_read(pair: tuple[SSL.Connection, SSL.Connection]) -> None:
    client, server = pair
    records, buffer = Records(server), memoryview(bytearray(RECORD))
    for text, give in ((b"lent", records.lend), (b"fed", records.feed), (b"lent again", records.lend)):
        client.send(text)
        give(fill_inbox(client))
        assert buffer[: records.decrypt(buffer)] == text
        assert records.over


@pytest.fixture
def talk() -> Iterator[tuple[TLSStream, socket.socket, bytes]]:
    """A stream of a server's, its peer's socket, and the peer's first secret."""
    identity = self_signed()
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as peer:
        secret = peer.submit(introduce, far)
        sock = Socket(near.family, near.type, near.proto, near.detach())
        sock.setblocking(False)
        stream = accept_tls(sock, server_context(identity.chain, identity.key))
        yield stream, far, secret.result()
        stream.close()


def test_keys_may_be_updated_now_and_then(talk: tuple[TLSStream, socket.socket, bytes]) -> None:
    stream, peer, secret = talk
    peer.sendall(key_updates(secret, STOPS // 2))
    with pytest.raises(BlockingIOError):
        stream.read(memoryview(bytearray(100)))
    assert stream.peek() is None


def test_too_many_key_updates_at_once_are_an_error(talk: tuple[TLSStream, socket.socket, bytes]) -> None:
    stream, peer, secret = talk
    peer.sendall(key_updates(secret, 2 * STOPS))
    with pytest.raises(TLSError, match="too many records"):
        stream.read(memoryview(bytearray(100)))


def test_too_many_key_updates_one_by_one_are_the_end_of_an_idle_connection(
    talk: tuple[TLSStream, socket.socket, bytes],
) -> None:
    """Their answers wait for a write that does not come."""
    stream, peer, secret = talk
    updates = key_updates(secret, UNSAID)
    size = len(updates) // UNSAID
    borne = 0
    for start in range(0, len(updates), size):
        peer.sendall(updates[start : start + size])
        if stream.peek() is False:
            break
        borne += 1
    assert UNSAID // size <= borne <= UNSAID // size + 1
