"""How the tests read a log: what is an event, what matches, and that a misspelt name is an error and not no match."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.log import Entry, check_wanted, loud, one_of, parse
from tests.support.table import each_row

LINE = {
    "time": "2026-01-01T00:00:00.250+00:00",
    "level": "warn",
    "tunnel": "server:10101",
    "session": "0a1b2c3d",
    "event": "client.rejected",
    "message": "client 192.0.2.7:5 turned\naway",
    "client": "192.0.2.7:5",
    "reason": "busy",
}


def entry(**more: object) -> Entry:
    return parse(json.dumps({**LINE, **more}))


def test_a_line_of_json_is_an_event_also_with_the_journal_s_priority() -> None:
    for line in (json.dumps(LINE), "<4>" + json.dumps(LINE)):
        found = parse(line)
        assert (found.event, found["reason"], found.line) == ("client.rejected", "busy", line)
        assert found.fields == {"client": "192.0.2.7:5", "reason": "busy"}
        assert found.moment == 1767225600.25


@each_row("line", ["Traceback (most recent call last):", "{not json", '{"a": 1}', "nodepass: no URL", ""])
def test_what_is_no_event_stays_text_and_matches_nothing(line: str) -> None:
    found = parse(line)
    assert (found.event, found.text(), str(found)) == ("", line, line)
    assert not found.matches("", {})
    assert found.is_crash == line.startswith("Traceback")


def test_an_event_is_shown_as_a_line_of_text() -> None:
    assert entry().text() == r"00:00:00.250 WARN  server:10101 [0a1b2c3d] client 192.0.2.7:5 turned\naway"
    assert entry(traceback="Traceback:\n  here").text().endswith("away\nTraceback:\n  here")
    assert entry(traceback="Traceback:\n  here").is_crash


@each_row(
    ("event", "wanted", "fits"),
    [
        ("client.rejected", {}, True),
        ("", {}, True),
        ("client.replaced", {}, False),
        ("client.rejected", {"reason": "busy", "client": re.compile(r"^192\.0\.2\.7:")}, True),
        ("client.rejected", {"reason": "busy", "client": re.compile(r"^127\.")}, False),
        ("", {"reason": one_of("busy", "shutdown"), "level": loud}, True),
        ("", {"reason": one_of("key_required")}, False),
        ("", {"wire": 2}, False),
        ("", {"wire": lambda _: True}, False),
    ],
)
def test_an_event_matches_by_its_name_and_fields(event: str, wanted: dict[str, object], fits: bool) -> None:
    assert entry().matches(event, wanted) is fits


@each_row(
    ("event", "field"),
    [
        ("client.disconected", "client"),
        ("client.rejected", "cleint"),
        ("client.rejected", "wire"),
        ("client.rejected", "message"),
        ("", "no_field_of_any_event"),
    ],
)
def test_to_look_for_what_no_event_has_is_an_error(event: str, field: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(field if event in ("", "client.rejected") else event)):
        check_wanted(event, [field])


def test_what_every_line_has_may_be_looked_for() -> None:
    check_wanted("client.rejected", ["level", "tunnel", "session", "time", "traceback", "reason"])
    check_wanted("", ["reason", "level"])
