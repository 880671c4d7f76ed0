"""The key's proofs, against the test vector of docs/protocol.md."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations

import pytest

from nodepass.wire.auth import PROOF_LENGTH, Key, Transcript, new_client_id, new_nonce, same, unknown_key
from nodepass.wire.negotiation import Challenge, Hello, Offer

SECRET, NAME = "correct horse battery staple", "web"
HELLO = Hello("000102030405060708090a0b0c0d0e0f", "0011223344556677", NAME, wants_addresses=True)
CHALLENGE = Challenge("f0e0d0c0b0a090807060504030201000")
OFFER = Offer(10101, 1, 5000, "00112233445566778899aabbccddeeff", True)
CHANNEL, DATA_CHANNEL = bytes(range(0x20, 0x40)), bytes(range(0x40, 0x60))
ID = "deadbeef"
TRANSCRIPT = Transcript(HELLO.encode()[:-1], CHALLENGE.encode()[:-1], CHANNEL)
OFFERED = OFFER.encode()[:-1]


@pytest.fixture(scope="module")
def key() -> Key:
    return Key(SECRET, NAME)


def test_the_vectors_lines_are_those_that_are_sent() -> None:
    assert TRANSCRIPT.hello == (
        b"//hello?v=2&nonce=000102030405060708090a0b0c0d0e0f&client=0011223344556677&name=web&want=from"
    )
    assert TRANSCRIPT.challenge == b"//challenge?nonce=f0e0d0c0b0a090807060504030201000"
    assert OFFERED == b"//10101?v=2&hb=5000&sid=00112233445566778899aabbccddeeff&mux=1#1"


def test_the_proofs_are_those_of_the_vector(key: Key) -> None:
    assert key._key.hex() == "b464f9db88965abb82b271ae7b7987b3daee0e4f4ea4e655e72ed89d5445956e"
    client = key.client_proof(TRANSCRIPT)
    assert client == "5572dd7349a8421780c3d14cd38cffc4d8cb13119b36d032878e36b4602ce066"
    server = key.server_proof(TRANSCRIPT, OFFERED)
    assert server == "a41fe8d28884785ddac92f540be9fe08effa5cc7cf7be5531e2865767431b8b4"
    session = key.session(TRANSCRIPT, OFFERED)
    assert session._key.hex() == "2f64196637a699b36f860923fa7a5517e0cc81cd71632d76eb6d81c6ed71baba"
    proof = session.id_proof(ID, DATA_CHANNEL)
    assert proof.hex() == "34d2d74d30df9d4a9fca531cee0f268b2f99ea001c1b96a000a0f30102b3b65b"
    answer = session.data_proof(ID, DATA_CHANNEL)
    assert answer.hex() == "e0847ecf7bc3be8bc2ffd52bd23efc7b82f43ddae137f4d2cf0a7b2dd96905f5"
    assert len(proof) == len(answer) == PROOF_LENGTH


CHANGES = [
    replace(TRANSCRIPT, hello=TRANSCRIPT.hello + b"&new=1"),
    replace(TRANSCRIPT, hello=TRANSCRIPT.hello.replace(b"&want=from", b"")),
    replace(TRANSCRIPT, hello=TRANSCRIPT.hello.replace(b"name=web", b"name=")),
    replace(TRANSCRIPT, challenge=TRANSCRIPT.challenge + b"&new=1"),
    replace(TRANSCRIPT, channel=b""),
    replace(TRANSCRIPT, channel=DATA_CHANNEL),
    # The same bytes, cut elsewhere.
    replace(TRANSCRIPT, hello=TRANSCRIPT.hello + b"/", challenge=TRANSCRIPT.challenge[1:]),
]


@pytest.mark.parametrize("other", CHANGES, ids=range(len(CHANGES)))
def test_a_proof_covers_both_lines_and_the_channel_byte_for_byte(key: Key, other: Transcript) -> None:
    assert key.client_proof(TRANSCRIPT) != key.client_proof(other)
    assert key.server_proof(TRANSCRIPT, OFFERED) != key.server_proof(other, OFFERED)
    assert key.session(TRANSCRIPT, OFFERED)._key != key.session(other, OFFERED)._key


@pytest.mark.parametrize(
    "offer",
    [
        replace(OFFER, data_port=10102),
        replace(OFFER, tls=2),
        replace(OFFER, heartbeat=5001),
        replace(OFFER, sid="f" * 32),
        replace(OFFER, mux=False),
    ],
    ids=["port", "tls", "heartbeat", "sid", "mux"],
)
def test_the_server_proves_every_parameter_of_its_offer(key: Key, offer: Offer) -> None:
    changed = offer.encode()[:-1]
    assert key.server_proof(TRANSCRIPT, OFFERED) != key.server_proof(TRANSCRIPT, changed)
    assert key.session(TRANSCRIPT, OFFERED)._key != key.session(TRANSCRIPT, changed)._key


def test_no_proof_serves_as_another(key: Key) -> None:
    """Neither end's proof can be sent back to it, nor one connection's used on another."""
    session = key.session(TRANSCRIPT, OFFERED)
    proofs = [
        bytes.fromhex(key.client_proof(TRANSCRIPT)),
        bytes.fromhex(key.server_proof(TRANSCRIPT, OFFERED)),
        session._key,
        *(
            prove(id, channel)
            for prove in (session.id_proof, session.data_proof)
            for id in (ID, "deadbee0")
            for channel in (DATA_CHANNEL, CHANNEL, b"")
        ),
    ]
    assert all(one != other for one, other in combinations(proofs, 2))


def test_a_key_is_another_one_under_another_name_and_the_name_is_in_the_salt(key: Key) -> None:
    nameless = Key(SECRET)
    salted = hashlib.scrypt(SECRET.encode(), salt=b"nodepass/2\n", n=16384, r=8, p=1, maxmem=64 << 20, dklen=32)
    assert nameless._key == salted
    assert nameless != key
    assert key == Key(SECRET, NAME)
    assert len({nameless, key, Key(SECRET, NAME)}) == 2


def test_a_tunnel_that_does_not_exist_has_a_key_that_nothing_proves() -> None:
    keys = [unknown_key() for _ in range(100)]
    assert len({key.client_proof(TRANSCRIPT) for key in keys}) == 100


def test_a_key_does_not_show_itself(key: Key) -> None:
    assert (repr(key), repr(key.session(TRANSCRIPT, OFFERED))) == ("<Key>", "<SessionKey>")


def test_random_values_are_fresh_and_of_their_length() -> None:
    nonces, clients = {new_nonce() for _ in range(100)}, {new_client_id() for _ in range(100)}
    assert len(nonces) == len(clients) == 100
    assert {len(bytes.fromhex(nonce)) for nonce in nonces} == {16}
    assert {len(bytes.fromhex(client)) for client in clients} == {8}


def test_proofs_are_compared_whole() -> None:
    assert same("ab", "ab")
    assert not same("ab", "abc")
    assert not same(b"ab", b"aa")
