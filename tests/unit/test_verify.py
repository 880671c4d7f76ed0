"""What a client says about a certificate that it rejects."""

from __future__ import annotations

import datetime
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from OpenSSL.crypto import X509

from nodepass.config.hostport import certified_host, normal_host
from nodepass.tls.verify import NAME_SHOWN, Expected, Verify
from tests.support.table import each_row

NOW = datetime.datetime.now(datetime.timezone.utc)


def build(key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    name = x509.Name([])
    return x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), NOW, NOW)


def certificate(*names: x509.GeneralName) -> X509:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = build(key)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return X509.from_cryptography(builder.sign(key, hashes.SHA256()))


@each_row(
    ("names", "shown"),
    [
        ([], "no name"),
        ([x509.RFC822Name("me@a.example")], "no name"),
        ([x509.DNSName("a.example"), x509.IPAddress(ip_address("::1"))], "a.example, ::1"),
        (
            [x509.DNSName(f"{number}.example") for number in range(7)],
            "0.example, 1.example, 2.example, 3.example, 4.example and 2 more",
        ),
        ([x509.DNSName("a\x1b[31m\n.example")], r"a\x1b[31m\n.example"),
        ([x509.DNSName("x" * 1000)], "x" * NAME_SHOWN),
        ([x509.DNSName("*.*.example")], "*.*.example"),
        ([x509.DNSName("*")], "*"),
        ([x509.DNSName("127.0.0.1")], "127.0.0.1"),
    ],
)
def test_a_rejection_by_name_shows_the_names_in_the_certificate(names: list[x509.GeneralName], shown: str) -> None:
    rejection = Expected("tunnel.example", Verify.ENFORCE).rejects_leaf(certificate(*names))
    assert rejection
    assert rejection.check == "name"
    assert rejection.words.startswith("name mismatch for 'tunnel.example': ")
    assert rejection.words.endswith(f" {shown}")


@each_row(
    ("host", "name"),
    [
        ("tunnel.example", x509.DNSName("tunnel.example")),
        ("tunnel.b.example", x509.DNSName("*.b.example")),
        ("::1", x509.IPAddress(ip_address("::1"))),
        ("bücher.example", x509.DNSName("xn--bcher-kva.example")),
        ("Tunnel.Example.", x509.DNSName("tunnel.example")),
        ("fe80::1%eth0", x509.IPAddress(ip_address("fe80::1"))),
        ("::ffff:192.0.2.1", x509.IPAddress(ip_address("192.0.2.1"))),
    ],
)
def test_a_certificate_for_the_host_is_accepted_however_the_url_writes_it(host: str, name: x509.GeneralName) -> None:
    other = x509.DNSName("other.example")
    expected = Expected(certified_host(normal_host(host)), Verify.ENFORCE)
    assert not expected.rejects_leaf(certificate(other, name))


@each_row("host", ["a_b.example", "-a.example", "xn--a.example", "com"])
def test_no_host_of_a_url_is_more_than_a_mismatch(host: str) -> None:
    rejection = Expected(host, Verify.ENFORCE).rejects_leaf(certificate(x509.DNSName("other.example")))
    assert rejection
    assert rejection.check == "name"


def test_an_unreadable_name_rejects_the_certificate() -> None:
    unreadable = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, b"no DER")
    key = ec.generate_private_key(ec.SECP256R1())
    shown = X509.from_cryptography(build(key).add_extension(unreadable, critical=False).sign(key, hashes.SHA256()))
    rejection = Expected("tunnel.example", Verify.ENFORCE).rejects_leaf(shown)
    assert rejection
    assert rejection.words.endswith(" no name")
