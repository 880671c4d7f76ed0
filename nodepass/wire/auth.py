"""Proofs that a peer has the tunnel's key: HMACs over what both ends have sent (docs/protocol.md). No I/O.

A proof covers whole lines, byte for byte, and the TLS channel that they went through: two ends that believe different
things about a tunnel, or that are on two channels, cannot agree. The key itself never leaves the process. What does
leave it allows no cheap guesses: scrypt makes each of them cost 16 MiB and tens of milliseconds. `tunnel.handshake`
exchanges and checks the proofs of the control connection, the data dialer and the data listener those of data
connections.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

_PROTOCOL = b"nodepass/2"
_COST, _BLOCKS, _PARALLEL = 16384, 8, 1
PROOF_LENGTH = 32  # bytes


def new_nonce() -> str:
    """16 random bytes as 32 hex digits."""
    return os.urandom(16).hex()


def new_client_id() -> str:
    """8 random bytes as 16 hex digits: what a client of a process calls itself."""
    return os.urandom(8).hex()


def client_id_for(server: str, id: str) -> str:
    """What a client with several servers, called `id`, calls itself to this one: the same whenever it connects.

    Two servers may be one machine at two addresses. Under one id each connection would take the other's place.
    """
    return f"{int(id, 16) ^ zlib.crc32(server.encode()):016x}"


@dataclass(frozen=True)
class Transcript:
    """The lines of a handshake up to the challenge, without their newlines, and the channel that they went through."""

    hello: bytes
    challenge: bytes
    channel: bytes  # the TLS exporter's 32 bytes; none without TLS


class Key:
    """The secret of a tunnel's two ends, stretched once for its name: this takes tens of milliseconds."""

    def __init__(self, secret: str, name: str = "") -> None:
        import hashlib  # here, as in the other functions: a process without keys does without OpenSSL's library

        salt = _PROTOCOL + b"\n" + name.encode()
        self._key = hashlib.scrypt(
            secret.encode(), salt=salt, n=_COST, r=_BLOCKS, p=_PARALLEL, maxmem=64 << 20, dklen=PROOF_LENGTH
        )

    def __repr__(self) -> str:
        return "<Key>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and same(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def client_proof(self, transcript: Transcript) -> str:
        """The client's proof on the control connection, 64 hex digits."""
        return _mac(self._key, b"client", *_lines(transcript)).hex()

    def server_proof(self, transcript: Transcript, offer: bytes) -> str:
        """The server's proof, which also covers its offer (a line without its `mac` and newline), 64 hex digits."""
        return _mac(self._key, b"server", *_lines(transcript), offer).hex()

    def session(self, transcript: Transcript, offer: bytes) -> SessionKey:
        """The key of the data connections that belong to one control connection."""
        return SessionKey(_mac(self._key, b"session", *_lines(transcript), offer))


class SessionKey:
    """Proves that both ends of a data connection are those of the control connection that this key was made for.

    `channel` is the TLS exporter of the data connection, none without TLS.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "<SessionKey>"

    def id_proof(self, id: str, channel: bytes) -> bytes:
        """The server's proof on the data connection of this id, 32 bytes."""
        return _mac(self._key, b"id", id.encode(), channel.hex().encode())

    def data_proof(self, id: str, channel: bytes) -> bytes:
        """The client's, 32 bytes."""
        return _mac(self._key, b"data", id.encode(), channel.hex().encode())


def unknown_key() -> Key:
    """A random key, which no peer can prove: for a tunnel that does not exist, in the time that a real one takes."""
    key = Key.__new__(Key)
    key._key = os.urandom(PROOF_LENGTH)
    return key


def same(one: str | bytes, other: str | bytes) -> bool:
    """Whether two proofs are the same, in a time that does not depend on where they differ."""
    import hmac

    return hmac.compare_digest(_bytes(one), _bytes(other))


def _bytes(proof: str | bytes) -> bytes:
    return proof.encode() if isinstance(proof, str) else proof


def _mac(key: bytes, *parts: bytes) -> bytes:
    """Each part is followed by a newline, so that no two lists of parts are the same text."""
    import hmac

    return hmac.digest(key, b"".join(part + b"\n" for part in parts), "sha256")


def _lines(transcript: Transcript) -> tuple[bytes, ...]:
    return _PROTOCOL, transcript.hello, transcript.challenge, transcript.channel.hex().encode()
