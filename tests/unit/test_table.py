"""`each_row`: that no row is left out, and that each failure is shown."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.support.table import each_row


def test_each_row_is_tried_with_each_row_of_the_other_table() -> None:
    tried = []

    @each_row("letter", ["a", "b"])
    @each_row(("number", "word"), [(1, "one"), (2, "two")])
    def check(letter: str, fixture: str, number: int, word: str) -> None:
        tried.append((letter, fixture, number, word))

    assert list(inspect.signature(check).parameters) == ["fixture"], "what pytest looks for"
    check(fixture="given")
    assert tried == [(letter, "given", *row) for letter in "ab" for row in ((1, "one"), (2, "two"))]


def test_all_rows_that_fail_are_shown_whatever_they_raise() -> None:
    @each_row("number", [0, 1, 2, 3])
    def check(number: int) -> None:
        assert number != 1, "an assertion"
        if number == 2:
            raise ValueError("an error")
        if number == 3:
            pytest.fail("a failure")

    with pytest.raises(AssertionError, match="3 of 4 rows fail") as failed:
        check()
    shown = re.findall(r"with {'number': (\d)}|(an assertion|an error|a failure)\n", str(failed.value))
    assert [number or text for number, text in shown] == ["1", "an assertion", "2", "an error", "3", "a failure"]


def test_an_empty_table_is_an_error() -> None:
    with pytest.raises(AssertionError, match="empty table"):
        each_row("number", [])
