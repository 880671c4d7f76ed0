"""nftables decides as the rules do: each of many addresses sends a packet to the kernel, and is judged by `Rules`."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodepass.config.hostport import parse_ip
from nodepass.config.kinds import Rule
from nodepass.config.settings import Settings
from nodepass.visitors.rules import Rules
from tests.support.v2_network import Namespace

ADDRESSES = 5_000  # of each family
NETWORKS = 300  # of each family and list
VERDICTS = {"": "served", "denied": "denied", "not_allowed": "not_allowed"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def draw(chance: random.Random, width: int) -> int:
    """An address as a number; most are near others, so that networks overlap and many addresses are in one."""
    near = {32: 0x0A000000, 128: 0x20010DB8 << 96}[width]
    return near + chance.getrandbits(14) if chance.random() < 0.9 else chance.getrandbits(width)


def make_addresses(chance: random.Random, width: int) -> list[Address]:
    """Different addresses of a family."""
    kind = ipaddress.IPv4Address if width == 32 else ipaddress.IPv6Address
    found: dict[int, Address] = {}
    while len(found) < ADDRESSES:
        number = draw(chance, width)
        found[number] = kind(number)
    return list(found.values())


def make_list(chance: random.Random, width: int) -> list[str]:
    """Networks of a family, of all lengths and often one in another."""
    kind = ipaddress.IPv4Network if width == 32 else ipaddress.IPv6Network
    found = set()
    for _ in range(NETWORKS):
        length = chance.randint(width - 8, width)
        found.add(str(kind((draw(chance, width) >> (width - length) << (width - length), length))))
    return sorted(found)


def nft(network: Namespace, *arguments: str, script: str = "") -> str:
    """What nftables says in the namespace."""
    command = ["ip", "netns", "exec", network.name, "nft", *arguments]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ruleset(allow: dict[str, list[str]], deny: dict[str, list[str]]) -> str:
    """A chain that notes each source address in the set of its verdict: deny wins, and allow lets in no others."""
    lines = ["table inet judge {"]
    for family, kind in (("ip", "ipv4_addr"), ("ip6", "ipv6_addr")):
        for name, networks in (("allow", allow[family]), ("deny", deny[family])):
            elements = ", ".join(networks)
            options = f"type {kind}; flags interval; auto-merge; elements = {{ {elements} }};"
            lines.append(f"set {name}_{family} {{ {options} }}")
        options = f"type {kind}; size 65535; flags dynamic;"
        lines += [f"set {verdict}_{family} {{ {options} }}" for verdict in VERDICTS.values()]
    lines.append("chain output { type filter hook output priority 0; policy accept;")
    for family in ("ip", "ip6"):
        lines += [
            f"{family} saddr @deny_{family} add @denied_{family} {{ {family} saddr }} drop",
            f"{family} saddr @allow_{family} add @served_{family} {{ {family} saddr }} drop",
            f"meta nfproto {'ipv4' if family == 'ip' else 'ipv6'} add @not_allowed_{family} {{ {family} saddr }} drop",
        ]
    return "\n".join([*lines, "}", "}", ""])


def send(addresses: list[Address]) -> None:
    """Send a packet to this machine from each of these addresses."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as v4,
        socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as v6,
    ):
        for each in addresses:
            with contextlib.suppress(PermissionError):  # dropped, as all are
                if each.version == 4:
                    header = struct.pack("!BBHHHBBH", 0x45, 0, 20, 0, 0, 64, 253, 0) + each.packed
                    v4.sendto(header + socket.inet_aton("127.0.0.1"), ("127.0.0.1", 0))
                else:
                    header = struct.pack("!IHBB", 6 << 28, 0, 59, 64) + each.packed
                    v6.sendto(header + ipaddress.IPv6Address("::1").packed, ("::1", 0))


def verdicts(network: Namespace) -> dict[str, str]:
    """What nftables has decided, by address."""
    found: dict[str, str] = {}
    for verdict in VERDICTS.values():
        for family in ("ip", "ip6"):
            answer = json.loads(nft(network, "-j", "list", "set", "inet", "judge", f"{verdict}_{family}"))
            [listed] = [each["set"] for each in answer["nftables"] if "set" in each]
            found.update(dict.fromkeys(listed.get("elem", ()), verdict))
    return found


@pytest.fixture
def network() -> Iterator[Namespace]:
    made = Namespace("judge")
    try:
        yield made
    finally:
        made.delete()


@pytest.mark.programs("network namespaces", "nft")
def test_ten_thousand_addresses_are_judged_as_nftables_judges_them(network: Namespace, tmp_path: Path) -> None:
    chance = random.Random(6)
    allow, deny = ({"ip": make_list(chance, 32), "ip6": make_list(chance, 128)} for _ in range(2))
    asked = [*make_addresses(chance, 32), *make_addresses(chance, 128)]
    nft(network, "-f", "-", script=ruleset(allow, deny))
    network.inside(lambda: send(asked))
    expected = verdicts(network)

    for name, networks in (("allow", allow), ("deny", deny)):
        (tmp_path / name).write_text("\n".join([*networks["ip"], *networks["ip6"]]))
    lists = [Rule(file=str(tmp_path / name)) for name in ("allow", "deny")]
    rules = Rules(Settings(allow=lists[0], deny=lists[1]), "server:1")
    found = {str(each): VERDICTS[rules.find_refusal(parse_ip(str(each)))] for each in asked}
    assert found == expected
    assert min(Counter(found.values()).values()) > 500
