"""Bad input on the command line: exit status 2 and one line that names what is wrong, where, and what is allowed.

Called in this process; tests/e2e/test_bad_input.py starts the program for a few of each kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nodepass.daemon.key_file import generate
from tests.support.certificates import Authority
from tests.support.command import Accepted, call, refusals
from tests.support.table import each_row
from tests.support.wrong import WRONG, WrongSetting

SERVER = "server://127.0.0.1:0/127.0.0.1:0"
CLIENT = "client://127.0.0.1:9/127.0.0.1:9"

WRONG_SETTINGS = [
    WrongSetting(name, value, by_flag)
    for name, values in WRONG.items()
    for value in values
    for by_flag in (False, True)
    if value or by_flag  # an empty variable is not set
]

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
    "an unknown TLS mode on a client": (f"{CLIENT}?tls=3", "3"),
    "a name that is none": (f"{SERVER}?name=a/b", "a/b"),
    "a wire of another version": (f"{CLIENT}?wire=3", "3"),
}


def test_a_wrong_value_is_refused_in_one_line() -> None:
    complaints = []
    for wrong in WRONG_SETTINGS:
        done = call(*wrong.arguments, CLIENT, env=wrong.environment)
        complaints += wrong.complaints(done.code, done.errors)
    assert not complaints


def test_right_values_are_accepted() -> None:
    with pytest.raises(Accepted):
        call("--semaphore-limit=1", CLIENT, env={"DATA_PORT": "tunnel"})


def test_bounds_in_the_wrong_order_are_refused_in_one_line() -> None:
    done = call("--min-pool-capacity=64", CLIENT, env={"MAX_POOL_CAPACITY": "32"})
    assert not refusals(done, "64", "MAX_POOL_CAPACITY", "32")
    assert "--min-pool-capacity" in done.errors or "MIN_POOL_CAPACITY" in done.errors


def test_an_unknown_flag_is_refused_in_one_line() -> None:
    assert not refusals(call("--min-pool-capazity=16", CLIENT), "--min-pool-capazity")


def test_a_variable_of_another_program_is_ignored() -> None:
    assert call("--version", env={"POOL_CAPACITY": "none", "PORT": "x"}).code == 0


@each_row("text", ["5s", "500ms", "1h30m", "1.5s", "20000us", "1m0.5s", ".5s"])
def test_durations_are_written_as_in_go(text: str) -> None:
    with pytest.raises(Accepted):
        call("--udp-read-timeout", text, CLIENT)


def test_a_wrong_url_is_refused_in_one_line() -> None:
    assert not [(name, found) for name, (url, part) in WRONG_URLS.items() if (found := refusals(call(url), part))]


@each_row(
    ("written", "meant"),
    [
        ("tsl=1", "tls"),
        ("lgo=info", "log"),
        ("cert=/tmp/a", "crt"),
        ("TLS=1", "tls"),
        ("nmae=web", "name"),
        ("wires=2", "wire"),
    ],
)
def test_a_misspelt_parameter_is_answered_with_what_was_meant(written: str, meant: str) -> None:
    done = call(f"{SERVER}?{written}")
    assert not refusals(done, written.partition("=")[0], "did you mean", meant)


def test_a_wrong_second_url_is_refused_before_the_first_one_starts() -> None:
    assert not refusals(call(f"{SERVER}?tls=1", "server://127.0.0.1:1"), "server://127.0.0.1:1")


def with_files(crt: Path, key: Path, tls: int = 2) -> str:
    return f"{SERVER}?tls={tls}&crt={crt}&key={key}"


def test_tls_2_without_files_is_refused(authority: Authority) -> None:
    assert not refusals(call(f"{SERVER}?tls=2"), "crt")
    assert not refusals(call(f"{SERVER}?tls=2&crt={authority.local.crt}"), "key")
    assert not refusals(call(f"{SERVER}?tls=2&key={authority.local.key}"), "crt")
    assert not refusals(call(f"{SERVER}?tls=2&crt=&key="), "crt")


@pytest.mark.parametrize("tls", [0, 1])
def test_files_without_tls_2_are_refused(authority: Authority, tls: int) -> None:
    done = call(with_files(authority.local.crt, authority.local.key, tls))
    assert not refusals(done, "crt", "tls=2")


def test_files_that_are_missing_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    assert not refusals(call(with_files(absent, authority.local.key)), str(absent))
    assert not refusals(call(with_files(authority.local.crt, absent)), str(absent))


def test_files_that_cannot_be_read_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    """A directory, since nothing is unreadable to the superuser."""
    assert not refusals(call(with_files(tmp_path, authority.local.key)), str(tmp_path))
    assert not refusals(call(with_files(authority.local.crt, tmp_path)), str(tmp_path))


def test_files_that_hold_something_else_are_refused_by_name(authority: Authority, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.pem"
    for content in (b"", b"rubbish", b"\0\xff" * 100):
        rubbish.write_bytes(content)
        assert not refusals(call(with_files(rubbish, authority.local.key)), str(rubbish))
        assert not refusals(call(with_files(authority.local.crt, rubbish)), str(rubbish))


def test_a_key_of_another_certificate_is_refused(authority: Authority) -> None:
    other = authority.issue()
    done = call(with_files(authority.local.crt, other.key))
    assert not refusals(done, str(authority.local.crt), str(other.key))


@pytest.mark.parametrize(("scheme", "user"), [("server", "hunter2hunter2"), ("client", "me:hunter2hunter2")])
def test_a_key_in_the_url_is_refused_with_advice_and_not_repeated(scheme: str, user: str) -> None:
    done = call(f"{scheme}://{user}@127.0.0.1:10101/127.0.0.1:8080")
    assert not refusals(done, "TUNNEL_KEY_FILE")
    assert "hunter2" not in done.errors


@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"\xff\xfe" * 20], ids=["absent", "empty", "only a line end", "not text"]
)
def test_a_key_file_without_a_key_is_refused_and_never_taken_for_no_key(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(0o600)
    assert not refusals(call(f"{SERVER}?tls=0", env={"TUNNEL_KEY_FILE": str(path)}), str(path))


def test_a_key_given_twice_is_refused() -> None:
    env = {"TUNNEL_KEY": generate(), "TUNNEL_KEY_FILE": "/etc/key"}
    assert not refusals(call(CLIENT, env=env), "TUNNEL_KEY and TUNNEL_KEY_FILE")


def test_a_key_that_can_be_guessed_is_refused_and_not_repeated() -> None:
    done = call(CLIENT, env={"TUNNEL_KEY": "hunter2hunter2"})
    assert not refusals(done, "TUNNEL_KEY: ", "--generate-key")
    assert "hunter2" not in done.errors


@pytest.mark.parametrize(
    ("urls", "env", "part"),
    [
        ((CLIENT, "client://127.0.0.1:8/127.0.0.1:9"), {"TUNNEL_KEY": generate()}, "have the same key and no name"),
        ((CLIENT,), {"TUNNEL_KEY": generate(), "WIRE": "1"}, "wire v1 has no keys"),
        ((SERVER,), {"WIRE": "1"}, "WIRE"),
    ],
)
def test_urls_that_contradict_the_key_or_a_setting_are_refused(
    urls: tuple[str, ...], env: dict[str, str], part: str
) -> None:
    assert not refusals(call(*urls, env=env), part)


@each_row(
    ("variable", "value"),
    [
        ("NOTIFY_SOCKET", "relative"),
        ("NOTIFY_SOCKET", "@"),
        ("NOTIFY_SOCKET", "vsock:2:1234"),
        ("WATCHDOG_USEC", "0"),
        ("WATCHDOG_USEC", "soon"),
        ("WATCHDOG_PID", "-1"),
    ],
)
def test_what_systemd_would_never_say_is_refused_by_name(variable: str, value: str) -> None:
    done = call(f"{SERVER}?tls=0", env={"WATCHDOG_USEC": "1000000", variable: value})
    assert not refusals(done, f"{variable}: {value!r} is not usable; allowed: ")


def test_no_url_at_all_is_refused_with_the_usage() -> None:
    for arguments in ((), ("--check",)):
        done = call(*arguments)
        assert (done.code, done.output) == (2, "")
        assert done.errors.startswith("usage: nodepass")
        assert "no URL given" in done.lines[-1]


def test_a_url_beside_generate_key_is_refused() -> None:
    assert not refusals(call("--generate-key", CLIENT), "--generate-key", "no URL")


@each_row("text", ["nonsense", ":0", ":65536", "https://localhost:1", "[::1:1", ""])
def test_top_refuses_what_is_no_endpoint(text: str) -> None:
    assert not refusals(call("top", text), repr(text), "allowed: HOST:PORT")


@each_row("text", ["soon", "-1s", "10ms", "2h", "1", "0"])
def test_top_refuses_an_interval_that_is_not_usable(text: str) -> None:
    """0 is for one table only."""
    assert not refusals(call("top", f"--interval={text}", ":1"), "allowed: a duration from 100ms to 1h")
