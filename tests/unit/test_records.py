"""A connection under TLS whose BIOs are replaced goes on as if nothing had happened."""

from __future__ import annotations

import pytest
from OpenSSL import SSL

from nodepass.certificates import self_signed
from nodepass.records import Records
from nodepass.tls import client_context, server_context

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
