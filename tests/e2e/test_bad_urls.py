"""URLs and certificate files that are wrong: exit 2, one line, and never another TLS mode instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.process import Finished, run

SERVER = "server://127.0.0.1:0/127.0.0.1:0"
CLIENT = "client://127.0.0.1:9/127.0.0.1:9"

WRONG_URLS = {
    "nothing": ("", ""),
    "a word": ("nodepass", "nodepass"),
    "another scheme": ("http://127.0.0.1:1/127.0.0.1:2", "http"),
    "no scheme": ("//127.0.0.1:1/127.0.0.1:2", "127.0.0.1:1"),
    "a misspelt scheme": ("sever://127.0.0.1:1/127.0.0.1:2", "sever"),
    "no target": ("server://127.0.0.1:1", "server://127.0.0.1:1"),
    "an empty target": ("server://127.0.0.1:1/", "server://127.0.0.1:1/"),
    "no tunnel address": ("server:///127.0.0.1:1", "server:///127.0.0.1:1"),
    "no tunnel port": ("server://127.0.0.1/127.0.0.1:2", "127.0.0.1"),
    "no target port": ("server://127.0.0.1:1/127.0.0.1", "127.0.0.1"),
    "a port that is a word": ("server://127.0.0.1:http/127.0.0.1:2", "http"),
    "a port out of range": ("server://127.0.0.1:65536/127.0.0.1:2", "65536"),
    "a negative port": ("server://127.0.0.1:-1/127.0.0.1:2", "-1"),
    "a target port out of range": ("client://127.0.0.1:1/127.0.0.1:70000", "70000"),
    "a client without a port to go to": ("client://127.0.0.1:0/127.0.0.1:2", "0"),
    "half an IPv6 address": ("server://[::1:1/127.0.0.1:2", "[::1"),
    "a bare IPv6 address": ("server://::1:1/127.0.0.1:2", "::1:1"),
    "an IPv6 address that is none": ("server://[::zz]:1/127.0.0.1:2", "::zz"),
    "two targets": ("server://127.0.0.1:1/127.0.0.1:2/127.0.0.1:3", "127.0.0.1:3"),
    "a user": ("server://me@127.0.0.1:1/127.0.0.1:2", "user"),
    "a fragment": (f"{SERVER}#part", "part"),
    "an unknown TLS mode": (f"{SERVER}?tls=3", "3"),
    "a TLS mode that is a word": (f"{SERVER}?tls=yes", "yes"),
    "an empty TLS mode": (f"{SERVER}?tls=", "tls"),
    "an unknown level": (f"{SERVER}?log=loud", "loud"),
    "an empty level": (f"{CLIENT}?log=", "log"),
    "an unknown parameter": (f"{SERVER}?colour=red", "colour"),
    "a parameter given twice": (f"{SERVER}?tls=1&tls=2", "tls"),
    "a server's parameter on a client": (f"{CLIENT}?crt=/tmp/a", "crt"),
}


def assert_refused(done: Finished, *parts: str) -> None:
    assert done.code == 2, done.errors
    assert "Traceback" not in done.errors
    assert len(done.lines) == 1, done.errors
    for part in parts:
        assert part in done.lines[0]


@pytest.mark.parametrize(("url", "part"), WRONG_URLS.values(), ids=list(WRONG_URLS))
def test_a_wrong_url_is_refused_in_one_line(url: str, part: str) -> None:
    assert_refused(run(url), part)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("tsl=1", "tls"), ("lgo=info", "log"), ("cert=/tmp/a", "crt"), ("TLS=1", "tls")],
)
def test_a_misspelt_parameter_is_answered_with_what_was_meant(written: str, meant: str) -> None:
    done = run(f"{SERVER}?{written}")
    assert_refused(done, written.partition("=")[0], "did you mean", meant)


def test_a_wrong_second_url_is_refused_before_the_first_one_starts() -> None:
    assert_refused(run(f"{SERVER}?tls=1", "server://127.0.0.1:1"), "server://127.0.0.1:1")


def with_files(crt: Path, key: Path, tls: int = 2) -> str:
    return f"{SERVER}?tls={tls}&crt={crt}&key={key}"


def test_tls_2_without_files_is_refused(authority: Authority) -> None:
    assert_refused(run(f"{SERVER}?tls=2"), "crt")
    assert_refused(run(f"{SERVER}?tls=2&crt={authority.local.crt}"), "key")
    assert_refused(run(f"{SERVER}?tls=2&key={authority.local.key}"), "crt")
    assert_refused(run(f"{SERVER}?tls=2&crt=&key="), "crt")


@pytest.mark.parametrize("tls", [0, 1])
def test_files_without_tls_2_are_refused(authority: Authority, tls: int) -> None:
    done = run(with_files(authority.local.crt, authority.local.key, tls))
    assert_refused(done, "crt", "tls=2")


def test_files_that_are_missing_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    assert_refused(run(with_files(absent, authority.local.key)), str(absent))
    assert_refused(run(with_files(authority.local.crt, absent)), str(absent))


def test_files_that_cannot_be_read_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    """A directory, since nothing is unreadable to the superuser."""
    assert_refused(run(with_files(tmp_path, authority.local.key)), str(tmp_path))
    assert_refused(run(with_files(authority.local.crt, tmp_path)), str(tmp_path))


def test_files_that_hold_something_else_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    for content in (b"", b"rubbish", b"\0\xff" * 100):
        rubbish.write_bytes(content)
        assert_refused(run(with_files(rubbish, authority.local.key)), str(rubbish))
        assert_refused(run(with_files(authority.local.crt, rubbish)), str(rubbish))


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    other = authority.issue()
    done = run(with_files(authority.local.crt, other.key))
    assert_refused(done, str(authority.local.crt), str(other.key))
