"""How a control connection begins: the two ends agree on a version, prove the key, and the server says where data goes.

Each side of docs/protocol.md's negotiation is one function, and the two mirror each other. Nothing here listens, dials
or logs: a refusal is a RefusedError whose text is plain words. The server's `control_listener` and the client's
`client` call it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import gevent

from nodepass.errors import ProtocolError, RefusedError
from nodepass.tunnel.control import Agreement, Control
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

HELLO_WITHIN = 0.25  # seconds that a server without a key waits for a hello before it takes the client for v1
_SILENT = Hello("", "1")  # what a v1 client is taken to have said

Admission = Callable[[bool], AbstractContextManager[None]]


def accept_client(control: Control, key: Key | None, offer: Offer, timeout: float, admission: Admission) -> Agreement:
    """The server's side: read the hello, check the proof of the key, admit the client, send the offer.

    The client has `timeout` seconds to identify itself. `admission`, given whether the client has proven a key, raises
    RefusedError where another client stays connected; else it holds the slot until the offer has been sent. Raises
    OSError, RefusedError among them.
    """
    challenge = ""
    with gevent.Timeout(timeout, TimeoutError(f"no handshake within {timeout:.3g}s")):
        hello = _read_hello(control, key, timeout)
        if key:
            challenge = new_nonce()
            control.send(Challenge(challenge))
            _check_client(control, key.client_proof(hello.nonce, challenge), timeout)
    with admission(bool(challenge)):
        if hello is _SILENT:
            offer = Offer(offer.data_port, offer.tls)
        session = None
        if key:
            offer = replace(offer, mac=key.server_proof(hello.nonce, challenge, offer))
            session = key.session(hello.nonce, challenge, offer)
        control.send(offer)
        return control.agree(Agreement(offer, session))


def connect_to_server(control: Control, key: Key | None) -> Agreement:
    """The client's side: send the hello, prove the key, check the server's proof, take the offer.

    The deadline is the caller's. Raises OSError, RefusedError among them.
    """
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
        raise ProtocolError("the server sent two challenges")
    session = _check_server(opening, key, nonce, challenge) if key else None
    return control.agree(Agreement(opening, session))


def _read_hello(control: Control, key: Key | None, timeout: float) -> Hello:
    """The client's hello; `_SILENT` where none comes and no key is required."""
    try:
        with gevent.Timeout(timeout if key else min(timeout, HELLO_WITHIN), TimeoutError()):
            hello = parse_hello(control.read_line())
    except TimeoutError:
        if key:
            words = "no hello (wire v1, or a silent peer), and this server requires a key"
            raise RefusedError(KEY_REQUIRED, words) from None
        return _SILENT
    if hello.version != "2":
        raise RefusedError(VERSION, f"unsupported wire version {hello.version[:8]!r}; this server supports 1 and 2")
    return hello


def _check_client(control: Control, expected: str, timeout: float) -> None:
    """Read the client's proof of the key. Raises RefusedError where it is missing or wrong."""
    try:
        auth = parse_auth(control.read_line())
    except ProtocolError as error:
        raise RefusedError(KEY_MISMATCH, f"invalid answer to the challenge: {error}") from None
    except TimeoutError:
        raise RefusedError(KEY_REQUIRED, f"no proof of the key within {timeout:.3g}s") from None
    except ConnectionError:
        words = "client disconnected after the challenge (no key, or a different one)"
        raise RefusedError(KEY_REQUIRED, words) from None
    if not same(auth.mac, expected):
        raise RefusedError(KEY_MISMATCH, "the client's key does not match this server's")


def _check_server(offer: Offer, key: Key, nonce: str, challenge: str) -> SessionKey:
    """The session's key. Raises RefusedError where the server has not proven that it has the client's key."""
    if offer.version == 1:
        raise RefusedError(KEY_MISMATCH, "the server speaks wire v1, which has no key, and this client requires one")
    if not challenge or not offer.mac:
        words = "the server has no key and this client requires one; set the same TUNNEL_KEY_FILE on both ends"
        raise RefusedError(KEY_MISMATCH, words)
    if not same(offer.mac, key.server_proof(nonce, challenge, offer)):
        raise RefusedError(KEY_MISMATCH, "the server's key does not match this client's (possible man in the middle)")
    return key.session(nonce, challenge, offer)
