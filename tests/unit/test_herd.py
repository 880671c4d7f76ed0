"""The simulation of many clients that come back at once, against what can be said without it."""

from __future__ import annotations

import random

import pytest

from benchmarks.herd import POOL, Simulation
from nodepass.config.settings import Settings

LONGEST = Settings().service_cooldown


@pytest.mark.parametrize("clients", [1, 100])
def test_without_a_crowd_the_last_client_has_made_its_longest_pause(clients: int) -> None:
    found = Simulation(clients, 0.0001, random.Random(1)).run()
    assert found.all <= LONGEST + 0.1
    assert found.attempts == 1


def test_a_crowd_needs_the_time_of_its_handshakes_and_little_more() -> None:
    """A server that serves in turn, however late, would be too late for each."""
    clients, cost = 1500, 0.02
    found = Simulation(clients, cost, random.Random(1)).run()
    assert clients * cost / 2 < found.all < 2 * clients * cost
    assert found.attempts > 1
    assert POOL >= 1
