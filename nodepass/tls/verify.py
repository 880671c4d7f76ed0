"""What a client asks of a server's certificate, and the words for what is wrong with it.

service-identity, which judges names, is imported when it is needed: only a client in mode 2 needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import NamedTuple

from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL.crypto import X509

_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
# X509_V_ERR_* of <openssl/x509_vfy.h> that a misconfigured server meets.
_CHAIN_ERRORS = {
    9: "it is not valid yet",
    _EXPIRED: "it has expired",
    18: "it is self-signed",
    19: "its root is self-signed and not trusted here",
    20: "its issuer is not trusted here",
    21: "its issuer is not in the chain that was sent, and not trusted here",
    23: "it is revoked",
    26: "it is not meant for servers",
}


class Refusal(NamedTuple):
    """Which check refuses a certificate (chain, expired, name or fingerprint), and why in words."""

    check: str
    words: str


@dataclass(frozen=True)
class Expected:
    """With `verify` the certificate's chain and name must be right, with a `fingerprint` that too.

    The fingerprint is the certificate's SHA-256 in DER, as hex.
    """

    host: str
    verify: bool = False
    fingerprint: str = ""

    def refuses_chain(self, error: int) -> Refusal | None:
        """Why the chain is refused, given OpenSSL's X509_V_ERR_*; None where it is not."""
        if not error or not self.verify:
            return None
        words = f"chain refused for {self.host!r}: {_CHAIN_ERRORS.get(error, f'X509 error {error}')}"
        return Refusal("expired" if error == _EXPIRED else "chain", words)

    def refuses_leaf(self, certificate: X509) -> Refusal | None:
        """Why the server's own certificate is refused; None where it is not."""
        if self.verify and not _is_made_out_to(certificate, self.host):
            return Refusal("name", f"name refused for {self.host!r}: it is made out to {_names(certificate)}")
        shown = certificate.to_cryptography().fingerprint(SHA256()).hex()
        if self.fingerprint and shown != self.fingerprint:
            words = f"the server has proven {self.fingerprint}, this is {shown}; who is in between?"
            return Refusal("fingerprint", f"fingerprint refused: {words}")
        return None


@dataclass(frozen=True)
class Glance(Expected):
    """A look at the certificate, to leave before the handshake is over: the server never has a connection to use."""

    passed: list[bool] = field(default_factory=list)

    def refuses_leaf(self, certificate: X509) -> Refusal:
        refusal = super().refuses_leaf(certificate)
        if not refusal:
            self.passed.append(True)
        return refusal or Refusal("", "seen, and left")


def _is_made_out_to(certificate: X509, host: str) -> bool:
    import service_identity
    from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity
    from service_identity.pyopenssl import extract_patterns

    wanted = IPAddress_ID(host) if is_ip(host) else DNS_ID(host)
    try:
        verify_service_identity(extract_patterns(certificate), [wanted], [])
    except (service_identity.VerificationError, service_identity.CertificateError):
        return False
    return True


def _names(certificate: X509) -> str:
    from service_identity.pyopenssl import extract_patterns

    return ", ".join(map(_pattern_text, extract_patterns(certificate))) or "no name"


def _pattern_text(pattern: object) -> str:
    value = getattr(pattern, "pattern", None)
    value = getattr(value, "pattern", value)
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def is_ip(host: str) -> bool:
    """Whether a host is an address and not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
