"""The key's proofs, against the test vector of docs/protocol.md."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nodepass.wire.auth import Key, new_nonce, same
from nodepass.wire.signals import Offer

CLIENT_NONCE = "000102030405060708090a0b0c0d0e0f"
SERVER_NONCE = "f0e0d0c0b0a090807060504030201000"
TUNNEL = Offer(10102, 0, 5000)


@pytest.fixture(scope="module")
def key() -> Key:
    return Key("correct horse battery staple")


def test_the_proofs_are_those_of_the_vector(key: Key) -> None:
    assert key._key.hex() == "f037d55a2a94b0f4829f20111e56fdb8bd62156b2cc316b4cff08809b9f6a864"
    client = key.client_proof(CLIENT_NONCE, SERVER_NONCE)
    assert client == "e7ff0df20186f6168b696ff9fe0cb2b2b86adbb768d9c718e69cb305e84e60a8"
    server = key.server_proof(CLIENT_NONCE, SERVER_NONCE, TUNNEL)
    assert server == "114d82eea31a76f4659de6a3e14d43749eb4a2c727844ac89123a6f52b1eaafb"
    session = key.session(CLIENT_NONCE, SERVER_NONCE, TUNNEL)
    assert session._key.hex() == "bfd0ab4234f84ed48934fab30b9a8a758c30123327c77fd5deb9e66651eaeeae"
    data = session.data_proof("deadbeef").hex()
    assert data == "267782a769d28fc0a00c4de08582df1f2c28715e6913de2af09f47ce17fd1b84"


@pytest.mark.parametrize("change", [{"data_port": 10103}, {"tls": 1}, {"fingerprint": "0" * 64}])
def test_the_server_vouches_for_every_parameter_that_matters(key: Key, change: dict[str, int | str]) -> None:
    other = replace(TUNNEL, **change)  # type: ignore[arg-type]
    proofs = {key.server_proof(CLIENT_NONCE, SERVER_NONCE, tunnel) for tunnel in (TUNNEL, other)}
    assert len(proofs) == 2


def test_a_key_does_not_show_itself(key: Key) -> None:
    session = key.session(CLIENT_NONCE, SERVER_NONCE, TUNNEL)
    assert (repr(key), repr(session)) == ("<Key>", "<SessionKey>")


def test_nonces_are_fresh_and_proofs_are_compared_whole() -> None:
    assert len({new_nonce() for _ in range(100)}) == 100
    assert same("ab", "ab")
    assert not same("ab", "abc")
    assert not same(b"ab", b"aa")
