"""Tables in one test: all rows are tried, and all that fail are shown together.

`pytest.mark.parametrize` makes a test of each row, which costs 10 ms of CPU time: three workers collect it, one runs it
and one reports it. Large tables of small checks are written with `each_row` instead. A test of each row stays right
where rows need a fixture of their own, are marked, or take long.
"""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Test = Callable[..., None]


def each_row(names: str | Sequence[str], rows: Iterable[Any]) -> Callable[[Test], Test]:
    """Call the test with each row as the arguments of these names; AssertionError with the failures of all rows.

    `names` is one name, or a sequence of names for rows that are sequences. Two of these on one test try each row of
    one table with each of the other.
    """
    rows = list(rows)
    assert rows, "an empty table tests nothing"
    given = [{names: row} if isinstance(names, str) else dict(zip(names, row, strict=True)) for row in rows]

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def try_all(**fixtures: Any) -> None:
            failures = []
            for arguments in given:
                try:
                    test(**fixtures, **arguments)
                except (Exception, pytest.fail.Exception):  # noqa: BLE001  # shown below, with those of the other rows
                    failures.append(f"with {arguments!r}:\n{traceback.format_exc()}")
            if failures:
                raise AssertionError(f"{len(failures)} of {len(given)} rows fail\n\n" + "\n".join(failures))

        own = inspect.signature(test)
        rest = [each for name, each in own.parameters.items() if name not in given[0]]
        try_all.__signature__ = own.replace(parameters=rest)  # type: ignore[attr-defined]  # which fixtures it asks for
        return try_all

    return decorate
