"""The soak's own judgement: what it must find, it finds."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace

import pytest

from tests.soak.content import Content
from tests.soak.conversation import Conversation, End
from tests.soak.datagrams import answers_to, check, make
from tests.soak.faults import TARGET_AWAY
from tests.soak.pairs import Run, Sample, Shape
from tests.soak.sessions import Session, outcome, wrongs
from tests.soak.vitals import slopes
from tests.support.process import Nodepass
from tests.support.table import each_row

SESSION = Session(7, 300_000, 2_000_000)
RUN = Run("steady", "server", Shape(0, False, False), Nodepass())


def ends(session: Session) -> tuple[End, End]:
    """The visitor's and the target's end of a session that has gone well."""
    sent = End(session.visitors_part()), End(session.targets_part())
    for end, other in (sent, sent[::-1]):
        end.sent, end.received = end.part.size, other.part.size
        end.said_end, end.heard, end.digest = True, "end", end.part.hears.digest(end.received)
    return sent


def play(session: Session) -> tuple[End, End]:
    """Both ends of a session, played on a pair of sockets."""
    played = End(session.visitors_part()), End(session.targets_part())
    threads = [
        threading.Thread(target=Conversation(sock, end, lambda: False).run)
        for sock, end in zip(socket.socketpair(), played, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return played


@pytest.mark.parametrize("manner", ["whole", "visitor listens first", "target dawdles"])
def test_a_session_that_goes_well_is_complete(manner: str) -> None:
    session = replace(SESSION, manner=manner)
    visitor, target = play(session)
    assert not wrongs(session, visitor, target)
    assert outcome(session, visitor, target) == "complete"


@each_row("manner", ["visitor leaves", "target leaves", "visitor resets", "target resets"])
def test_a_session_that_one_end_leaves_is_neither_complete_nor_wrong(manner: str) -> None:
    session = replace(SESSION, manner=manner, leaves_after=100_000)
    visitor, target = play(session)
    assert not wrongs(session, visitor, target)
    assert outcome(session, visitor, target) == "left"


def test_a_header_says_all_of_a_session() -> None:
    session = replace(SESSION, manner="target leaves", leaves_after=5)
    assert Session.decode(session.encode()) == session


def test_a_cut_stream_that_looks_whole_is_found() -> None:
    visitor, target = ends(SESSION)
    visitor.received -= 1
    visitor.digest = visitor.part.hears.digest(visitor.received)
    assert "looked whole" in wrongs(SESSION, visitor, target)[0]
    visitor.heard = "reset"
    assert not wrongs(SESSION, visitor, target)
    assert outcome(SESSION, visitor, target) == "cut"


def test_an_empty_answer_of_a_target_that_was_never_reached_is_found() -> None:
    visitor, _ = ends(SESSION)
    visitor.received, visitor.digest = 0, visitor.part.hears.digest(0)
    assert "looked whole" in wrongs(SESSION, visitor, None)[0]


def test_a_wrong_byte_is_found() -> None:
    visitor, target = ends(SESSION)
    target.digest = Content(99).digest(target.received)
    assert "not those that were sent" in wrongs(SESSION, visitor, target)[0]


def test_a_session_that_hangs_is_found() -> None:
    visitor, target = ends(SESSION)
    target.heard = "stuck"
    assert "nothing more" in wrongs(SESSION, visitor, target)[0]


def test_a_datagram_is_checked_and_answered() -> None:
    question = make(3, 1, 2, 1000, 0)
    assert [check(answer)[4] for answer in answers_to(question)] == [1, 2]
    for wrong in (b"", question[:-1], question[:-1] + b"?"):
        with pytest.raises(AssertionError):
            answers_to(wrong)


@each_row(
    ("resident", "heap", "blocks", "are_flat"),
    [(0, 0, 0, True), (300, 10, 100, True), (1000, 0, 0, False), (0, 80, 0, False), (0, 0, 800, False)],
)
def test_memory_that_grows_after_the_warm_up_is_found(resident: int, heap: int, blocks: int, are_flat: bool) -> None:
    samples = [
        Sample(60.0 * minute, 20_000 + resident * minute + minute % 2 * 300, 6000 + heap * minute, blocks * minute)
        for minute in range(12)
    ]
    found = slopes(replace(RUN, memory=samples))
    assert found
    assert found.are_flat is are_flat


def test_a_line_of_the_log_that_no_fault_explains_is_found() -> None:
    run = replace(RUN, process=Nodepass())
    run.process._append([line("info", "server.disconnected"), line("warn", "target.unreachable"), b"Traceback:"])
    assert [found.endswith("Traceback:") for found in run.unexpected(TARGET_AWAY)] == [True]
    run.process._append([line("warn", "target.unreachable")])
    assert len(run.unexpected()) == 1
    run.process._append([line("warn", "datagram.dropped", reason="too_large")])
    assert len(run.unexpected(TARGET_AWAY)) == 1


def line(level: str, event: str, **fields: str) -> bytes:
    """A line of a log."""
    own = {"time": "2026-01-01T00:00:00.000+00:00", "level": level, "tunnel": "client:1", "event": event, "message": ""}
    return json.dumps({**own, **fields}).encode()
