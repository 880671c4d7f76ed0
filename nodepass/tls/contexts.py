"""Contexts: what OpenSSL needs for the handshakes of both ends, and its errors as ours.

A server's context has its certificate and serves both versions of the wire; `certificates` makes it. A client's has the
CAs where a certificate is looked at; `stream` asks for it at each handshake.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.x509 import Certificate, load_pem_x509_certificates
from OpenSSL import SSL
from OpenSSL.crypto import X509

from nodepass.config.files import CA_VARIABLE, find_ca_trouble, has_mark, without_mark
from nodepass.errors import ConfigError, TLSError, VerificationError
from nodepass.tls.verify import Rejection, Verify
from nodepass.wire.lines import printable

ALPN = b"nodepass/2"
RENEWED_EVERY = 3600.0  # seconds for which the CAs that were read are trusted
_PARTIAL_WRITE = 1  # SSL_MODE_ENABLE_PARTIAL_WRITE, which pyOpenSSL sets and does not name
_CIPHERS_12 = b"ECDHE+AESGCM:ECDHE+CHACHA20"
# AES-128 first: its strength suffices here, and it costs least per byte. Before pyOpenSSL 25.2, AES-256 comes first.
_CIPHERS_13 = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

PrivateKey = EllipticCurvePrivateKey | Ed448PrivateKey | Ed25519PrivateKey | RSAPrivateKey


def server_context(chain: Sequence[Certificate], key: PrivateKey) -> SSL.Context:
    """A context for a server with this certificate, leaf first, then its issuers. A new one needs a new context.

    Raises ConfigError when OpenSSL rejects them.
    """
    context = _context()
    try:
        context.use_certificate(chain[0])
        for issuer in chain[1:]:
            context.add_extra_chain_cert(issuer)
        context.use_privatekey(key)
    except SSL.Error as error:  # too weak a key, for one
        raise ConfigError(f"the certificate cannot be used: {translated(error)}") from None
    context.set_alpn_select_callback(_select_alpn)
    # Tickets hold all that a resumption needs, so that nothing is kept here. OP_NO_TICKET would not save them: OpenSSL
    # then sends tickets of another kind, which are shorter, cost as much time, and cannot be resumed without a cache.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    return context


def client_context(verify: Verify, v2: bool = True) -> SSL.Context:
    """The context of this process for such a demand; a v2 one allows nothing below TLS 1.3.

    To have the certificate looked at, the CAs of SSL_CERT_FILE or of the system are loaded: this takes 10 ms, so it is
    done once in RENEWED_EVERY, and after `renew_client_contexts`.
    """
    return _client_context(verify is not Verify.IGNORE, v2, int(time.monotonic() // RENEWED_EVERY))


def renew_client_contexts() -> None:
    """A certificate was rejected: its CA may have been added since the files were read."""
    _client_context.cache_clear()


def refused(rejection: Rejection) -> VerificationError:
    """The error about a rejected certificate, with what can be done; the CAs are read again for the next handshake."""
    renew_client_contexts()
    words = f"certificate {rejection.words}"
    if rejection.check == "chain":
        remedy = f"the CA must be one of the system's, or in the file that {CA_VARIABLE} names"
        words += f"; {find_ca_trouble(os.environ) or remedy}"
    return VerificationError(words, rejection.check)


@functools.lru_cache(maxsize=4)  # one for each demand
def _client_context(loads_cas: bool, v2: bool, _period: int) -> SSL.Context:
    context = _context()
    if loads_cas:
        context.set_default_verify_paths()
        _add_marked_cas(context, os.environ.get(CA_VARIABLE, ""))
    if v2:
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_alpn_protos([ALPN])
    return context


def _add_marked_cas(context: SSL.Context, file: str) -> None:
    """Add what OpenSSL leaves out of a file with a byte order mark: the first certificate, or in UTF-16 all of them."""
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as opened:  # it then holds no CA, as for OpenSSL
        content = opened.read()
        if has_mark(content):
            for each in load_pem_x509_certificates(without_mark(content)):
                store = context.get_cert_store()
                assert store
                store.add_cert(X509.from_cryptography(each))


def translated(error: SSL.Error) -> TLSError:
    """An error of pyOpenSSL, which no other room sees."""
    queue = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return TLSError(f"TLS: {queue[-1][-1] if queue else error.args[-1] if error.args else type(error).__name__}")


def _select_alpn(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
    """Called where the client offers protocols. What it raises ends the handshake with an alert."""
    if ALPN not in offered:
        raise SSL.Error(f"the client offers other protocols (ALPN): {printable(b', '.join(offered))}")
    return ALPN


def _context() -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(_CIPHERS_12)
    if hasattr(context, "set_tls13_ciphersuites"):  # pyOpenSSL 25.2
        context.set_tls13_ciphersuites(_CIPHERS_13)
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION)
    if hasattr(context, "clear_mode"):  # pyOpenSSL 25.2
        context.clear_mode(_PARTIAL_WRITE)  # one call for a batch, not one for each record: 5 % less CPU time
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # an idle connection keeps no record buffers
    return context
