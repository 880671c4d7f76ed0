"""How a control connection begins: the ends agree on a version and on TLS, prove the key, and the server offers.

Each side of docs/protocol.md's negotiation is one function, and the two mirror each other. Nothing here listens, dials
or logs: a refusal is a RefusedError whose text is plain words. The server's `control_listener` and the client's
`connector` call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nodepass.config.hostport import certified_host
from nodepass.config.urls import ClientURL
from nodepass.errors import ClearAnswer, ClosedError, ProtocolError, RefusedError, VerificationError, reason
from nodepass.net.sockets import LOCAL
from nodepass.tunnel.control import Agreement, ClientControl, ServerControl
from nodepass.wire.auth import Key, SessionKey, Transcript, new_nonce, same
from nodepass.wire.lines import printable
from nodepass.wire.negotiation import (
    KEY_MISMATCH,
    KEY_REQUIRED,
    NO_TLS,
    REASONS,
    VERSION,
    Auth,
    Challenge,
    Hello,
    Offer,
    Refusal,
    StartTLS,
    parse_auth,
    parse_opening,
    without_mac,
)
from nodepass.wire.signals import CERTIFICATE, Bye

if TYPE_CHECKING:
    from nodepass.tls.verify import Expected

SAME_KEY = "set the same key on both ends"
IS_IT = "is this the server's tunnel address, and not its target address? If so, its log has the reason"
ONLY_TLS = (
    "it began in the clear, and the proxy, or a firewall on the way, may let only TLS pass: with a key, or with tls=1,"
    " it begins with TLS"
)


@dataclass(frozen=True)
class Candidate:
    """A client that asks for a place: what it calls itself, and the key that it has proven."""

    control: ServerControl
    client: str
    key: Key | None


Admission = Callable[[Candidate], AbstractContextManager[None]]


def accept_client(
    control: ServerControl, hello: Hello, line: bytes, keys: Sequence[Key], offer: Offer, admission: Admission
) -> Agreement:
    """The server's side after the hello, whose text is `line`: check the proof of a key, admit the client, offer.

    `keys` are those of the tunnel, none where it has no key. `admission` raises RefusedError where no place is free;
    else it holds the place until the offer has been sent. The deadline for what the client must say is the caller's.
    Raises OSError, RefusedError among them.
    """
    key, transcript = None, Transcript(line, b"", control.channel)
    if keys:
        challenge = Challenge(new_nonce())
        control.send(challenge)
        transcript = replace(transcript, challenge=challenge.encode()[:-1])
        key = _find_key(_read_proof(control), keys, transcript)
    with admission(Candidate(control, hello.client, key)):
        session = None
        if key:
            text = offer.encode()[:-1]
            offer = replace(offer, mac=key.server_proof(transcript, text))
            session = key.session(transcript, text)
        control.send(offer)
        told = hello.client, hello.wants_addresses, hello.is_check, hello.off
        return control.agree(Agreement(offer, session, key, *told))


def _read_proof(control: ServerControl) -> str:
    """The client's proof of a key. Raises RefusedError where it does not come."""
    try:
        return parse_auth(control.read_line()).mac
    except ProtocolError as error:
        raise RefusedError(KEY_MISMATCH, f"invalid answer to the challenge: {error}") from None
    except ClosedError:
        words = f"client disconnected after the challenge (no key, or a different one); {SAME_KEY}"
        raise RefusedError(KEY_REQUIRED, words) from None


def _find_key(proof: str, keys: Sequence[Key], transcript: Transcript) -> Key:
    """Which of the tunnel's keys the client has proven: during a rotation there are two."""
    for key in keys:
        if same(proof, key.client_proof(transcript)):
            return key
    raise RefusedError(
        KEY_MISMATCH, f"the client's key for this tunnel is not the server's, or something was changed; {SAME_KEY}"
    )


@dataclass(frozen=True)
class Terms:
    """What a client's URL and key demand; nothing that the server says weakens it."""

    host: str  # of the server: the name that its certificate must have in mode 2
    tls: int = 0  # the least mode that is accepted; 0: the server's choice
    wire: str = "auto"  # auto, 1 or 2
    name: str = ""  # of the tunnel
    client: str = ""  # what this client calls itself
    key: Key | None = None
    wants_addresses: bool = False  # launches carry the visitor's address
    off: str = ""  # `tcp` or `udp`, which this client does not serve
    is_check: bool = False  # the server's log names a check as such

    @classmethod
    def of(cls, url: ClientURL, client: str, keys: Sequence[Key], wants_addresses: bool = False) -> Terms:
        """Those of a client URL whose defaults are filled in, for its first server; see `for_server`.

        Of several keys the client proves the first.
        """
        host = certified_host(url.tunnel.host or LOCAL)
        return cls(host, url.demand, url.wire, url.tunnel_name, client, next(iter(keys), None), wants_addresses)

    def for_server(self, host: str, client: str) -> Terms:
        """The same for the server of this name or address, to which the client calls itself this."""
        return replace(self, host=certified_host(host or LOCAL), client=client)

    def prepare(self) -> None:
        """Do before the connect what the first byte would wait for: a server takes long silence for wire v1."""
        if self.tls and self.wire != "1":
            from nodepass.tls.contexts import client_context

            client_context(self.expected().verify)

    def expected(self) -> Expected:
        """What the certificate must be: where mode 2 is not demanded, it is judged when the server offers that mode."""
        from nodepass.tls.verify import Expected, Verify

        return Expected(self.host, Verify.ENFORCE if self.tls == 2 else Verify.KEEP)


def connect_to_server(control: ClientControl, terms: Terms) -> Agreement:
    """The client's side: speak first, go over to TLS, prove the key, check the server's proof, take the offer.

    The deadline is the caller's. Raises OSError, RefusedError and VerificationError among them.
    """
    if terms.wire == "1":
        return _take_v1(control, _expect_offer(parse_opening(control.read_line()), terms), terms)
    if terms.tls:
        line = _start_tls(control, terms)
        if line is not None:
            return _take_v1(control, _expect_offer(parse_opening(line), terms), terms)
    agreement = _negotiate(control, terms)
    if agreement is None:  # the server answered //tls
        if not control.stream.plain:
            raise ProtocolError("the server asked for TLS inside TLS")
        if control.has_unread:
            raise ProtocolError("the server sent bytes in the clear where TLS must begin (possible man in the middle)")
        if _start_tls(control, terms) is not None:
            raise ProtocolError("the server announced TLS and then answered in the clear (possible man in the middle)")
        agreement = _negotiate(control, terms)
    if agreement is None:
        raise ProtocolError("the server asked for TLS inside TLS")
    return agreement


def _start_tls(control: ClientControl, terms: Terms) -> bytes | None:
    """Go over to TLS; where the server answers the ClientHello in the clear, the line that it sent."""
    from nodepass.tls.stream import connect_tls

    try:
        control.secure(connect_tls(control.sock, terms.expected()))
    except ClearAnswer:
        return control.read_line()
    return None


def _negotiate(control: ClientControl, terms: Terms) -> Agreement | None:
    """Hello to offer, on the present channel; None where the server wants TLS first."""
    hello = Hello(
        new_nonce(),
        terms.client,
        terms.name,
        terms.wants_addresses,
        is_check=terms.is_check,
        off=terms.off,
    )
    control.send(hello)
    line = control.read_line()
    opening = parse_opening(line)
    challenge = b""
    if isinstance(opening, StartTLS):
        return None
    if isinstance(opening, Challenge):
        if not terms.key:
            raise RefusedError(KEY_REQUIRED, REASONS[KEY_REQUIRED])
        challenge = line
        transcript = Transcript(hello.encode()[:-1], challenge, control.channel)
        control.send(Auth(terms.key.client_proof(transcript)))
        line = control.read_line()
        opening = parse_opening(line)
    offer = _expect_offer(opening, terms)
    if offer.version == 1:
        if not control.stream.plain:
            raise ProtocolError("an offer of wire v1 inside TLS")
        return _take_v1(control, offer, terms)
    _check_tls(control, offer, terms)
    if not terms.key:
        return control.agree(Agreement(offer))
    transcript = Transcript(hello.encode()[:-1], challenge, control.channel)
    return control.agree(Agreement(offer, _check_server(offer, line, terms.key, transcript), terms.key))


def explain(error: OSError, hint: str = IS_IT) -> str:
    """Why there is no connection, and, where the server has left without a word, where to look: `hint`."""
    if isinstance(error, ClosedError | ConnectionResetError):
        return f"{reason(error)} during the handshake; {hint}"
    return reason(error)


def hint_for(terms: Terms, has_proxy: bool) -> str:
    """Where to look when a server leaves without a word."""
    return ONLY_TLS if has_proxy and not terms.tls else IS_IT


def _expect_offer(opening: Challenge | Refusal | Offer | StartTLS, terms: Terms) -> Offer:
    """The offer, if that is what the server said. Raises RefusedError, ProtocolError."""
    if isinstance(opening, Refusal):
        words = REASONS.get(opening.reason, "")
        if opening.reason == NO_TLS and terms.key:
            words += f" because it has a key; {SAME_KEY}"
        raise RefusedError(opening.reason, words)
    if not isinstance(opening, Offer):
        raise ProtocolError(f"neither an offer nor a rejection: {printable(opening.encode()[:-1])}")
    return opening


def _check_tls(control: ClientControl, offer: Offer, terms: Terms) -> None:
    """Whether the offer's mode is the one that this connection has, and enough. Raises RefusedError."""
    secured = not control.stream.plain
    if bool(offer.tls) != secured:
        words = (
            f"the server offers tls={offer.tls} {'inside' if secured else 'outside'} TLS (possible man in the middle)"
        )
        raise RefusedError(NO_TLS, words)
    if offer.tls < terms.tls:
        raise RefusedError(NO_TLS, f"the server offers tls={offer.tls} and this client requires tls={terms.tls}")
    if offer.tls == 2:
        _check_certificate(control, terms.host)


def _check_certificate(control: ClientControl, host: str) -> None:
    """Whether the handshake has verified the certificate for this host. Raises VerificationError."""
    from nodepass.tls.contexts import refused
    from nodepass.tls.stream import TLSStream

    stream = control.stream
    assert isinstance(stream, TLSStream), "an offer outside TLS has been refused"
    if stream.rejection:
        with contextlib.suppress(OSError):
            control.send(Bye(CERTIFICATE))  # its log says why the client leaves
        raise refused(stream.rejection)
    if stream.verified_for != host:
        raise VerificationError(f"the certificate has not been verified for {host!r}")


def _take_v1(control: ClientControl, offer: Offer, terms: Terms) -> Agreement:
    """Go on with a v1 server, which has no key, and signals in the clear. Raises RefusedError where it may not be."""
    if offer.version > 1:
        raise RefusedError(VERSION, "the server offered wire v2 in the clear before it was asked")
    if terms.key:
        raise RefusedError(KEY_MISMATCH, "the server speaks wire v1, which has no key, and this client requires one")
    if terms.wire == "2":
        raise RefusedError(VERSION, "the server speaks wire v1 and this client requires v2 (wire=2)")
    if offer.tls < terms.tls:
        words = f"the server speaks wire v1 and offers tls={offer.tls}, and this client requires tls={terms.tls}"
        raise RefusedError(NO_TLS, words)
    if terms.tls == 2 and terms.wire != "1":
        words = (
            "the server speaks wire v1, whose signals are in the clear, and this client requires tls=2; allowed: wire=1"
        )
        raise RefusedError(VERSION, words)
    return control.agree(Agreement(offer))


def _check_server(offer: Offer, line: bytes, key: Key, transcript: Transcript) -> SessionKey:
    """The session's key. Raises RefusedError where the server has not proven that it has the client's key."""
    if not transcript.challenge or not offer.mac:
        words = f"the server has no key for this tunnel and this client requires one; {SAME_KEY}"
        raise RefusedError(KEY_MISMATCH, words)
    text = without_mac(line, offer.mac)
    if not same(offer.mac, key.server_proof(transcript, text)):
        words = "the server's key does not match this client's, or something was changed (possible man in the middle)"
        raise RefusedError(KEY_MISMATCH, words)
    return key.session(transcript, text)
