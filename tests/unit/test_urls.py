"""URLs and what they describe."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.errors import ConfigError
from nodepass.urls import Address, ClientURL, ServerURL, parse_url


def test_a_server_url_says_everything() -> None:
    url = parse_url("server://0.0.0.0:10101/127.0.0.1:8080?log=debug&tls=2&crt=/a+b%20c.crt&key=k.pem")
    tunnel, target = Address("0.0.0.0", 10101), Address("127.0.0.1", 8080)
    assert url == ServerURL(tunnel, target, "debug", (), 2, "/a+b c.crt", "k.pem")
    assert url.name == "server:10101"


def test_a_client_url_has_defaults() -> None:
    assert parse_url("client://example.com:1/:65535") == ClientURL(Address("example.com", 1), Address("", 65535))


@pytest.mark.parametrize(
    ("text", "host"), [("[::1]", "::1"), ("", ""), ("a.example", "a.example"), ("[fe80::1%25eth0]", "fe80::1%eth0")]
)
def test_hosts_may_be_ipv6_names_or_nothing(text: str, host: str) -> None:
    url = parse_url(f"server://{text}:1/{text}:2?tls=0")
    assert (url.tunnel, url.target) == (Address(host, 1), Address(host, 2))


def test_an_absent_tls_and_a_clients_tls_are_warned_of() -> None:
    assert [each.reason for each in parse_url("server://:1/:2").warnings] == ["tls_unset"]
    assert [each.reason for each in parse_url("client://:1/:2?tls=1").warnings] == ["tls_ignored"]
    assert not parse_url("server://:1/:2?tls=0").warnings


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "scheme"),
        ("http://a:1/b:2", "scheme"),
        ("server:/a:1/b:2", "scheme"),
        ("server://a/b:2", "tunnel address"),
        ("server://a:1", "target address"),
        ("server://a:1/b", "target address"),
        ("server://a:70000/b:2", "tunnel address"),
        ("client://a:0/b:2", "tunnel address"),
        ("client://a:1/b:0", "target address"),
        ("server://::1:1/b:2", "tunnel address"),
        ("server://a:1/b:2/c", "target address"),
        ("server://[x:1/b:2", "URL"),
        ("server://a:1/b:2#f", "fragment"),
        ("server://a:1/b:2?log=loud", "debug, info"),
        ("server://a:1/b:2?tsl=1", "did you mean 'tls'"),
        ("server://a:1/b:2?tls=3", "0, 1, 2"),
        ("server://a:1/b:2?tls=2&key=k", "crt=FILE"),
        ("server://a:1/b:2?tls=2&crt=c", "key=FILE"),
        ("server://a:1/b:2?tls=1&crt=c", "tls=2 only"),
        ("server://a:1/b:2?tls=1&tls=1", "twice"),
        ("client://a:1/b:2?crt=c", "unknown parameter 'crt'"),
    ],
)
def test_a_bad_url_is_refused_with_a_word_of_what_is_wrong(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url(text)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_user_part_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_url("server://secret@a:1/b:2")
    assert "user part" in str(caught.value)
    assert "secret" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_a_clear_refusal(text: str) -> None:
    for url in (text, f"server://{text}", f"client://a:1/{text}", f"server://a:1/b:2?{text}"):
        with contextlib.suppress(ConfigError):
            parse_url(url)
