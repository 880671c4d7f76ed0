"""Any bytes at all for whatever parses a peer's bytes; see `tests.fuzz`.

What is tried is the same in every run, so that a commit passes or fails for itself; `make fuzz` looks further.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodepass.wire.lines import MAX_OPENING
from nodepass.wire.negotiation import (
    HEARTBEATS,
    Auth,
    Challenge,
    DataHello,
    Hello,
    Offer,
    Refusal,
    parse_auth,
    parse_first,
    parse_opening,
    without_mac,
)
from nodepass.wire.signals import LANE, TCP, UDP, Beat, BeatAnswer, Bye, Launch, parse_signal, parse_v1_signal
from tests.fuzz.targets import SEEDS, TARGETS, seeds
from tests.support.table import each_row

reproducible = settings(
    derandomize=True,
    deadline=None,
    print_blob=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)

edits = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 20), st.one_of(st.binary(max_size=8), st.binary(max_size=200))),
    max_size=4,
)


def edited(seed: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """The seed with bytes taken out and put in at some places."""
    for place, dropped, added in changes:
        seed = seed[:place] + added + seed[place + dropped :]
    return seed


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Any bytes, and seeds of the target with changes, which get further in."""
    return st.one_of(st.builds(edited, st.sampled_from(seeds(name)), edits), st.binary(max_size=300))


@each_row("name", TARGETS)
def test_every_seed_that_is_kept_passes(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name](seed)


# Text of metrics is the costliest to make up and to parse: more than 3 s.
SLOW = {"scrape": pytest.mark.programs}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in TARGETS])
def test_whatever_arrives_is_understood_or_refused_as_documented(name: str) -> None:
    reproducible(given(inputs(name))(TARGETS[name]))()


def test_every_target_has_seeds_and_no_seed_lacks_its_target() -> None:
    assert {path.stem for path in SEEDS.glob("*.txt")} == set(TARGETS)
    assert all(seeds(name) for name in TARGETS)


def digits(size: int) -> st.SearchStrategy[str]:
    """So many hex digits."""
    return st.text("0123456789abcdef", min_size=size, max_size=size)


names = st.text("ABCXYZabcxyz019._-", max_size=64)
offers = st.builds(
    Offer,
    data_port=st.integers(1, 65535),
    tls=st.integers(0, 2),
    heartbeat=st.integers(*HEARTBEATS),
    sid=st.one_of(st.just(""), digits(32)),
    mux=st.booleans(),
    mac=st.one_of(st.just(""), digits(64)),
)
v1_offers = st.builds(Offer, st.integers(1, 65535), st.integers(0, 2))
tokens = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=32)
openings = st.one_of(offers, v1_offers, st.builds(Refusal, tokens), st.builds(Challenge, digits(32)))
addresses = st.builds(
    lambda host, port: f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
    st.ip_addresses().map(str),
    st.integers(0, 65535),
)
launches = st.one_of(
    st.builds(Launch, digits(8), st.sampled_from([TCP, LANE])),
    st.builds(Launch, digits(8), st.sampled_from([TCP, LANE]), addresses, addresses),
)
signals = st.one_of(
    launches,
    st.builds(Beat, st.integers(0, 10**9 - 1)),
    st.builds(BeatAnswer, st.booleans()),
    st.builds(Bye, tokens),
)


@reproducible
@given(openings)
def test_what_a_server_writes_in_the_handshake_is_what_a_client_reads(signal: Challenge | Refusal | Offer) -> None:
    line = signal.encode()
    assert parse_opening(line[:-1]) == signal
    assert len(line) <= MAX_OPENING
    if isinstance(signal, Offer) and signal.mac and signal.version == 2:
        assert without_mac(line[:-1], signal.mac) + b"\n" == replace(signal, mac="").encode()


@reproducible
@given(
    st.builds(Hello, digits(32), digits(16), names, st.booleans()),
    st.builds(DataHello, digits(32)),
    st.builds(Auth, digits(64)),
)
def test_what_a_client_writes_in_the_handshake_is_what_a_server_reads(
    hello: Hello, data: DataHello, auth: Auth
) -> None:
    for first in (hello, data):
        assert parse_first(first.encode()[:-1]) == first
        assert len(first.encode()) <= MAX_OPENING
    assert parse_auth(auth.encode()[:-1]) == auth


@reproducible
@given(signals)
def test_a_signal_is_read_as_it_was_written(signal: Launch | Beat | BeatAnswer | Bye) -> None:
    assert parse_signal(signal.encode()[:-1]) == signal


@reproducible
@given(st.builds(Launch, digits(8), st.sampled_from([TCP, UDP])))
def test_a_launch_of_v1_is_read_as_it_was_written(launch: Launch) -> None:
    assert parse_v1_signal(launch.encode()[:-1]) == launch
