"""`host:port` where a user writes one: a URL, METRICS_LISTEN, the endpoint of `nodepass top`, the health check."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv6Address
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nodepass.config.hostport import certified_host, normal_host, split_host_port
from nodepass.config.kinds import Listen, parse_listen
from nodepass.config.urls import Address, parse_url
from nodepass.errors import ConfigError
from nodepass.metrics import healthcheck
from nodepass.tools.top_scrape import NoAnswer, Source, parse_source
from tests.support.table import each_row

ROOT = Path(__file__).resolve().parents[2]
PLAIN = r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/\s\x00-\x20]*)):(\d{1,5})"
IN_URL = r"(?:\[([0-9A-Fa-f:.%\w-]+)\]|([^\[\]:/\s\x00-\x20]*)):(\d{1,5})"
TRICKY = st.text(st.sampled_from("0159afF:.%[]/-_ \0\x1f\t\n@é\u0665\u00a0xg25"), max_size=12)
PORTS = st.integers(0, 99_999).map(str) | st.sampled_from(["", "0", "00080", "65535", "65536", "-1", "+1", " 1", "1\n"])
HOSTS = TRICKY | st.ip_addresses().map(str) | st.sampled_from(["localhost", "a.example", "fe80::1%25eth0", "%3A%3A1"])
TEXTS = TRICKY | st.builds("{}:{}".format, HOSTS, PORTS) | st.builds("[{}]:{}".format, HOSTS, PORTS)


def as_specified(text: str, lowest_port: int, in_url: bool) -> tuple[str, int] | None:
    """The grammar as expressions, with what they cannot say beside them."""
    match = re.fullmatch(IN_URL if in_url else PLAIN, text, re.ASCII)
    if not match or not lowest_port <= int(match[3]) <= 65535:
        return None
    host = match[1] or match[2]
    host = unquote(host) if in_url else host
    if match[1]:
        try:
            IPv6Address(host)
        except ValueError:
            return None
    return None if "\0" in host else (host, int(match[3]))


@given(TEXTS, st.sampled_from([0, 1]), st.booleans())
@example("[fe80::1%25eth0]:1", 0, True)
@example("[fe80::1%25]:1", 0, True)
@example("[::1]:00080", 1, False)
def test_it_accepts_and_refuses_what_the_grammar_says(text: str, lowest_port: int, in_url: bool) -> None:
    expected = as_specified(text, lowest_port, in_url)
    with contextlib.nullcontext() if expected else pytest.raises(ValueError, match=r"^[^\n]+$"):
        assert split_host_port(text, lowest_port, in_url) == expected


@given(st.ip_addresses(v=6).map(str) | st.sampled_from(["", "localhost", "192.0.2.1"]), st.integers(1, 65535))
def test_every_place_understands_what_an_address_looks_like(host: str, port: int) -> None:
    text = str(Address(host, port))
    assert parse_listen(text) == Listen(normal_host(host), port)
    assert parse_url(f"client://{text}/{text}").target == Address(normal_host(host), port)
    source = parse_source(text)
    assert (source.host, source.port) == (host or "localhost", port)
    assert parse_source(str(source)) == source


@each_row(
    "read",
    [parse_listen, parse_source, healthcheck.connect, lambda text: parse_url(f"client://a:1/{text}")],
)
@each_row("text", ["", "9464", "a:b:9464", "::1:9464", "[1]:9464", "[::1:9464", "a b:9464", "a:65536"])
def test_every_place_refuses_the_same_nonsense(read: Callable[[str], object], text: str) -> None:
    with pytest.raises((ValueError, ConfigError)):
        read(text)


def test_port_0_is_for_listening() -> None:
    assert parse_listen(":0") == Listen("", 0)
    assert parse_url("server://:0/:0").tunnel == Address("", 0)
    for wrong in ("client://:0/:1", "client://:1/:0"):
        with pytest.raises(ConfigError, match="with a port from 1 to 65535"):
            parse_url(wrong)
    with pytest.raises(ConfigError):
        parse_source(":0")


def test_escapes_and_zones_are_for_urls() -> None:
    assert parse_url("client://a%2Db:1/[fe80::1%25eth0]:2").tunnel == Address("a-b", 1)
    with pytest.raises(ValueError, match="not a host name"):
        parse_listen("a%2Db:1")
    with pytest.raises(ValueError, match="not allowed"):
        parse_listen("[fe80::1%25eth0]:2")


@each_row(
    ("written", "normal", "certified"),
    [
        ("", "", ""),
        ("Tunnel.EXAMPLE.org", "tunnel.example.org", "tunnel.example.org"),
        ("tunnel.example.org.", "tunnel.example.org.", "tunnel.example.org"),
        ("my_container", "my_container", "my_container"),
        ("b\u00fccher.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("B\u00dcCHER\u3002example.", "xn--bcher-kva.example.", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.example", "xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("127.1", "127.0.0.1", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1.", "127.0.0.1", "127.0.0.1"),
        ("2001:DB8:0:0::1", "2001:db8::1", "2001:db8::1"),
        ("FE80::1%Eth0", "fe80::1%Eth0", "fe80::1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1"),
    ],
)
def test_a_host_has_one_form_for_lookups_and_one_for_certificates(written: str, normal: str, certified: str) -> None:
    assert normal_host(written) == normal
    assert normal_host(normal) == normal
    assert certified_host(normal) == certified


@each_row(
    "host",
    [
        ".",
        "two..dots",
        "a" * 64,
        ".".join(["a" * 63] * 4),
        "a b",
        "a,b",
        "a%eth0",
        "1.2.3.256",
        "1.2.3.4.5",
        "stra\u00dfe.example",
        "\u0627a.example",
        "\ud800",
    ],
)
def test_what_no_lookup_takes_is_refused_at_the_start_in_one_line(host: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        normal_host(host)
    with pytest.raises(ConfigError, match=r"^URL [^\n]+: the target address [^\n]+; allowed: HOST:PORT, [^\n]+$"):
        parse_url(f"client://a:1/{quote(host, errors='replace')}:2")


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0", ""])
def test_the_health_check_connects_to_where_the_process_listens(listen: str) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((listen or "localhost", 0)))
        sock = stack.enter_context(healthcheck.connect(f"{listen}:{listener.getsockname()[1]}"))
        assert stack.enter_context(listener.accept()[0]).getpeername() == sock.getsockname()


def test_the_health_check_imports_nothing_heavy() -> None:
    shown = "import nodepass.metrics.healthcheck, sys; print(*sys.modules, sep='\\n')"
    modules = subprocess.run(
        [sys.executable, "-S", "-c", shown], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    ours = {
        "nodepass",
        "nodepass.config",
        "nodepass.config.hostport",
        "nodepass.metrics",
        "nodepass.metrics.healthcheck",
    }
    assert {each for each in modules.split() if each.partition(".")[0] == "nodepass"} == ours
    assert not {"re", "typing", "dataclasses", "ipaddress", "urllib", "gevent"} & set(modules.split())


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_top_says_in_its_one_line_that_no_name_is_like_that(host: str) -> None:
    with pytest.raises(NoAnswer, match="idna"):
        Source(host, 80).fetch()


@pytest.mark.parametrize("path", ["/é", "/a b", "/\x7f"])
def test_top_refuses_a_path_that_no_request_can_have(path: str) -> None:
    with pytest.raises(ConfigError, match="not a metrics endpoint"):
        parse_source(f"http://localhost:80{path}")
