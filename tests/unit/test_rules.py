"""Rules about visitors: how networks are read, which addresses they hold, and what a bad file changes."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.hostport import parse_ip, parse_network
from nodepass.config.kinds import Rule
from nodepass.config.settings import Settings
from nodepass.config.urls import parse_url
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.key_file import Keys
from nodepass.daemon.tunnels import make_tunnels
from nodepass.errors import ConfigError
from nodepass.log import Log
from nodepass.net.activation import Inherited
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup
from nodepass.tunnel.part import Common
from nodepass.visitors import network_set
from nodepass.visitors.network_set import NetworkSet
from nodepass.visitors.policy import Policy
from nodepass.visitors.rules import Rules
from tests.support.table import each_row
from tests.unit.controls import until
from tests.unit.records import recorded

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@each_row(
    ("text", "version", "number"),
    [
        ("192.0.2.1", 4, 0xC0000201),
        ("::ffff:192.0.2.1", 4, 0xC0000201),
        ("::ffff:c000:201", 4, 0xC0000201),
        ("::192.0.2.1", 6, 0xC0000201),
        ("fe80::1%eth0", 6, (0xFE80 << 112) + 1),
        ("::", 6, 0),
    ],
)
def test_an_address_is_a_number_of_its_family(text: str, version: int, number: int) -> None:
    assert parse_ip(text) == (version, number)


@each_row(
    ("text", "first", "last"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("192.0.2.0/24", "192.0.2.0", "192.0.2.255"),
        ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
        ("::ffff:192.0.2.0/120", "192.0.2.0", "192.0.2.255"),
        ("::ffff:0:0/96", "0.0.0.0", "255.255.255.255"),
        ("2001:db8::/32", "2001:db8::", "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"),
        ("::/0", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
    ],
)
def test_a_network_has_a_first_and_a_last_address(text: str, first: str, last: str) -> None:
    assert parse_network(text) == (*parse_ip(first), parse_ip(last)[1])


@each_row(
    ("text", "wrong"),
    [
        ("", "not an IP address"),
        ("example.com", "not an IP address"),
        ("192.0.2", "not an IP address"),
        ("192.0.2.256", "not an IP address"),
        ("192.0.2.1\0", "not an IP address"),
        ("192.0.2.1:80", "not an IP address"),
        ("[2001:db8::]/32", "not an IP address"),
        ("\u0661.0.0.1", "not an IP address"),
        ("192.0.2.0/", "the prefix"),
        ("192.0.2.0/33", "from 0 to 32"),
        ("192.0.2.0/-1", "the prefix"),
        ("192.0.2.0/255.255.255.0", "the prefix"),
        ("192.0.2.0/24/24", "the prefix"),
        ("2001:db8::/129", "from 0 to 128"),
        ("192.0.2.1/24", "bits beyond"),
        ("2001:db8::1/32", "bits beyond"),
        ("::ffff:0:0/95", "bits beyond"),
        ("::ffff:192.0.2.1/120", "bits beyond"),
        ("fe80::1%eth0", "no zone"),
    ],
)
def test_what_is_no_network_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse_network(text)


# The sets, against a plain loop over the networks of the standard library


def networks(base: st.SearchStrategy[Address], width: int) -> st.SearchStrategy[Network]:
    """Networks whose addresses are near each other, so that they overlap and touch."""
    pairs = st.tuples(base, st.integers(width - 8, width))
    return pairs.map(lambda pair: ipaddress.ip_network(f"{pair[0]}/{pair[1]}", strict=False))


def addresses() -> tuple[st.SearchStrategy[Address], st.SearchStrategy[Address]]:
    """Of IPv4 and of IPv6: at both ends of the space, and in between."""
    edge = st.integers(0, 1023)
    low = st.sampled_from([0, 0xC0000200, (1 << 32) - 1024])
    v4 = st.builds(lambda base, rest: ipaddress.IPv4Address(base + rest), low, edge)
    high = st.sampled_from([0, 0x20010DB8 << 96, (1 << 128) - 1024])
    v6 = st.builds(lambda base, rest: ipaddress.IPv6Address(base + rest), high, edge)
    return v4, v6


V4, V6 = addresses()
NETWORKS = st.lists(st.one_of(networks(V4, 32), networks(V6, 128)), max_size=30)


@pytest.mark.parametrize("chunk", [network_set.CHUNK, 2])
@given(NETWORKS, st.lists(st.one_of(V4, V6), min_size=1, max_size=30))
def test_a_set_has_the_addresses_that_a_plain_search_finds(
    chunk: int, nets: list[Network], asked: list[Address]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_set, "CHUNK", chunk)
        found = NetworkSet(parse_network(str(each)) for each in nets)
    edges = [edge for net in nets for edge in (net.network_address, net.broadcast_address)]
    for address in (*asked, *edges):
        assert (parse_ip(str(address)) in found) == any(address in net for net in nets), address


def test_networks_that_touch_or_overlap_are_one_interval() -> None:
    texts = ["10.0.0.0/25", "10.0.0.128/25", "10.0.1.0/24", "10.0.1.7", "10.0.3.0/24"]
    bounds = NetworkSet(map(parse_network, texts))._bounds[4]
    assert [ipaddress.ip_address(each).exploded for each in bounds] == ["10.0.0.0", "10.0.2.0", "10.0.3.0", "10.0.4.0"]


# ALLOW and DENY


def refusals(allow: str, deny: str, hosts: Sequence[str]) -> list[str]:
    """Why each of these is refused."""
    settings = Settings.from_texts({"allow": ("ALLOW", allow), "deny": ("DENY", deny)})
    rules = Rules(settings, "server:1")
    return [rules.find_refusal(parse_ip(host)) for host in hosts]


HOSTS = ("192.0.2.1", "192.0.2.200", "203.0.113.1", "::ffff:192.0.2.200", "fe80::9%eth0", "2001:db8::1")


@each_row(
    ("allow", "deny", "expected"),
    [
        ("all", "none", ["", "", "", "", "", ""]),
        ("all", "192.0.2.128/25", ["", "denied", "", "denied", "", ""]),
        ("192.0.2.0/24", "none", ["", "", "not_allowed", "", "not_allowed", "not_allowed"]),
        ("192.0.2.0/24, fe80::/10", "192.0.2.200", ["", "denied", "not_allowed", "denied", "", "not_allowed"]),
        ("192.0.2.1", "0.0.0.0/0", ["denied", "denied", "denied", "denied", "not_allowed", "not_allowed"]),
        ("::/0", "none", ["not_allowed", "not_allowed", "not_allowed", "not_allowed", "", ""]),
    ],
)
def test_deny_wins_and_an_allow_list_refuses_all_others(allow: str, deny: str, expected: list[str]) -> None:
    assert refusals(allow, deny, HOSTS) == expected


@each_row("text", ["none", "@", "@ ", "@a\0b", "192.0.2.0/24,", ",", "192.0.2.1/24", "a.example"])
def test_what_is_no_list_of_networks_is_refused_where_it_was_written(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^ALLOW: .* is not usable; allowed: all, addresses and networks"):
        Settings.from_texts({"allow": ("ALLOW", text)})


# Files


def of_file(path: Path) -> Rules:
    return Rules(Settings(deny=Rule(file=str(path))), "server:1")


@pytest.mark.parametrize(
    "content",
    [
        b"192.0.2.1\n",
        b"# scanners\n\n  192.0.2.0/24 # all of it\n",
        b"\xef\xbb\xbf192.0.2.1\r\n2001:db8::/32\r\n",
        b"192.0.2.1",
        "192.0.2.1\n".encode("utf-16"),
    ],
)
def test_a_file_has_a_network_a_line_and_comments(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "deny"
    path.write_bytes(content)
    assert of_file(path).find_refusal(parse_ip("192.0.2.1")) == "denied"


def test_an_allow_file_without_a_network_refuses_all(tmp_path: Path) -> None:
    path = tmp_path / "allow"
    path.write_text("# nothing yet\n")
    rules = Rules(Settings(allow=Rule(file=str(path))), "server:1")
    assert rules.find_refusal(parse_ip("192.0.2.1")) == "not_allowed"


BAD = {
    "a bad line": (
        b"192.0.2.1\n# fine\n192.0.2.1/24\n",
        r"line 3: '192\.0\.2\.1/24' is not usable: it has bits beyond",
    ),
    "not text": (b"192.0.2.1\n\xff\xfe\xfd", "not UTF-8 text"),
    "a zone": (b"fe80::1%eth0", r"line 1: 'fe80::1%eth0' is not usable: a network has no zone"),
}


@pytest.mark.parametrize(("content", "said"), BAD.values(), ids=BAD)
def test_a_file_that_cannot_be_used_is_bad_input_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "deny"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        of_file(path)
    assert str(caught.value).startswith(f"server:1: DENY=@{path}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_bad_input_and_waits_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        of_file(tmp_path / "absent")
    with pytest.raises(ConfigError, match="Is a directory"):
        of_file(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="not a regular file"):
        of_file(tmp_path / "fifo")


def test_a_file_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.visitors.rules.LARGEST", 9)
    path = tmp_path / "deny"
    path.write_text("192.0.2.1\n")
    with pytest.raises(ConfigError, match="longer than 9 bytes"):
        of_file(path)


def test_a_reload_changes_both_lists_or_neither(tmp_path: Path) -> None:
    allow, deny = tmp_path / "allow", tmp_path / "deny"
    allow.write_text("192.0.2.0/24")
    deny.write_text("192.0.2.1")
    rules = Rules(Settings(allow=Rule(file=str(allow)), deny=Rule(file=str(deny))), "server:1")

    def judged() -> list[str]:
        return [rules.find_refusal(parse_ip(host)) for host in ("192.0.2.1", "192.0.2.2", "203.0.113.1")]

    before = judged()
    assert before == ["denied", "", "not_allowed"]
    allow.write_text("203.0.113.0/24")
    deny.write_text("nonsense")
    error = rules.reload()
    assert "DENY" in str(error)
    assert judged() == before
    deny.write_text("192.0.2.2")
    assert rules.reload() is None
    assert judged() == ["not_allowed", "denied", ""]
    allow.unlink()
    deny.write_text("")
    assert "ALLOW" in str(rules.reload())
    assert judged() == ["not_allowed", "denied", ""]


def denies(rules: Rules, host: str) -> bool:
    return rules.find_refusal(parse_ip(host)) == "denied"


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Policy, Rules, Path]]:
    """A policy with a file of DENY, which watches it, its rules, and the file."""
    monkeypatch.setattr("nodepass.visitors.policy.RETRY", 0.001)
    path = tmp_path / "deny"
    path.write_text("192.0.2.1")
    rules, log, stats = of_file(path), Log("server:1"), Stats()
    policy = Policy(Common(rules._settings, log, stats, TaskGroup(log, stats)), rules)
    watching = gevent.spawn(policy.watch)
    yield policy, rules, path
    watching.kill()
    assert watching.successful()


def test_a_file_that_could_not_be_used_is_read_once_it_has_changed(policy: tuple[Policy, Rules, Path]) -> None:
    watched, rules, path = policy
    with recorded() as records:
        path.write_text("nonsense")
        watched.reload()
        gevent.sleep(0.01)
        assert [each.event for each in records] == ["rules.kept"], "as long as nothing has changed, nothing is read"
        path.chmod(0o640)
        until(lambda: len(records) == 2)
        path.write_text("192.0.2.2")
        until(lambda: denies(rules, "192.0.2.2"))
        until(lambda: not watched._is_unusable.is_set())
        path.write_text("192.0.2.3")
        gevent.sleep(0.01)
    assert [each.event for each in records] == ["rules.kept", "rules.kept", "rules.reloaded"]
    assert denies(rules, "192.0.2.2"), "a file that could be used waits for a reload"


def test_rules_without_a_file_have_nothing_to_reload() -> None:
    settings, log, stats = Settings(deny=Rule((parse_network("192.0.2.1"),))), Log("server:1"), Stats()
    with recorded() as records:
        Policy(Common(settings, log, stats, TaskGroup(log, stats)), Rules(settings, "server:1")).reload()
    assert not records


def test_a_tunnel_that_is_made_again_after_a_crash_keeps_its_rules_and_reads_no_file(tmp_path: Path) -> None:
    """It would hold up the other tunnels, and one that cannot be used would keep the tunnel down."""
    path = tmp_path / "deny"
    path.write_text("192.0.2.1")
    url = parse_url("server://127.0.0.1:0/127.0.0.1:0?tls=0")
    settings = Settings(deny=Rule(file=str(path)))
    [make] = make_tunnels([url], [settings], Keys(), Inherited(), AccessOutputs(Stats(), {}))
    before = make()
    path.write_text("nonsense")
    before.reload()
    path.unlink()
    with recorded() as records:
        after: Any = make()
        assert not records
        assert denies(after._policy._rules, "192.0.2.1")
        assert after._policy._is_unusable.is_set(), "it is still to be read once it has changed"
