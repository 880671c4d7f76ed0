"""Files of operators: what counts as a change, and what other systems and editors add to a text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gevent
import pytest
from gevent.event import Event

from nodepass.config.files import find_ca_trouble, state_of
from nodepass.daemon.key_file import Keys, generate
from nodepass.errors import ConfigError
from nodepass.log import Log
from nodepass.tls import certificates
from nodepass.tls.certificates import ServerCertificate, load_pair, self_signed
from nodepass.tls.contexts import server_context
from tests.support.certificates import Authority, Certificate
from tests.support.sockets import until
from tests.unit.records import recorded

KEEP_TIME = (10**9, 10**9)  # nanoseconds: access and modification


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).local


def rewrite(path: Path) -> None:
    """Another content of the same length, and of the same time as far as a program can set it."""
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=KEEP_TIME)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=KEEP_TIME)
    copy.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "its mode": lambda path: path.chmod(path.stat().st_mode ^ 0o040),
    "its owner": lambda path: os.chown(path, path.stat().st_uid, path.stat().st_gid),  # another or not, a chown counts
    "its content": rewrite,
    "its file": replace,
    "its length": lambda path: path.write_bytes(b"longer"),
    "its end": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_any_kind_is_another_state(tmp_path: Path, change: Callable[[Path], object]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    os.utime(path, ns=KEEP_TIME)
    before = state_of(str(path))
    assert before == state_of(str(path)) != ()

    def has_changed() -> bool:  # the kernel's clock for files may stand still for 4 ms
        if path.exists():
            change(path)
        return state_of(str(path)) != before

    until(has_changed)


FORMS: dict[str, Callable[[str], bytes]] = {
    "a byte order mark": lambda text: text.encode("utf-8-sig"),
    "line ends of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "both": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "line ends of old Macs": lambda text: text.replace("\n", "\r").encode(),
    "UTF-16, as PowerShell writes it": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "blanks at the ends": lambda text: text.replace("\n", " \t\n").encode() + b" \n\n",
    "no line end": lambda text: text.rstrip().encode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_texts_of_other_systems_are_read_as_they_were_meant(
    tmp_path: Path, pair: Certificate, form: Callable[[str], bytes]
) -> None:
    web, ssh = generate(), generate()
    texts = {"key": f"{web}\n", "keys": f"# all\nweb {web}\nssh\t{ssh}\n"}
    texts |= {"crt": pair.crt.read_text(), "pem": pair.key.read_text()}
    for name, text in texts.items():
        (tmp_path / name).write_bytes(form(text))
        (tmp_path / name).chmod(0o600)
    assert Keys.find(str(tmp_path / "key"), None, {}).secrets("web") == (web,)
    keys = Keys.find(None, str(tmp_path / "keys"), {})
    assert {name: keys.secrets(name) for name in keys.names or ()} == {"web": (web,), "ssh": (ssh,)}
    assert load_pair(str(tmp_path / "crt"), str(tmp_path / "pem")).fingerprint == pair.fingerprint


def test_a_key_that_a_shell_read_from_such_a_file_is_the_same() -> None:
    secret = generate()
    assert Keys.find(None, None, {"TUNNEL_KEY": f"\ufeff{secret}\r"}).secrets("") == (secret,)


def test_certificates_that_could_not_be_read_are_read_once_their_mode_lets_that(
    pair: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For root every file can be read, so the kernel's refusal is played."""
    crt, key = tmp_path / "crt", tmp_path / "key"
    crt.write_bytes(pair.crt.read_bytes())
    key.write_bytes(pair.key.read_bytes())
    looked = Event()

    def load(*paths: str) -> certificates.Identity:
        looked.set()
        if not key.stat().st_mode & 0o400:
            raise ConfigError(f"key={key}: cannot be read: Permission denied")
        return load_pair(*paths)

    with recorded() as log:
        certificate = ServerCertificate(str(crt), str(key), Log("test"))
        monkeypatch.setattr(certificates, "load_pair", load)
        watching = gevent.spawn(certificate.watch, 3600)
        key.chmod(0o000)
        certificate.reload(asked=True)
        monkeypatch.setattr(certificates, "RETRY", 0.01)
        looked.clear()
        key.chmod(0o600)
        with gevent.Timeout(10):
            looked.wait()
        watching.kill()
    events = [record.event for record in log if record.event != "certificate.expiring"]
    assert events == ["certificate.loaded", "certificate.kept", "certificate.unchanged"]


CUT_SHORT = b"\xff\xfe\x00\xd8"
"""In UTF-16, by its mark."""


@pytest.mark.parametrize("part", ["crt", "key"])
def test_a_pair_that_is_no_text_is_bad_input(tmp_path: Path, pair: Certificate, part: str) -> None:
    paths = {"crt": pair.crt, "key": pair.key, part: tmp_path / "broken"}
    paths[part].write_bytes(CUT_SHORT)
    with pytest.raises(ConfigError, match=f"^{part}={paths[part]}: not text .PEM."):
        load_pair(str(paths["crt"]), str(paths["key"]))


def test_a_file_of_cas_that_is_no_text_has_none(tmp_path: Path) -> None:
    path = tmp_path / "cas"
    path.write_bytes(CUT_SHORT)
    assert "has no certificate in it" in find_ca_trouble({"SSL_CERT_FILE": str(path)})


def test_a_pair_that_openssl_rejects_is_bad_input(pair: Certificate) -> None:
    """As it does with weak keys, by its own level of security."""
    identity = load_pair(str(pair.crt), str(pair.key))
    with pytest.raises(ConfigError, match=r"^the certificate cannot be used: TLS: "):
        server_context(identity.chain, self_signed().key)
