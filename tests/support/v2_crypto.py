"""The key arithmetic of wire v2, written from its description: what either end proves, and with what."""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from dataclasses import dataclass

SALT = b"nodepass/2"
PROOF = 32
"""Bytes of a proof on a data connection; on the control connection it is hex digits, twice as many."""


@functools.lru_cache
def stretch(secret: str) -> bytes:
    """K, the key that a secret stands for."""
    return hashlib.scrypt(secret.encode(), salt=SALT, n=16384, r=8, p=1, dklen=32)


def make_nonce() -> str:
    """A fresh nonce: 16 random bytes in hex."""
    return secrets.token_hex(16)


def sign(key: bytes, text: bytes) -> bytes:
    """HMAC-SHA256."""
    return hmac.digest(key, text, "sha256")


@dataclass(frozen=True)
class Transcript:
    """What one negotiation agreed on, and the proofs that follow from it."""

    secret: str
    client_nonce: str
    server_nonce: str
    port: int = 0
    tls: int = 0
    fingerprint: str = ""

    @property
    def _nonces(self) -> bytes:
        return f"nodepass/2\n{self.client_nonce}\n{self.server_nonce}\n".encode()

    @property
    def _terms(self) -> bytes:
        return self._nonces + f"{self.port}\n{self.tls}\n{self.fingerprint}\n".encode()

    def client_proof(self) -> str:
        """What the client shows the server."""
        return sign(stretch(self.secret), b"client\n" + self._nonces).hex()

    def server_proof(self) -> str:
        """What the server shows the client."""
        return sign(stretch(self.secret), b"server\n" + self._terms).hex()

    def session_key(self) -> bytes:
        """The key of this control connection."""
        return sign(stretch(self.secret), b"session\n" + self._terms)

    def data_proof(self, identity: bytes) -> bytes:
        """What the client shows on the data connection with this id."""
        return sign(self.session_key(), b"data\n" + identity)
