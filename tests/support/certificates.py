"""A certificate authority made for one test run, and the good and the bad leaves that it issues."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Certificate:
    """A certificate and its key, as the two PEM files that a server is given."""

    crt: Path
    key: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in DER, as 64 hex digits."""
        der = ssl.PEM_cert_to_DER_cert(self.crt.read_text())
        return hashlib.sha256(der).hexdigest()

    def overwrite(self, other: Certificate) -> None:
        """Put another pair into these files, as a renewal does."""
        self.key.write_bytes(other.key.read_bytes())
        self.crt.write_bytes(other.crt.read_bytes())


SIGNS_CERTIFICATES = x509.KeyUsage(
    key_cert_sign=True,
    crl_sign=True,
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    encipher_only=False,
    decipher_only=False,
)


def subject(name: str) -> x509.Name:
    """A distinguished name that is only a common name."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def general_name(name: str) -> x509.GeneralName:
    """An alternative name: an IP address where it is one, else a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


class Authority:
    """A certificate authority whose files live in one directory; `local` is a good leaf for this machine."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._name = subject(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self._name, self._key, -30 * DAY, 3650 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(SIGNS_CERTIFICATES, critical=True)
        self.crt = directory / "ca.crt"
        self.crt.write_bytes(self._sign(builder))
        self._issued = 0
        self.local = self.issue()

    def issue(
        self,
        *names: str,
        start: datetime.timedelta = -10 * DAY,
        end: datetime.timedelta = 90 * DAY,
    ) -> Certificate:
        """A leaf for the names, valid between two distances from now."""
        names = names or LOCAL_NAMES
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(subject(names[0]), key, start, end)
        alternatives = x509.SubjectAlternativeName([general_name(name) for name in names])
        builder = builder.add_extension(alternatives, critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        self._issued += 1
        leaf = Certificate(self.directory / f"leaf{self._issued}.crt", self.directory / f"leaf{self._issued}.key")
        leaf.crt.write_bytes(self._sign(builder))
        leaf.key.write_bytes(private_pem(key))
        return leaf

    def _builder(
        self,
        owner: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        start: datetime.timedelta,
        end: datetime.timedelta,
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            x509.CertificateBuilder()
            .subject_name(owner)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            # Python 3.13 refuses a chain without these.
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        signed = builder.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as an unencrypted PKCS #8 PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
