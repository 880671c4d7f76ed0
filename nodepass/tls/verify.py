"""What a client asks of a server's certificate, and the words for what is wrong with it.

service-identity, which judges names, is imported when it is needed: only a client in mode 2 needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address

from cryptography.hazmat.primitives.hashes import SHA256
from OpenSSL.crypto import X509

# X509_V_ERR_* of <openssl/x509_vfy.h> that a misconfigured server meets.
_CHAIN_ERRORS = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its root is self-signed and not trusted here",
    20: "its issuer is not trusted here",
    21: "its issuer is not in the chain that was sent, and not trusted here",
    23: "it is revoked",
    26: "it is not meant for servers",
}


@dataclass(frozen=True)
class Expected:
    """With `verify` the certificate's chain and name must be right, with a `fingerprint` that too.

    The fingerprint is the certificate's SHA-256 in DER, as hex.
    """

    host: str
    verify: bool = False
    fingerprint: str = ""

    def refuses_chain(self, error: int) -> str:
        """Why the chain is refused, given OpenSSL's X509_V_ERR_*; nothing where it is not."""
        if not error or not self.verify:
            return ""
        return f"chain refused for {self.host!r}: {_CHAIN_ERRORS.get(error, f'X509 error {error}')}"

    def refuses_leaf(self, certificate: X509) -> str:
        """Why the server's own certificate is refused; nothing where it is not."""
        if self.verify and not _is_made_out_to(certificate, self.host):
            return f"name refused for {self.host!r}: it is made out to {_names(certificate)}"
        shown = certificate.to_cryptography().fingerprint(SHA256()).hex()
        if self.fingerprint and shown != self.fingerprint:
            return f"fingerprint refused: the server has proven {self.fingerprint}, this is {shown}; who is in between?"
        return ""


@dataclass(frozen=True)
class Glance(Expected):
    """A look at the certificate, to leave before the handshake is over: the server never has a connection to use."""

    passed: list[bool] = field(default_factory=list)

    def refuses_leaf(self, certificate: X509) -> str:
        refusal = super().refuses_leaf(certificate)
        if not refusal:
            self.passed.append(True)
        return refusal or "seen, and left"


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
