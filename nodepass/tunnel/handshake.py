"""How a control connection begins: versions are told apart, the key is proven, the server says where data goes.

Both sides of docs/protocol.md's negotiation, each as one story. Nothing here listens, dials or logs: a refusal is an
exception whose text is plain words, and who called logs it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gevent

from nodepass.errors import ProtocolError, RefusedError
from nodepass.tunnel.control import Control
from nodepass.wire.auth import Key, SessionKey, new_nonce, same
from nodepass.wire.signals import (
    KEY_MISMATCH,
    KEY_REQUIRED,
    REASONS,
    VERSION,
    Auth,
    Challenge,
    Hello,
    Offer,
    Refusal,
    parse_auth,
    parse_hello,
    parse_opening,
)

HELLO_WITHIN = 0.25  # seconds that a server without a key gives a client to say that it speaks v2


@dataclass(frozen=True)
class Agreement:
    """What the two ends have agreed on; `session` is there when they have proven a key."""

    tunnel: Offer
    session: SessionKey | None = None

    @property
    def version(self) -> int:
        """The wire's version."""
        return self.tunnel.version


@dataclass(frozen=True)
class Caller:
    """A client whose first lines a server has read."""

    version: int
    nonce: str = ""
    challenge: str = ""  # the server's nonce, where the client has proven the key


# The server's side, in two steps: who calls, and, once it may be the client, where data goes.


def hear(control: Control, key: Key | None, timeout: float) -> Caller:
    """Read what a newcomer has to say, and have it prove the key. Raises OSError, RefusedError among them."""
    with gevent.Timeout(timeout, TimeoutError(f"no handshake within {timeout:.3g}s")):
        hello = _hear_hello(control, timeout if key else min(timeout, HELLO_WITHIN))
        if hello is None:
            if key:
                raise RefusedError(KEY_REQUIRED, "it speaks wire v1, or nothing, and this server requires a key")
            return Caller(1)
        if hello.version != "2":
            raise RefusedError(VERSION, f"it speaks version {hello.version[:8]!r} of the wire, this server 1 and 2")
        if not key:
            return Caller(2, hello.nonce)
        challenge = new_nonce()
        control.send(Challenge(challenge))
        try:
            auth = parse_auth(control.read_line())
        except ProtocolError as error:
            raise RefusedError(KEY_MISMATCH, f"its answer to the challenge is no proof of the key: {error}") from None
        except TimeoutError:
            raise RefusedError(KEY_REQUIRED, f"it did not prove the key within {timeout:.3g}s") from None
        except ConnectionError:
            raise RefusedError(KEY_REQUIRED, "it left at the challenge: it has no key, or another one") from None
        if not same(auth.mac, key.client_proof(hello.nonce, challenge)):
            raise RefusedError(KEY_MISMATCH, "its key does not match this server's")
        return Caller(2, hello.nonce, challenge)


def _hear_hello(control: Control, timeout: float) -> Hello | None:
    """The hello, or None in silence."""
    try:
        with gevent.Timeout(timeout, TimeoutError()):
            return parse_hello(control.read_line())
    except TimeoutError:
        return None


def answer(control: Control, caller: Caller, key: Key | None, tunnel: Offer) -> Agreement:
    """Tell a client that it is the one, in its own version. Raises OSError."""
    if caller.version == 1:
        tunnel = Offer(tunnel.data_port, tunnel.tls)
    session = None
    if key:
        tunnel = replace(tunnel, mac=key.server_proof(caller.nonce, caller.challenge, tunnel))
        session = key.session(caller.nonce, caller.challenge, tunnel)
    control.send(tunnel)
    return Agreement(tunnel, session)


# The client's side


def introduce(control: Control, key: Key | None) -> Agreement:
    """Say hello and come to an agreement; the deadline is the caller's. Raises OSError, RefusedError among them."""
    nonce, challenge = new_nonce(), ""
    control.send(Hello(nonce))
    opening = parse_opening(control.read_line())
    if isinstance(opening, Challenge):
        if not key:
            raise RefusedError(KEY_REQUIRED, REASONS[KEY_REQUIRED])
        challenge = opening.nonce
        control.send(Auth(key.client_proof(nonce, challenge)))
        opening = parse_opening(control.read_line())
    if isinstance(opening, Refusal):
        raise RefusedError(opening.reason, REASONS.get(opening.reason, ""))
    if not isinstance(opening, Offer):
        raise ProtocolError("the server challenged twice")
    if not key:
        return Agreement(opening)
    return Agreement(opening, _check_server(opening, key, nonce, challenge))


def _check_server(tunnel: Offer, key: Key, nonce: str, challenge: str) -> SessionKey:
    """The session's key, if the server has shown that it has ours. A client with a key never settles for less."""
    if tunnel.version == 1:
        raise RefusedError(KEY_MISMATCH, "the server speaks wire v1, which knows no key; this client requires one")
    if not challenge or not tunnel.mac:
        raise RefusedError(KEY_MISMATCH, "the server has no key; this client requires one: give both the same")
    if not same(tunnel.mac, key.server_proof(nonce, challenge, tunnel)):
        raise RefusedError(KEY_MISMATCH, "the server's key does not match this client's, or somebody is in between")
    return key.session(nonce, challenge, tunnel)
