"""What protects a tunnel, in words: every combination of key, TLS mode and demand, at both ends."""

from __future__ import annotations

import logging
from dataclasses import replace

from nodepass.config.settings import Settings
from nodepass.config.urls import parse_url, with_defaults
from nodepass.log import Log
from nodepass.tunnel.security import (
    Security,
    SecurityLog,
    abbreviate,
    describe,
    deserves_warning,
    find_weakness,
    security_of,
    summarize,
)
from tests.support.table import each_row
from tests.unit.records import recorded

FILES = "&crt=c&key=k"
ANYONE = "anyone who reaches the tunnel port can become the client"
PASSIVE = "protects only against passive eavesdropping"
SERVER_IMPERSONATED = "anyone on the path can be the server"
KEY_ALONE = "without TLS, a man in the middle can read, alter and take over data connections"


def made(url: str, has_key: bool) -> Security:
    return security_of(with_defaults(parse_url(url), has_key, Settings()), has_key)


def connected(security: Security, tls: int, wire: int = 2) -> Security:
    if tls and wire == 2:
        security = replace(security, tls_version="TLSv1.3", group="X25519MLKEM768")
    return replace(security, tls=tls, wire=wire)


@each_row(
    ("query", "has_key", "summary", "weakness", "warned"),
    [
        ("", False, "none", ANYONE, True),
        ("tls=0", False, "none", ANYONE, False),
        ("tls=1", False, "no key, tls 1", f"{PASSIVE}, and {ANYONE}", False),
        (
            f"tls=2{FILES}",
            False,
            "no key, tls 2",
            f"only clients with tls=2 in their URL are safe from a man in the middle, and {ANYONE}",
            False,
        ),
        ("", True, "key, tls 1", "", False),
        ("tls=0", True, "key, tls 0", KEY_ALONE, True),
        ("tls=1&name=web", True, 'key "web", tls 1', "", False),
        (f"tls=2{FILES}", True, "key, tls 2", "", False),
    ],
)
def test_a_server_says_what_protects_it(query: str, has_key: bool, summary: str, weakness: str, warned: bool) -> None:
    security = made(f"server://:1/:2?{query}", has_key)
    assert (summarize(security), find_weakness(security), deserves_warning(security)) == (summary, weakness, warned)
    assert describe(security) == (f"{summary}: {weakness}" if weakness else summary)


@each_row(
    ("query", "has_key", "summary", "weakness", "warned"),
    [
        (
            "",
            False,
            "no key, tls as the server says",
            f"the server's choice, so it {PASSIVE} at most, and {SERVER_IMPERSONATED}",
            True,
        ),
        (
            "tls=0",
            False,
            "no key, tls as the server says",
            f"the server's choice, so it {PASSIVE} at most, and {SERVER_IMPERSONATED}",
            False,
        ),
        ("tls=1", False, "no key, tls 1 at least", f"{PASSIVE}, and {SERVER_IMPERSONATED}", False),
        ("tls=2", False, "no key, tls 2 at least", "", False),
        ("name=web", True, 'key "web", tls 1 at least', "", False),
        ("tls=0", True, "key, tls as the server says", KEY_ALONE, True),
        ("tls=1", True, "key, tls 1 at least", "", False),
        ("tls=2", True, "key, tls 2 at least", "", False),
    ],
)
def test_a_client_says_at_the_start_what_it_demands(
    query: str, has_key: bool, summary: str, weakness: str, warned: bool
) -> None:
    security = made(f"client://:1/:2?{query}", has_key)
    assert (summarize(security), find_weakness(security), deserves_warning(security)) == (summary, weakness, warned)


DETAILS = "(TLS 1.3, X25519MLKEM768)"


@each_row(
    ("query", "has_key", "tls", "description"),
    [
        ("", False, 0, f"none: {SERVER_IMPERSONATED}"),
        (
            "",
            False,
            1,
            f"no key, tls 1 {DETAILS}: the server's choice, so it {PASSIVE} at most, and {SERVER_IMPERSONATED}",
        ),
        (
            "",
            False,
            2,
            f"no key, tls 2 {DETAILS}: the server's choice, so it {PASSIVE}; tls=2 in the client's URL insists on it",
        ),
        ("tls=1", False, 1, f"no key, tls 1 {DETAILS}: {PASSIVE}, and {SERVER_IMPERSONATED}"),
        ("tls=2", False, 2, f"no key, tls 2 {DETAILS}"),
        ("tls=0", True, 0, f"key, tls 0: {KEY_ALONE}"),
        ("tls=0", True, 1, f"key, tls 1 {DETAILS}"),
        ("name=web", True, 1, f'key "web", tls 1 {DETAILS}'),
        ("name=web", True, 2, f'key "web", tls 2 {DETAILS}'),
    ],
)
def test_a_connected_client_says_what_it_has(query: str, has_key: bool, tls: int, description: str) -> None:
    assert describe(connected(made(f"client://:1/:2?{query}", has_key), tls)) == description


def test_with_a_wire_v1_peer_signals_are_in_the_clear() -> None:
    server = connected(made("server://:1/:2?tls=1", False), 1, wire=1)
    assert summarize(server) == "no key, tls 1 (data connections only, wire v1)"
    client = connected(made("client://:1/:2?tls=2&wire=1", False), 2, wire=1)
    assert describe(client).startswith("no key, tls 2 (data connections only, wire v1): signals are in the clear, so")


def test_a_group_that_openssls_binding_cannot_tell_is_left_out() -> None:
    security = replace(connected(made("server://:1/:2", True), 1), group="")
    assert summarize(security) == "key, tls 1 (TLS 1.3)"


@each_row(
    ("has_key", "tls", "text"),
    [
        (False, 0, "none"),
        (False, 1, "tls1"),
        (False, 2, "tls2"),
        (False, None, "?"),
        (True, 0, "key"),
        (True, 1, "key tls1"),
        (True, None, "key ?"),
    ],
)
def test_a_table_has_room_for_a_word_or_two(has_key: bool, tls: int | None, text: str) -> None:
    assert abbreviate(has_key, tls) == text


class Connection:
    """A control connection that knows its TLS mode."""

    def __init__(self, tls: int) -> None:
        self._tls = tls

    def qualify(self, security: Security) -> Security:
        return connected(security, self._tls)


def test_the_log_has_it_at_the_start_and_again_when_more_is_known() -> None:
    said = SecurityLog(made("client://:1/:2?name=web", False), Log("client:1/web"))
    with recorded() as log:
        said.report(None)
        for _ in range(2):
            said.report(Connection(2))
    assert [(each.event, each.levelno) for each in log] == 2 * [("tunnel.security", logging.WARNING)]
    assert [each.fields["tls"] for each in log] == [None, 2]
    assert "tls=2 in the client's URL insists on it" in log[1].getMessage()
    fields = ("name", "key", "tls_version", "group")
    assert [log[1].fields[each] for each in fields] == ["web", False, "TLSv1.3", "X25519MLKEM768"]


def test_what_needs_no_warning_is_information() -> None:
    with recorded() as log:
        SecurityLog(made("server://:1/:2", True), Log("server:1")).report(None)
    assert [each.levelno for each in log] == [logging.INFO]
