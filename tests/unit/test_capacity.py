"""How many data connections are kept ready."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodepass.tunnel.pool import next_capacity
from tests.support.table import each_row


@each_row(
    ("capacity", "created", "found_empty", "expected"),
    [
        (100, 0, False, 80),
        (100, 19, False, 80),
        (100, 20, False, 100),
        (100, 80, False, 100),
        (100, 81, False, 200),
        (100, 0, True, 200),
        (100, 50, True, 200),
        (16, 0, False, 16),
        (18, 0, False, 16),
        (900, 0, True, 1024),
        (1024, 5000, True, 1024),
    ],
)
def test_the_capacity_follows_what_was_created(capacity: int, created: int, found_empty: bool, expected: int) -> None:
    assert next_capacity(capacity, created, found_empty, 16, 1024) == expected


@given(st.integers(1, 5000), st.integers(0, 10000), st.booleans(), st.integers(1, 100), st.integers(100, 2000))
def test_the_capacity_stays_between_its_bounds(
    capacity: int, created: int, found_empty: bool, lowest: int, highest: int
) -> None:
    assert lowest <= next_capacity(capacity, created, found_empty, lowest, highest) <= highest


@given(st.integers(1, 2000))
def test_quiet_time_shrinks_any_pool_to_the_minimum(capacity: int) -> None:
    for _ in range(40):
        capacity = next_capacity(capacity, 0, False, 1, 2000)
    assert capacity == 1
