"""Proofs that a peer has the tunnel's key: HMACs over what both ends have sent (docs/protocol.md). No I/O.

The key itself never leaves the process. What does leave it allows no cheap guesses: scrypt makes each of them cost
16 MiB and tens of milliseconds. `tunnel.handshake` exchanges and checks the proofs of the control connection, the data
dialer and the data listener those of data connections.
"""

from __future__ import annotations

import hashlib
import hmac
import os

from nodepass.wire.signals import Offer

_SALT = b"nodepass/2"
_COST, _BLOCKS, _PARALLEL = 16384, 8, 1
PROOF_LENGTH = 32  # bytes


def new_nonce() -> str:
    """16 random bytes as 32 hex digits."""
    return os.urandom(16).hex()


class Key:
    """The secret of a tunnel's two ends, stretched once: this takes tens of milliseconds."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.scrypt(
            secret.encode(), salt=_SALT, n=_COST, r=_BLOCKS, p=_PARALLEL, maxmem=64 << 20, dklen=PROOF_LENGTH
        )

    def __repr__(self) -> str:
        return "<Key>"

    def client_proof(self, client_nonce: str, server_nonce: str) -> str:
        """The client's proof on the control connection, 64 hex digits."""
        return _mac(self._key, b"client\n" + _nonces(client_nonce, server_nonce)).hex()

    def server_proof(self, client_nonce: str, server_nonce: str, offer: Offer) -> str:
        """The server's proof, which also covers the parameters of its offer, 64 hex digits."""
        return _mac(self._key, b"server\n" + _transcript(client_nonce, server_nonce, offer)).hex()

    def session(self, client_nonce: str, server_nonce: str, offer: Offer) -> SessionKey:
        """The key of the data connections that belong to one control connection."""
        return SessionKey(_mac(self._key, b"session\n" + _transcript(client_nonce, server_nonce, offer)))


class SessionKey:
    """Proves that a data connection belongs to the control connection that this key was made for."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<SessionKey>"

    def data_proof(self, id: str) -> bytes:
        """The client's proof on the data connection of this id, 32 bytes."""
        return _mac(self._key, b"data\n" + id.encode())


def same(one: str | bytes, other: str | bytes) -> bool:
    """Whether two proofs are the same, in a time that does not depend on where they differ."""
    return hmac.compare_digest(_bytes(one), _bytes(other))


def _bytes(proof: str | bytes) -> bytes:
    return proof.encode() if isinstance(proof, str) else proof


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, "sha256")


def _nonces(client_nonce: str, server_nonce: str) -> bytes:
    return f"nodepass/2\n{client_nonce}\n{server_nonce}\n".encode()


def _transcript(client_nonce: str, server_nonce: str, offer: Offer) -> bytes:
    return _nonces(client_nonce, server_nonce) + f"{offer.data_port}\n{offer.tls}\n{offer.fingerprint}\n".encode()
