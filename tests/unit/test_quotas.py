"""How many sessions of one address are served: how the settings are read, and what counts as one address."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.hostport import parse_ip
from nodepass.config.kinds import Quota
from nodepass.config.settings import Settings
from nodepass.errors import ConfigError
from nodepass.visitors import quotas
from nodepass.visitors.quotas import Concurrency, Rate, key_of
from tests.support.table import each_row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr(quotas.time, "monotonic", lambda: now[0])
    return now


@each_row(
    ("name", "text", "quota"),
    [
        ("sessions_per_address", "0", Quota()),
        ("sessions_per_address", "20", Quota(20)),
        ("sessions_per_address", "20,/24", Quota(20, prefixes=(24, 64))),
        ("sessions_per_address", "20,/24,/56", Quota(20, prefixes=(24, 56))),
        ("new_sessions_per_address", "0", Quota()),
        ("new_sessions_per_address", "20/10s", Quota(20, 10)),
        ("new_sessions_per_address", "1/1m30s,/0,/0", Quota(1, 90, (0, 0))),
    ],
)
def test_a_quota_has_a_number_and_what_counts_as_one_address(name: str, text: str, quota: Quota) -> None:
    assert getattr(Settings.from_texts({name: (name, text)}), name) == quota


@each_row(
    ("name", "text"),
    [
        ("sessions_per_address", "20/24"),
        ("sessions_per_address", "20/10s"),
        ("sessions_per_address", "0,/24"),
        ("sessions_per_address", "20,24"),
        ("sessions_per_address", "20,/33"),
        ("sessions_per_address", "20,/24,/129"),
        ("sessions_per_address", "20,/24,/56,/64"),
        ("sessions_per_address", "1000001"),
        ("new_sessions_per_address", "20"),
        ("new_sessions_per_address", "0/10s"),
        ("new_sessions_per_address", "20/10"),
        ("new_sessions_per_address", "20/0"),
        ("new_sessions_per_address", "20/25h"),
    ],
)
def test_what_is_no_quota_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=r"^PLACE: .* is not usable; allowed: 0 \(no limit\)"):
        Settings.from_texts({name: ("PLACE", text)})


@each_row(
    ("one", "other", "is_same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("0.0.0.1", "::1", False),
        ("0.0.0.0", "::", False),
    ],
)
def test_one_address_is_an_ipv4_address_or_a_64_of_ipv6(one: str, other: str, is_same: bool) -> None:
    quota = Quota(1)
    assert (key_of(parse_ip(one), quota) == key_of(parse_ip(other), quota)) is is_same


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60))
def test_concurrency_counts_what_is_open_and_forgets_the_rest(steps: list[tuple[int, bool]]) -> None:
    concurrency, is_open = Concurrency(Quota(3)), Counter[int]()
    for number, begins in steps:
        if begins:
            assert concurrency.take((4, number)) is (is_open[number] < 3)
            is_open[number] = min(3, is_open[number] + 1)
        elif is_open[number]:
            concurrency.release((4, number))
            is_open[number] -= 1
    assert len(concurrency) == len(+is_open)


@pytest.mark.parametrize("most", [1, 3, 7, 20, 1000])
def test_a_rate_serves_a_burst_and_then_evenly(clock: list[float], most: int) -> None:
    rate = Rate(Quota(most, 10))
    assert [rate.take((4, 1)) for _ in range(most + 5)] == [True] * most + [False] * 5
    assert rate.take((4, 2)), "another address"
    clock[0] += 10 / most
    assert [rate.take((4, 1)) for _ in range(2)] == [True, False]
    clock[0] += 10
    assert [rate.take((4, 1)) for _ in range(most + 1)] == [True] * most + [False]


def test_a_rate_forgets_addresses_that_have_not_come_for_its_time(clock: list[float]) -> None:
    rate = Rate(Quota(2, 10))
    for number in range(100):
        rate.take((4, number))
    clock[0] += 11
    for number in range(200, 260):
        rate.take((4, number))
    assert len(rate) == 60


def test_a_rate_keeps_a_bounded_number_of_addresses_and_those_that_came_last(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "MOST_TIMES", 10)
    rate = Rate(Quota(1, 10))
    for number in range(100):
        assert rate.take((4, number))
        assert not rate.take((4, 0)) or number == 0, "refused ones count as coming"
    assert len(rate) == 10
    assert clock
