"""The key arithmetic of wire v2: what either end proves, and with what. Lines are passed as bytes without their end."""

from __future__ import annotations

import functools
import hashlib
import hmac
from dataclasses import dataclass

PROOF = 32
"""Bytes of a proof on a data connection; in a line it is hex, twice as many digits."""

SECRET = "correct horse battery staple"
"""Good enough for the program: 22 characters or more, 10 different ones or more."""


@functools.lru_cache
def stretch(secret: str, name: str = "") -> bytes:
    """K, the key that a secret stands for in the tunnel of this name."""
    salt = b"nodepass/2\n" + name.encode()
    return hashlib.scrypt(secret.encode(), salt=salt, n=16384, r=8, p=1, dklen=32)


def sign(key: bytes, text: bytes) -> bytes:
    """HMAC-SHA256."""
    return hmac.digest(key, text, "sha256")


@dataclass(frozen=True)
class Agreement:
    """What the two ends of a control connection have said, and the proofs that follow from it.

    `channel` is X: the control connection's TLS exporter in hex, empty without TLS. `offer` is O: without its mac.
    """

    secret: str
    name: str = ""
    hello: bytes = b""
    challenge: bytes = b""
    channel: str = ""
    offer: bytes = b""

    @property
    def _key(self) -> bytes:
        return stretch(self.secret, self.name)

    @property
    def _negotiation(self) -> bytes:
        parts = b"nodepass/2", self.hello, self.challenge, self.channel.encode()
        return b"".join(part + b"\n" for part in parts)

    @property
    def _terms(self) -> bytes:
        return self._negotiation + self.offer + b"\n"

    def client_proof(self) -> str:
        """What the client shows in `//auth`."""
        return sign(self._key, b"client\n" + self._negotiation).hex()

    def server_proof(self) -> str:
        """What the server shows in its offer."""
        return sign(self._key, b"server\n" + self._terms).hex()

    def session_key(self) -> bytes:
        """The key of this control connection's data connections."""
        return sign(self._key, b"session\n" + self._terms)

    def id_proof(self, identity: bytes, channel: str = "") -> bytes:
        """What the server shows on a data connection; `channel` is that connection's exporter in hex."""
        return self._data_proof(b"id", identity, channel)

    def data_proof(self, identity: bytes, channel: str = "") -> bytes:
        """What the client shows on a data connection."""
        return self._data_proof(b"data", identity, channel)

    def _data_proof(self, label: bytes, identity: bytes, channel: str) -> bytes:
        return sign(self.session_key(), label + b"\n" + identity + b"\n" + channel.encode() + b"\n")
