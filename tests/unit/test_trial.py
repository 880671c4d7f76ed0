"""A v1 client on trial: what ends its trial, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import gevent
import pytest

from nodepass.server.client_slot import Trial
from tests.unit.controls import V1, Ends, connect_ends, run
from tests.unit.servers import PATIENT, SOON, a_server_room
from tests.unit.streams import reset


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


def begin(stack: ExitStack) -> tuple[Ends, Trial]:
    ends = connect_ends(stack)
    return ends, Trial(ends.server_control(V1), V1, None)


def test_a_trial_is_over_when_it_is_decided(stack: ExitStack) -> None:
    _, trial = begin(stack)
    waiting = run(stack, trial.wait, PATIENT)
    gevent.sleep(0)
    assert not waiting.ready()
    assert "waiting" in repr(trial)
    trial.end(True)
    assert waiting.get() is True
    assert "ended" in repr(trial)


def test_the_first_decision_counts(stack: ExitStack) -> None:
    _, trial = begin(stack)
    trial.end(False)
    trial.end(True)
    assert trial.wait(PATIENT) is False


def test_a_decision_that_was_made_before_it_is_waited_for_counts(stack: ExitStack) -> None:
    _, trial = begin(stack)
    trial.end(True)
    assert trial.wait(0) is True


def test_a_trial_in_which_nothing_happens_ends_after_its_time(stack: ExitStack) -> None:
    _, trial = begin(stack)
    assert trial.wait(SOON) is False


@pytest.mark.parametrize("what", ["a byte", "the end", "a reset"])
def test_a_client_that_says_something_or_leaves_ends_its_trial(stack: ExitStack, what: str) -> None:
    ends, trial = begin(stack)
    waiting = run(stack, trial.wait, PATIENT)
    gevent.sleep(0)
    if what == "a byte":
        ends.client.sendall(b"x")
    elif what == "the end":
        ends.client.close()
    else:
        reset(ends.client)
    assert waiting.get() is False


def test_a_byte_stays_to_be_read(stack: ExitStack) -> None:
    ends, trial = begin(stack)
    ends.client.sendall(b"/")
    assert trial.wait(PATIENT) is False
    assert ends.server.recv(10) == b"/"
