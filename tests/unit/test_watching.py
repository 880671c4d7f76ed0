"""How failures and numbers are named and counted."""

from __future__ import annotations

import pytest

from nodepass.config.kinds import Listen, parse_listen
from nodepass.errors import ClosedError, ProtocolError, RefusedError, TLSError, VerificationError
from nodepass.stats import BUCKETS, CONTROL_FAILURES, DATA_FAILURES, Histogram, Stats, failure
from tests.support.table import each_row


@each_row(
    ("error", "name"),
    [
        (VerificationError("x"), "certificate"),
        (TLSError("x"), "tls"),
        (ProtocolError("x"), "protocol"),
        (ClosedError("x"), "closed"),
        (ConnectionResetError(), "closed"),
        (TimeoutError(), "timeout"),
        (ConnectionRefusedError(), "unreachable"),
        (OSError("no route"), "unreachable"),
        (RefusedError("key-mismatch"), "key_mismatch"),
        (RefusedError("made-up-by-a-peer-1234"), "other"),
    ],
)
def test_a_failure_has_one_of_the_known_names(error: OSError, name: str) -> None:
    assert failure(error) == name
    assert name in CONTROL_FAILURES or name in DATA_FAILURES


def test_a_histogram_counts_what_is_at_most_the_bound() -> None:
    histogram = Histogram()
    for seconds in (0.0, BUCKETS[0], BUCKETS[0] * 1.01, BUCKETS[-1], BUCKETS[-1] + 1):
        histogram.observe(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[-2:] == [1, 1]
    assert sum(histogram.counts) == 5
    assert histogram.total == pytest.approx(BUCKETS[0] * 2.01 + BUCKETS[-1] * 2 + 1)


def test_the_snapshot_names_the_reasons_that_have_happened_and_no_others() -> None:
    stats = Stats()
    stats.tcp.begin()
    stats.tcp.end("completed")
    stats.udp_drops["lane_full"] += 2
    stats.trouble["limit_reached"] += 1
    shown = str(stats)
    assert "tcp sessions 1, " in shown
    assert shown.endswith("tcp: completed 1, dropped: lane full 2, limit reached 1")


@each_row(
    ("text", "listen"),
    [
        ("off", None),
        (":9464", Listen("", 9464)),
        ("0.0.0.0:1", Listen("0.0.0.0", 1)),
        ("[::]:1", Listen("::", 1)),
        ("metrics.example:0", Listen("metrics.example", 0)),
        ("unix:/run/nodepass.sock", Listen(path="/run/nodepass.sock")),
    ],
)
def test_an_address_to_listen_on_is_read(text: str, listen: Listen | None) -> None:
    assert parse_listen(text) == listen
