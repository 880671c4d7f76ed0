"""The table of settings, and texts that become values."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.kinds import Ports, format_duration, parse_duration, parse_ports
from nodepass.config.settings import Settings, rows
from nodepass.errors import ConfigError
from tests.support.table import each_row

README = Path(__file__).resolve().parents[2] / "README.md"


@each_row(
    ("text", "seconds"),
    [("0", 0), ("5s", 5), ("500ms", 0.5), ("1h30m", 5400), ("1.5s", 1.5), (".5s", 0.5), ("2m3s", 123), ("7us", 7e-6)],
)
def test_durations_are_read_as_go_reads_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@each_row("text", ["", "5", "s", "-5s", "+5s", "5 s", "5s ", "1d", "5S", "\u0665s", "1e3s", "5s3", ".s", "1,5s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@given(st.integers(1, 10**8))
def test_a_formatted_duration_is_read_back(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, rel=1e-4)


@each_row(
    ("text", "ports"),
    [("0", Ports(0, 0)), ("20000", Ports(20000, 20000)), ("20000-20099", Ports(20000, 20099)), ("7-7", Ports(7, 7))],
)
def test_ports_are_one_or_a_range(text: str, ports: Ports) -> None:
    assert parse_ports(text) == ports


@each_row("text", ["", "-1", "65536", "2-1", "0-5", "1-65536", "1-", "-", "a", "1-2-3", "1 -2"])
def test_what_is_no_range_of_ports_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_ports(text)


def test_every_row_is_complete_and_in_the_readme() -> None:
    readme = README.read_text()
    for name, row in rows().items():
        assert row.help.startswith(row.role), f"{name}: who reads it knows which end it is for"
        assert row.help, name
        assert row.group, name
        assert row.kind.unit, name
        assert row.kind.parse(row.default) == getattr(Settings(), name), name
        assert re.search(rf"^\| `{name.upper()}` \| `{re.escape(row.default)}` \|", readme, re.MULTILINE), name


def refusal(name: str, text: str) -> str:
    """The error of a setting with this text; none where it is taken."""
    try:
        Settings.from_texts({name: ("THE PLACE", text)})
    except ConfigError as error:
        return str(error)
    return ""


def test_every_setting_refuses_nonsense_and_says_where_it_was_written() -> None:
    said = {(name, text): refusal(name, text) for name in rows() for text in ("", "-1", "nonsense", "99999999999", " ")}
    expected = re.compile(r"THE PLACE: .* is not usable; allowed: ")
    assert not {case: words for case, words in said.items() if not expected.match(words)}
