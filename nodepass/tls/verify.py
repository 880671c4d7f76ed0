"""What a client requires of a server's certificate, and why a certificate does not meet it, as text for an operator.

It knows no connection: `tls.stream` calls it from OpenSSL's verification callback. service-identity, which matches
names, is imported on first use: only a client that looks at a trusted chain needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from typing import NamedTuple

from cryptography import x509
from OpenSSL.crypto import X509

NAMES_SHOWN = 5  # of a certificate, in an error
NAME_SHOWN = 253  # characters of a name, in an error: as long as a DNS name can be

_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
# X509_V_ERR_* of <openssl/x509_vfy.h> that a misconfigured server causes.
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

# What cryptography raises for a part of a certificate that it cannot read.
_MALFORMED = (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)


class Rejection(NamedTuple):
    """Which check rejects a certificate (chain, expired or name), and why in words."""

    check: str
    words: str


class Verify(Enum):
    """What a client does with the chain and the name of a certificate."""

    IGNORE = "ignore"  # not looked at
    KEEP = "keep"  # looked at, but the handshake goes on: `TLSStream.rejection` has the result
    ENFORCE = "enforce"  # a rejection ends the handshake


@dataclass(frozen=True)
class Expected:
    """The host that the certificate must be for, as `certified_host` writes it, and what follows."""

    host: str
    verify: Verify = Verify.IGNORE

    def rejects_chain(self, error: int) -> Rejection | None:
        """Why the chain is rejected, given OpenSSL's X509_V_ERR_*; None when it is not."""
        if not error or self.verify is Verify.IGNORE:
            return None
        words = f"chain rejected for {self.host!r}: {_CHAIN_ERRORS.get(error, f'X509 error {error}')}"
        return Rejection("expired" if error == _EXPIRED else "chain", words)

    def rejects_leaf(self, certificate: X509) -> Rejection | None:
        """Why the server's own certificate is rejected; None when it is not."""
        if self.verify is not Verify.IGNORE and not _is_valid_for(certificate, self.host):
            names = shown_names(names_of(certificate.to_cryptography())) or "no name"
            return Rejection("name", f"name mismatch for {self.host!r}: the certificate is for {names}")
        return None


def is_ip(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def shown_names(names: Sequence[str]) -> str:
    """The names in a certificate, for a line of text: at most five, in printable ASCII."""
    shown = [name[:NAME_SHOWN].encode("unicode_escape").decode() for name in names[:NAMES_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def names_of(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses in a certificate; none when that part of it cannot be read."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, *_MALFORMED):
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _is_valid_for(certificate: X509, host: str) -> bool:
    import service_identity

    # Not from its module for pyOpenSSL, which up to 24.1 calls methods that pyOpenSSL has removed since.
    from service_identity.cryptography import extract_patterns
    from service_identity.hazmat import DNS_ID, IPAddress_ID, verify_service_identity

    try:
        wanted = IPAddress_ID(host) if is_ip(host) else DNS_ID(host)
        verify_service_identity(extract_patterns(certificate.to_cryptography()), [wanted], [])
    except (service_identity.VerificationError, service_identity.CertificateError, *_MALFORMED):
        return False
    return True
