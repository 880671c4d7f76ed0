"""Rates, sparklines and tables of `nodepass top`."""

from __future__ import annotations

import itertools

import pytest

from nodepass.tools.top_scrape import Scrape, Tunnel
from nodepass.tools.top_table import COLUMNS, Watch, duration, fit, plain, size, sparkline
from tests.support.table import each_row


def scrape(taken: float, *tunnels: Tunnel, started: float = 1.0) -> Scrape:
    return Scrape(taken, "1", started, None, taken / 10, {each.name: each for each in tunnels})


def test_rates_are_per_second_and_survive_a_tunnel_that_starts_anew() -> None:
    watch = Watch()
    watch.add(scrape(10, Tunnel("a", up=1000), Tunnel("b", up=5000)))
    assert not watch.rates
    watch.add(scrape(12, Tunnel("a", up=3000), Tunnel("b", up=100)))
    assert watch.rates["a"].up == 1000
    assert watch.rates["b"].up == 50
    assert watch.cpu == pytest.approx(0.1)
    assert list(watch.history("a")) == [1000]


def test_after_a_restart_of_the_process_there_are_no_rates_yet() -> None:
    watch = Watch()
    watch.add(scrape(10, Tunnel("a", up=1000)))
    watch.add(scrape(12, Tunnel("a", up=3000), started=11.0))
    assert not watch.rates
    assert watch.cpu is None
    assert watch.rows()[0][-1] == "-"


def test_tunnels_that_are_gone_leave_no_history() -> None:
    watch = Watch()
    for taken, name in ((10, "a"), (12, "a"), (14, "b"), (16, "b")):
        watch.add(scrape(taken, Tunnel(name, up=taken)))
    assert list(watch.history("b")) == [1]
    assert not watch.history("a")


@each_row(
    ("values", "width", "bars"),
    [
        ([], 5, ""),
        ([0, 0], 5, "▁▁"),
        ([0, 1, 7, 14], 4, "▁▂▄█"),
        ([9, 9, 0, 14], 2, "▁█"),
        ([1, 2], 0, ""),
        ([0.001, 1000], 2, "▂█"),
    ],
)
def test_a_sparkline_is_scaled_to_its_highest_value(values: list[float], width: int, bars: str) -> None:
    assert sparkline(values, width) == bars


@each_row(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1.5e9, "1.5 GB"), (2e15, "2e+03 TB")],
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert size(count) == text


@each_row(
    ("up", "down", "text"),
    [
        (None, None, "-"),
        (1250000.0, None, "10M/-"),
        (None, 1000.0, "-/8k"),
        (62500.0, 312500000.0, "500k/2.5G"),
        (12.5, 1.25e10, "100/100G"),
    ],
)
def test_the_limits_of_a_rate_are_shown_as_they_are_set(up: float | None, down: float | None, text: str) -> None:
    watch = Watch()
    watch.add(scrape(10, Tunnel("a", rate_up=up, rate_down=down)))
    assert watch.rows()[0][[column.title for column in COLUMNS].index("RATE")] == text


@each_row(("seconds", "text"), [(-1, "0s"), (59, "59s"), (61, "1m1s"), (3 * 3600 + 60, "3h1m"), (90000, "1d1h")])
def test_time_spans_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_columns_go_one_by_one_and_the_name_stays() -> None:
    row = tuple("x" for _ in COLUMNS)
    kept = [fit([row], width) for width in range(200, 0, -1)]
    assert kept[0] == list(range(len(COLUMNS)))
    assert kept[-1] == [0]
    assert all(len(before) - len(after) in (0, 1) for before, after in itertools.pairwise(kept))


def test_a_plain_table_is_aligned() -> None:
    watch = Watch()
    watch.add(
        scrape(
            1,
            Tunnel("a-long-name-of-a-tunnel", ready=True),
            Tunnel("b", round_trip=0.0123, peer="h:1", security="key tls1", peers=1, peers_connected=1),
            Tunnel("c", peer="h:2", peers=3, peers_connected=2),
        )
    )
    head, first, second, third = plain(watch.rows()).splitlines()
    assert head.index("SECURITY") == second.index("key tls1")
    assert head.index("STATE") == first.index("ready") == second.index("down")
    assert "12.3ms" in second
    assert head.index("PEER") == second.index("h:1") == third.index("2 of 3")
