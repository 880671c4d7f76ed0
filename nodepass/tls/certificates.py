"""The server's certificate: made in memory (tls=1), or read from files and reloaded when they change (tls=2).

It owns the certificate, its key and the context made of them; `server` asks for the context at each handshake.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass

import gevent
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gevent.event import Event

from nodepass.config.files import RETRY, FileState, state_of, without_mark
from nodepass.errors import ConfigError, reason
from nodepass.log import Log
from nodepass.tls.contexts import PrivateKey, server_context
from nodepass.tls.verify import names_of

EXPIRY_WARNING = datetime.timedelta(days=14)
_DAY = 86400.0  # seconds
_VALIDITY = datetime.timedelta(days=3650)  # of the self-signed certificate, which lives as long as its process
_CLOCK_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """A certificate with its issuers, leaf first, and its private key."""

    chain: Sequence[x509.Certificate]
    key: PrivateKey

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in DER, 64 hex digits."""
        return self.chain[0].fingerprint(hashes.SHA256()).hex()

    @property
    def expiry(self) -> float:
        """When the certificate expires, in Unix time."""
        return self.chain[0].not_valid_after_utc.timestamp()

    @property
    def names(self) -> list[str]:
        """The DNS names and IP addresses in the certificate."""
        return names_of(self.chain[0])

    @property
    def is_early(self) -> bool:
        """Whether it is not valid yet."""
        return self.chain[0].not_valid_before_utc > datetime.datetime.now(datetime.timezone.utc)

    @property
    def lifetime(self) -> datetime.timedelta:
        """Time until the certificate expires; negative afterwards."""
        return self.chain[0].not_valid_after_utc - datetime.datetime.now(datetime.timezone.utc)


def self_signed() -> Identity:
    """A new ECDSA P-256 key and a self-signed certificate for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nodepass")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALIDITY)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("nodepass")]), critical=False)
    )
    return Identity([builder.sign(key, hashes.SHA256())], key)


def load_pair(crt: str, key: str) -> Identity:
    """The certificate, the issuers that follow it in its file, and its key, all PEM.

    Raises ConfigError naming the file.
    """
    try:
        chain = x509.load_pem_x509_certificates(_read("crt", crt))
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"crt={crt}: not a PEM certificate") from None
    try:
        private = serialization.load_pem_private_key(_read("key", key), None)
    except TypeError:
        raise ConfigError(f"key={key}: the private key is encrypted; allowed: one without a passphrase") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"key={key}: not a PEM private key") from None
    if private.public_key() != chain[0].public_key():
        raise ConfigError(f"crt={crt} and key={key} do not match: the key is not the certificate's")
    if not isinstance(private, PrivateKey):
        raise ConfigError(f"key={key}: unsupported kind of key; allowed: EC, Ed25519, Ed448, RSA")
    return Identity(chain, private)


def _read(parameter: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return without_mark(file.read())
    except OSError as error:
        raise ConfigError(f"{parameter}={path}: cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{parameter}={path}: not text (PEM)") from None


class ServerCertificate:
    """What a server shows to its clients; `context` is for the next handshake.

    Without file names it is self-signed. Raises ConfigError when the files are not usable at start; a reload that finds
    them so keeps the pair in use.
    """

    def __init__(self, crt: str, key: str, log: Log) -> None:
        self._paths = (crt, key) if crt else ()
        self._log = log
        self._is_unusable = Event()  # the files were, at the last look
        self._seen = self._state()
        self._use(load_pair(crt, key) if crt else self_signed())
        words = f"{'' if crt else 'self-signed '}certificate SHA-256 %(sha256)s"
        self._log.info("certificate.loaded", words, sha256=self.identity.fingerprint, self_signed=not crt)
        self._warn_of_expiry()

    def reload(self, asked: bool = False) -> None:
        """Check the files; files that have not changed are read only when `asked`."""
        state = self._state()
        if not self._paths or (state == self._seen and not asked):
            return
        self._seen = state
        self._is_unusable.clear()
        try:
            identity = load_pair(*self._paths)
            if identity.fingerprint == self.identity.fingerprint:
                self._log.info("certificate.unchanged", "certificate unchanged", sha256=identity.fingerprint)
            else:
                self._use(identity)
                words = "certificate reloaded: certificate SHA-256 %(sha256)s"
                self._log.info("certificate.reloaded", words, sha256=identity.fingerprint)
                self._warn_of_expiry()
        except ConfigError as error:
            words = "keeping the old certificate: %(error)s"
            self._log.error("certificate.kept", words, sha256=self.identity.fingerprint, error=error)
            self._is_unusable.set()

    def watch(self, interval: float) -> None:
        """Check the files, and when the certificate expires, every `interval` seconds until killed.

        Files that could not be used are looked at more often, and read as soon as they have changed.
        """
        while True:
            if self._is_unusable.wait(interval):
                gevent.sleep(min(interval, RETRY))
            self.reload()
            self._warn_of_expiry()

    def _use(self, identity: Identity) -> None:
        context = server_context(identity.chain, identity.key)  # may raise: then neither changes
        self.identity, self.context = identity, context
        self._warned = float("-inf")

    def _warn_of_expiry(self) -> None:
        """A warning, once a day, from 14 days before the certificate expires."""
        if self.identity.lifetime >= EXPIRY_WARNING or time.monotonic() - self._warned < _DAY:
            return
        self._warned = time.monotonic()
        days = self.identity.lifetime / datetime.timedelta(days=1)
        words = f"expires in {days:.1f} days" if days > 0 else f"expired {-days:.1f} days ago"
        self._log.warning("certificate.expiring", f"the certificate {words}", days=round(days, 1))

    def _state(self) -> list[FileState]:
        return [state_of(path) for path in self._paths]
