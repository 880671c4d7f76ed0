"""URLs that cannot run in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from nodepass.config.settings import Settings
from nodepass.config.urls import ServerURL, parse_url, with_defaults
from nodepass.daemon import conflicts as module
from nodepass.daemon.conflicts import find_conflicts, refuse_conflicts
from nodepass.daemon.key_file import Keys, generate
from nodepass.errors import ConfigError
from tests.support.table import each_row

SECRETS = (generate(), generate())
NONE = Keys()
ONE = Keys(SECRETS[0], place="TUNNEL_KEY")
EACH = Keys(by_name={"web": SECRETS[:1], "ssh": SECRETS[:1], "": SECRETS[1:]}, place="TUNNEL_KEYS_FILE=keys")

SERVER, CLIENT = "server://:10101/:8080?", "client://s.example:10101/:80?"


def conflicts(keys: Keys, *urls: str) -> list[str]:
    resolved = [with_defaults(parse_url(url), keys.has(""), Settings()) for url in urls]
    return list(find_conflicts(resolved, keys, Settings()))


@each_row(
    ("keys", "urls"),
    [
        (NONE, (SERVER, CLIENT)),
        (NONE, ("server://:0/:1", "server://:0/:2")),  # the kernel gives each its own port
        (NONE, ("server://:1/:2", "server://:3/:4")),
        (NONE, (f"{SERVER}name=a", f"{SERVER}name=b")),
        (NONE, (CLIENT, "client://s.example:10101/:81")),
        (NONE, (f"{SERVER}name=a&data_port=tunnel", f"{SERVER}name=b&data_port=tunnel&udp_lanes=2")),
        (NONE, ("server://:1/:2?data_port=3", "server://:4/:5?data_port=6")),
        (ONE, (SERVER, CLIENT)),  # both ends in one process
        (ONE, (f"{SERVER}name=a", "server://:3/:4?name=b")),
        (ONE, (f"{CLIENT}name=a", "client://other:1/:2?name=b")),
        (ONE, (CLIENT, CLIENT)),  # two clients of one tunnel
        (EACH, (f"{SERVER}name=web", f"{SERVER}name=ssh", SERVER)),
        (EACH, (f"{SERVER}name=web&tls=2&crt=c&key=k", f"{SERVER}name=ssh&tls=2&crt=c&key=k")),
    ],
)
def test_what_goes_together_is_accepted(keys: Keys, urls: tuple[str, ...]) -> None:
    assert not conflicts(keys, *urls)


@each_row(
    ("keys", "urls", "said"),
    [
        (NONE, (SERVER, SERVER), "have the same tunnel address and no name"),
        (NONE, (f"{SERVER}name=a", "server://:10101/:9?name=a"), "have the same tunnel address and the name 'a'"),
        (NONE, (f"{SERVER}name=a&tls=0", f"{SERVER}name=b&tls=1"), "have the same tunnel address, but tls=0 and tls=1"),
        (
            NONE,
            (f"{SERVER}name=a&tls=2&crt=c&key=k", f"{SERVER}name=b&tls=2&crt=d&key=k"),
            "have the same tunnel address, but crt=c and crt=d",
        ),
        (
            NONE,
            (f"{SERVER}name=a&tls=2&crt=c&key=k", f"{SERVER}name=b&tls=2&crt=c&key=l"),
            "have the same tunnel address, but key=k and key=l",
        ),
        (NONE, (f"{SERVER}name=a&data_port=2", f"{SERVER}name=b"), "same tunnel address, but not the same data_port"),
        (NONE, (f"{SERVER}name=a", f"{SERVER}name=b&reload_interval=1m"), "but not the same reload_interval"),
        (ONE, ("server://:1/:2", "server://:3/:4"), "have the same key and no name"),
        (ONE, ("server://:0/:2?name=a", "server://:0/:4?name=a"), "have the same key and the name 'a'"),
        (ONE, (CLIENT, "client://s.example:10101/:81"), "have the same key and no name"),
        (ONE, (CLIENT, "client://other:10101/:80"), "have the same key and no name"),
        (ONE, (CLIENT, "client://other:10101,s.example:10101/:80"), "have the same key and no name"),
        (EACH, (f"{SERVER}name=web", "server://:3/:4?name=web"), "have the same key and the name 'web'"),
        (EACH, (f"{SERVER}name=other",), "TUNNEL_KEYS_FILE=keys has no key for server:10101/other, the name 'other'"),
        (Keys(by_name={}, place="TUNNEL_KEYS_FILE=keys"), (CLIENT,), "has no key for client:10101, no name"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(keys: Keys, urls: tuple[str, ...], said: str) -> None:
    (line,) = conflicts(keys, *urls)
    assert said in line
    assert "; allowed: " in line
    assert "\n" not in line
    assert not any(secret in line for secret in SECRETS)


def test_keys_of_urls_are_compared_by_what_is_in_their_files(tmp_path: Path) -> None:
    for name, secret in (("one", SECRETS[0]), ("copy", SECRETS[0]), ("other", SECRETS[1])):
        (tmp_path / name).write_text(secret)
        (tmp_path / name).chmod(0o600)
    first, second = (f"server://:{port}/:{port + 1}?tunnel_key_file={tmp_path}/" for port in (1, 3))
    assert not conflicts(ONE, f"{first}one", f"{second}other")
    for keys, urls in ((NONE, (f"{first}one", f"{second}copy")), (ONE, (f"{first}copy", "server://:3/:4"))):
        (line,) = conflicts(keys, *urls)
        assert "have the same key and no name" in line


def test_both_tunnels_of_a_conflict_are_named_with_their_targets() -> None:
    (line,) = conflicts(NONE, SERVER, "server://:10101/:9")
    assert line.startswith("server:10101 (target :8080) and server:10101 (target :9) have the same tunnel address")


def test_the_first_conflict_is_raised() -> None:
    urls = [with_defaults(parse_url(SERVER), False, Settings())] * 3
    with pytest.raises(ConfigError, match="same tunnel address"):
        refuse_conflicts(urls, NONE, Settings())


def test_only_pairs_that_can_conflict_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a thousand tunnels has half a million pairs."""
    compared: list[tuple[ServerURL, ServerURL]] = []
    monkeypatch.setattr(module, "_compare_servers", lambda one, other, *_: compared.append((one, other)) or ())
    urls = [f"server://:1/:{number}?tls=0&name=n{number}" for number in range(2, 102)]
    assert conflicts(NONE, *urls) == []
    assert compared == []
    conflicts(NONE, *urls, "server://:1/:200?tls=0&name=n7", "server://:1/:201?tls=1&name=other")
    assert [(one.target.port, other.target.port) for one, other in compared] == [(2, 201), (7, 200)]
