"""Any bytes at all for whatever parses a peer's bytes; see `tests.fuzz`.

What is tried is the same in every run, so that a commit passes or fails for itself; `make fuzz` looks further.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodepass.wire.signals import (
    KIND_NAMES,
    Auth,
    Challenge,
    Hello,
    Launch,
    Offer,
    Refusal,
    parse_auth,
    parse_hello,
    parse_opening,
    parse_signal,
)
from tests.fuzz.targets import SEEDS, TARGETS, seeds

reproducible = settings(
    derandomize=True,
    deadline=None,
    print_blob=True,
    max_examples=120,
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


@pytest.mark.parametrize("name", TARGETS)
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


tunnels = st.builds(
    Offer,
    data_port=st.integers(1, 65535),
    tls=st.integers(0, 2),
    heartbeat=st.integers(1, 10**9 - 1),
    mux=st.booleans(),
    fingerprint=st.one_of(st.just(""), digits(64)),
    mac=st.one_of(st.just(""), digits(64)),
)
old_tunnels = st.builds(Offer, st.integers(1, 65535), st.integers(0, 2))
refusals = st.builds(Refusal, st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=32))


@reproducible
@given(st.one_of(tunnels, old_tunnels, refusals, st.builds(Challenge, digits(32))))
def test_what_a_server_writes_in_the_handshake_is_what_a_client_reads(signal: Challenge | Refusal | Offer) -> None:
    assert parse_opening(signal.encode()) == signal


@reproducible
@given(st.builds(Hello, digits(32)), st.builds(Auth, digits(64)))
def test_what_a_client_writes_in_the_handshake_is_what_a_server_reads(hello: Hello, auth: Auth) -> None:
    assert parse_hello(hello.encode()) == hello
    assert parse_auth(auth.encode()) == auth


@reproducible
@given(st.builds(Launch, digits(8), st.sampled_from(sorted(KIND_NAMES))))
def test_a_launch_is_read_as_it_was_written(launch: Launch) -> None:
    assert parse_signal(launch.encode()) == launch
