"""Records through memory BIOs, by pyOpenSSL's private names and by its public API: the same tests for both."""

from __future__ import annotations

import ast
import inspect
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from OpenSSL import SSL

from nodepass.errors import TLSError
from nodepass.net.sockets import Socket
from nodepass.tls import bio
from nodepass.tls.bio import HEADER, RECORD, STOPS, UNSENT, PrivateRecords, PublicRecords, Records, inbox, missing_names
from nodepass.tls.certificates import self_signed
from nodepass.tls.contexts import client_context, server_context
from nodepass.tls.stream import TLSStream, accept_tls
from nodepass.tls.verify import Verify
from tests.support.key_updates import handshake as introduce
from tests.support.key_updates import key_updates
from tests.support.table import each_row
from tests.support.without_private_names import Hiding

BATCH = bytes(range(256)) * 512
CIPHER_OVERHEAD = 256
"""Bytes that a record may be longer than its payload, at most (RFC 8446, 5.2)."""

Pair = tuple[SSL.Connection, SSL.Connection]
Open = Callable[[SSL.Connection], Records]


@pytest.fixture(params=[PrivateRecords, PublicRecords], ids=["private", "public"])
def open_records(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Either implementation; streams use it too."""
    monkeypatch.setattr(bio, "Implementation", request.param)
    return bio.open_records


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


def connect(kind: type[SSL.Connection] = SSL.Connection) -> Pair:
    """A client and a server after their handshake."""
    identity = self_signed()
    client = kind(client_context(Verify.IGNORE), None)
    server = kind(server_context(identity.chain, identity.key), None)
    client.set_connect_state()
    server.set_accept_state()
    while True:
        done = handshake(client)
        move(client, server)
        done = handshake(server) and done
        move(server, client)
        if done:
            assert read_all(client) == b""  # session tickets
            return client, server


@pytest.fixture
def pair() -> Pair:
    return connect()


def fill_inbox(wire: bytes) -> int:
    """Put records where the kernel would have put them."""
    inbox[: len(wire)] = wire
    return len(wire)


def wire_of(connection: SSL.Connection) -> bytes:
    """What a connection wants sent."""
    return connection.bio_read(len(inbox))


def decrypt_all(records: Records, buffer: bytearray) -> bytes:
    received = b""
    while records.unread:
        received += buffer[: records.decrypt(memoryview(buffer))]
    return received


def test_batches_arrive_before_and_after_memory_is_given_back(pair: Pair, open_records: Open) -> None:
    client, server = (open_records(each) for each in pair)
    buffer = bytearray(2 * len(BATCH))
    for _ in range(3):
        for source, sink in ((client, server), (server, client)):
            source.encrypt(BATCH)
            wire = bytes(source.take())
            received = b""
            for start in range(0, len(wire), 50_000):
                sink.lend(fill_inbox(wire[start : start + 50_000]))
                received += decrypt_all(sink, buffer)
            assert received == BATCH
        assert client.shrink()
        assert server.shrink()


def test_output_that_waits_survives_a_shrink(pair: Pair, open_records: Open) -> None:
    client, server = pair
    records = open_records(client)
    records.encrypt(b"not yet on its way")
    assert records.shrink()
    records.encrypt(b", but in order")
    server.bio_write(bytes(records.take()))
    assert not records.take()
    assert read_all(server) == b"not yet on its way, but in order"


def test_nothing_shrinks_while_records_are_unread(pair: Pair, open_records: Open) -> None:
    client, server = pair
    client.sendall(b"question")
    records = open_records(server)
    records.feed(fill_inbox(wire_of(client)))
    assert not records.shrink()
    assert decrypt_all(records, bytearray(RECORD)) == b"question"
    assert records.shrink()


def test_private_records_give_the_memory_of_a_batch_back(pair: Pair) -> None:
    client, server = pair
    before = vars(client)["_from_ssl"], vars(client)["_into_ssl"]
    client.sendall(BATCH)
    move(client, server)
    PrivateRecords(client).shrink()
    assert vars(client)["_from_ssl"] not in before
    assert vars(client)["_into_ssl"] not in before


def test_only_a_few_connections_hold_the_memory_of_a_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bio, "MOST_HELD", 2 * len(BATCH))
    monkeypatch.setattr(bio, "_large", {})
    clients = [connect()[0] for _ in range(4)]
    before = [vars(each)["_from_ssl"] for each in clients]
    for each in clients:
        records = PrivateRecords(each)
        records.encrypt(BATCH)
        records.take()
    assert [vars(each)["_from_ssl"] is not old for each, old in zip(clients, before, strict=True)] == [True] * 2 + [
        False
    ] * 2
    assert len(bio._large) == 2


class Measured(SSL.Connection):
    """Notes how many bytes its BIOs hold at most; one that reads has read all of its incoming BIO."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.incoming = self.outgoing = self.most = 0

    def bio_write(self, buf: Any) -> int:
        self.incoming += len(buf)
        self.most = max(self.most, self.incoming)
        return super().bio_write(buf)

    def recv_into(self, *args: Any) -> int:
        self.incoming = 0
        return super().recv_into(*args)

    def send(self, buf: Any, flags: int = 0) -> int:
        self.outgoing += len(buf)
        self.most = max(self.most, self.outgoing)
        return super().send(buf, flags)

    def bio_read(self, bufsiz: int) -> bytes:
        self.outgoing = 0
        return super().bio_read(bufsiz)


def test_public_records_never_put_more_than_a_record_into_a_bio() -> None:
    client, server = connect(Measured)
    assert isinstance(client, Measured)
    assert isinstance(server, Measured)
    client.most = server.most = server.incoming = 0
    source, sink = PublicRecords(client), PublicRecords(server)
    source.encrypt(BATCH[:100_000])
    sink.lend(fill_inbox(bytes(source.take())))
    assert decrypt_all(sink, bytearray(1000)) == BATCH[:100_000]
    assert 1000 < client.most <= RECORD
    assert 1000 < server.most <= HEADER + RECORD + CIPHER_OVERHEAD


def test_what_was_lent_and_did_not_fit_outlives_the_inbox(pair: Pair, open_records: Open) -> None:
    client, server = pair
    payload = BATCH[: 3 * RECORD + 1000]
    client.sendall(payload)
    records, buffer = open_records(server), bytearray(RECORD + 10)
    records.lend(fill_inbox(wire_of(client)))
    received = b""
    while records.unread:
        received += buffer[: records.decrypt(memoryview(buffer))]
        inbox[:] = bytes(len(inbox))  # others use it meanwhile
    assert received == payload


@pytest.mark.parametrize("cuts", [(3, 10), (4, 5), (5, 6), (2, 3)])
def test_a_record_that_arrives_in_parts_is_one(pair: Pair, open_records: Open, cuts: tuple[int, int]) -> None:
    client, server = pair
    client.sendall(b"question")
    wire = wire_of(client)
    records, buffer = open_records(server), memoryview(bytearray(RECORD))
    for part in (wire[: cuts[0]], wire[cuts[0] : cuts[1]], wire[cuts[1] :]):
        assert not records.unread
        records.lend(fill_inbox(part))
        received = records.decrypt(buffer)
        inbox[:] = bytes(len(inbox))
    assert not records.unread
    assert bytes(buffer[:received]) == b"question"


def test_the_end_is_told_after_the_payload_before_it(pair: Pair, open_records: Open) -> None:
    client, server = pair
    client.sendall(BATCH[: RECORD + 1])
    client.shutdown()
    records, buffer = open_records(server), memoryview(bytearray(4 * RECORD))
    records.lend(fill_inbox(wire_of(client)))
    assert records.decrypt(buffer) == RECORD + 1
    for _ in range(2):
        assert records.unread
        with pytest.raises(SSL.ZeroReturnError):
            records.decrypt(buffer)


def test_what_is_fed_after_a_loan_is_read(pair: Pair, open_records: Open) -> None:
    client, server = pair
    records, buffer = open_records(server), memoryview(bytearray(RECORD))
    for text, give in ((b"lent", records.lend), (b"fed", records.feed), (b"lent again", records.lend)):
        client.send(text)
        give(fill_inbox(wire_of(client)))
        assert bytes(buffer[: records.decrypt(buffer)]) == text
        assert not records.unread


def test_a_record_that_was_tampered_with_is_an_error(pair: Pair, open_records: Open) -> None:
    client, server = pair
    client.sendall(b"question")
    wire = bytearray(wire_of(client))
    wire[-1] ^= 1
    records = open_records(server)
    records.feed(fill_inbox(bytes(wire)))
    with pytest.raises(SSL.Error, match="bad record mac"):
        records.decrypt(memoryview(bytearray(100)))


def in_small_records(record: bytes, size: int) -> bytes:
    """The same message in records of so many bytes each."""
    start, message = record[: HEADER - 2], record[HEADER:]
    parts = (message[place : place + size] for place in range(0, len(message), size))
    return b"".join(start + len(part).to_bytes(2, "big") + part for part in parts)


def test_a_handshake_in_more_records_than_stops_is_accepted(open_records: Open) -> None:
    identity = self_signed()
    client = SSL.Connection(client_context(Verify.IGNORE), None)
    server = SSL.Connection(server_context(identity.chain, identity.key), None)
    client.set_connect_state()
    server.set_accept_state()
    records = open_records(server)
    handshake(client)
    hello = wire_of(client)
    assert len(hello) > 2 * STOPS
    records.feed(fill_inbox(in_small_records(hello, 2)))
    while not handshake(server) and records.go_on():
        pass
    client.bio_write(bytes(records.take()))
    assert handshake(client)


Talk = tuple[TLSStream, socket.socket, bytes]


@pytest.fixture
def talk(open_records: Open) -> Iterator[Talk]:  # noqa: ARG001  # the stream uses them
    """A server's stream, its peer's socket, and the peer's first secret."""
    identity = self_signed()
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as peer:
        secret = peer.submit(introduce, far)
        secret.add_done_callback(lambda done: far.close() if done.exception() else None)
        sock = Socket(near.family, near.type, near.proto, near.detach())
        sock.setblocking(False)
        stream = accept_tls(sock, server_context(identity.chain, identity.key))
        yield stream, far, secret.result()
        stream.close()


def test_a_stream_that_ends_without_close_notify_is_an_error(talk: Talk) -> None:
    stream, peer, _ = talk
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(TLSError, match="close_notify"):
        stream.read(memoryview(bytearray(100)))
    assert stream.peek() is False


def test_keys_may_be_updated_now_and_then(talk: Talk) -> None:
    stream, peer, secret = talk
    peer.sendall(key_updates(secret, STOPS // 2))
    with pytest.raises(BlockingIOError):
        stream.read(memoryview(bytearray(100)))
    assert stream.peek() is None


def test_too_many_key_updates_at_once_are_an_error(talk: Talk) -> None:
    stream, peer, secret = talk
    peer.sendall(key_updates(secret, 2 * STOPS))
    with pytest.raises(TLSError, match="too many records"):
        stream.read(memoryview(bytearray(100)))


def test_too_many_key_updates_one_by_one_end_an_idle_connection(talk: Talk) -> None:
    """Their answers wait for a write that does not come."""
    stream, peer, secret = talk
    stream.write(b"tickets go with this")
    updates = key_updates(secret, UNSENT)
    size = len(updates) // UNSENT
    accepted = 0
    for start in range(0, len(updates), size):
        peer.sendall(updates[start : start + size])
        if stream.peek() is False:
            break
        accepted += 1
    assert UNSENT // size <= accepted <= UNSENT // size + 1


LOOKED_FOR = {
    "_lib": bio._OPENSSL_NAMES,
    "_ffi": bio._FFI_NAMES,
    "connection": bio._CONNECTION_NAMES,
}


def used_names() -> dict[str, set[str]]:
    """The private names in the source of PrivateRecords, by where they are."""
    used: dict[str, set[str]] = {where: set() for where in LOOKED_FOR}
    for node in ast.walk(ast.parse(inspect.getsource(bio))):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in ("_lib", "_ffi"):
            used[owner].add(node.attr)
        elif owner == "self._connection" and node.attr.startswith("_"):
            used["connection"].add(node.attr)
    return used


def test_every_private_name_in_use_is_looked_for_and_no_other() -> None:
    assert used_names() == {where: set(names) for where, names in LOOKED_FOR.items()}


def test_this_pyopenssl_has_all_private_names() -> None:
    """A version that requirements.txt allows and that lacks one is slower, which its release notes do not say."""
    assert missing_names(SSL) == []
    assert bio.Implementation is PrivateRecords


@each_row(("where", "name"), [(where, name) for where, names in LOOKED_FOR.items() for name in names])
def test_a_private_name_that_is_missing_is_noticed(where: str, name: str) -> None:
    if where == "connection":
        module: Any = Hiding(SSL, Connection=lambda *args: Hiding(SSL.Connection(*args), **{name: None}))
    else:
        module = Hiding(SSL, **{where: Hiding(getattr(SSL, where), **{name: None})})
    assert missing_names(module) == [name]


def test_a_pyopenssl_without_cffi_is_noticed() -> None:
    module = Hiding(SSL, _lib=None, _ffi=None)
    assert set(missing_names(module)) == {*bio._OPENSSL_NAMES, *bio._FFI_NAMES}
