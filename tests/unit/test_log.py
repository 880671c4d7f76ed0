"""The log: one event in each form, escapes, tracebacks, limits, and every call of it in the package."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nodepass
from nodepass import log
from nodepass.config.urls import LOG_LEVELS
from nodepass.log import Limit, Log
from tests.unit.records import recorded

PACKAGE = Path(nodepass.__file__).parent
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
ESCAPE = "\x1b[31m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The log of other tests stays as it was."""
    with recorded():
        yield


def set_up(level: str = "debug", style: str = "text", stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    log.set_up(level, {}, stream, style)
    return stream


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def say_one() -> None:
    Log("server:1").session("0a1b2c3d").warning("visitor.unserved", "visitor %(visitor)s waited", visitor="a:1")


def crash(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        Log("server:1").error("bug.caught", "%(where)s crashed", crash=error, where="a loop")


@pytest.fixture
def for_journald() -> Iterator[Any]:
    """Set up the log for a stream that journald reads, and read it."""
    reading, writing = os.pipe()
    status = os.fstat(writing)
    with open(writing, "w") as stream, open(reading):

        def start(style: str = "text") -> Any:
            log.set_up("debug", {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, stream, style)
            return read

        def read() -> list[str]:
            os.set_blocking(reading, False)
            return os.read(reading, 1 << 16).decode().splitlines(keepends=True)

        yield start


def test_as_text_a_line_has_time_level_tunnel_session_and_sentence() -> None:
    stream = set_up()
    say_one()
    assert re.fullmatch(rf"{TIME} WARN  server:1 \[0a1b2c3d\] visitor a:1 waited\n", stream.getvalue())


def test_a_line_about_one_of_several_servers_says_which_one_and_its_limits_are_its_own() -> None:
    for style, shown in (("text", ["[a:1] wait", "[0a1b2c3d] wait", "[b:2] wait"]), ("json", ['"server": "a:1"'])):
        stream, log, words = set_up(style=style), Log("client:1"), "wait"
        one, other = log.server("a:1"), log.server("b:2")
        for _ in range(2):
            one.warning("data.missing", words, Limit(burst=1))
        one.session("0a1b2c3d").warning("launch.unknown", words)
        other.warning("data.missing", words, Limit(burst=1))
        lines = lines_of(stream)
        assert len(lines) == 3
        assert all(text in line for text, line in zip(shown, lines, strict=False))
        if style == "json":
            assert [json.loads(line)["server"] for line in lines] == ["a:1", "a:1", "b:2"]
            assert ["session" in json.loads(line) for line in lines] == [False, True, False]


def test_as_json_it_has_the_same_with_the_event_and_its_fields() -> None:
    stream = set_up(style="json")
    say_one()
    shown = json.loads(stream.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", shown.pop("time"))
    assert shown == {
        "level": "warn",
        "tunnel": "server:1",
        "session": "0a1b2c3d",
        "event": "visitor.unserved",
        "message": "visitor a:1 waited",
        "visitor": "a:1",
    }


def test_for_journald_a_line_has_a_priority_and_no_time(for_journald: Any) -> None:
    read = for_journald()
    say_one()
    assert read() == ["<4>server:1 [0a1b2c3d] visitor a:1 waited\n"]


def test_for_journald_json_has_a_priority_in_front(for_journald: Any) -> None:
    read = for_journald("json")
    say_one()
    crash("two\nlines")
    lines = read()
    assert [line[:4] for line in lines] == ["<4>{", "<3>{"]
    assert [json.loads(line[3:])["event"] for line in lines] == ["visitor.unserved", "bug.caught"]


def test_another_stream_than_the_journals_gets_no_priorities() -> None:
    with open(os.devnull, "w") as stream:
        status = os.fstat(stream.fileno())
        assert log.journald_reads(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not log.journald_reads(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
        assert not log.journald_reads(stream, {})
    assert not log.journald_reads(io.StringIO(), {"JOURNAL_STREAM": "1:1"})


def test_only_a_terminal_gets_colours_and_only_where_they_are_wanted() -> None:
    coloured = set_up(stream=Terminal())
    say_one()
    assert "\x1b[33mWARN \x1b[0m server:1" in coloured.getvalue()
    log.set_up("debug", {"NO_COLOR": "1"}, plain := Terminal())
    say_one()
    assert "\x1b" not in plain.getvalue()


@pytest.mark.parametrize("level", LOG_LEVELS)
def test_a_level_shows_itself_and_what_is_worse(level: str) -> None:
    stream = set_up(level)
    one = Log("t")
    for number in log.LEVELS.values():
        one.log(number, "a.line", "-")
    one.debug("a.line", "-")
    shown = re.findall(rf"^{TIME} (\w+)", stream.getvalue(), re.MULTILINE)
    expected = [each.upper() for each in LOG_LEVELS[LOG_LEVELS.index(level) :]]
    assert shown == expected + ["DEBUG"] * (level == "debug")


def test_what_an_operator_has_requested_is_logged_at_every_level() -> None:
    stream = set_up("fatal")
    Log("t").always("process.bugs", "no bugs")
    assert " INFO  t no bugs" in stream.getvalue()


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_a_peer_sent_forges_no_line_and_moves_no_cursor(style: str) -> None:
    stream = set_up(style=style)
    Log("t").info("a.line", "it said %(said)s", said=f"\r\n{ESCAPE}\u2028\x9b\udc80«é»")
    (line,) = stream.getvalue().removesuffix("\n").split("\n")
    assert line.isprintable()
    if style == "text":
        assert line.endswith(r"it said \r\n\x1b[31m\u2028\x9b\udc80«é»")


def test_a_traceback_follows_its_line_escaped_as_well() -> None:
    stream = set_up()
    crash(f"a {ESCAPE}")
    first, *rest = lines_of(stream)
    assert first.endswith("ERROR server:1 a loop crashed")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == r"ValueError: a \x1b[31m"


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_text_of_any_length_makes_a_line_of_some_thousand_characters(style: str) -> None:
    stream = set_up(style=style)
    Log("t").info("a.line", "it said %(said)s", said=100_000 * "x", others=["y" * 100_000])
    assert 4_000 < len(stream.getvalue()) < 10_000
    assert "x…" in stream.getvalue().encode().decode("unicode_escape" if style == "json" else "utf-8")


@pytest.mark.parametrize("style", ["text", "json"])
def test_the_end_of_a_traceback_is_kept(style: str) -> None:
    stream = set_up(style=style)
    crash(100_000 * "x" + " the end")
    assert len(stream.getvalue()) < 30_000
    assert "x the end" in stream.getvalue()


def test_for_journald_every_line_of_a_traceback_has_the_priority(for_journald: Any) -> None:
    read = for_journald()
    crash("bad")
    lines = read()
    assert len(lines) > 3
    assert all(line.startswith("<3>") for line in lines)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that limits see."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def shown(records: list[Any]) -> list[tuple[str, object]]:
    return [(each.event, each.fields.get("n", each.fields.get("lines"))) for each in records]


def test_a_limit_suppresses_lines_of_one_event_and_key_and_says_how_many(clock: list[float]) -> None:
    one = Log("t")
    with recorded() as records:
        for n in range(5):
            one.warning("a.line", "%(n)d", Limit("x", 1.0, 2), n=n)
        one.warning("a.line", "%(n)d", Limit("y", 1.0, 2), n=10)
        one.warning("b.line", "%(n)d", Limit("x", 1.0, 2), n=20)
        assert shown(records) == [("a.line", 0), ("a.line", 1), ("a.line", 10), ("b.line", 20)]
        records.clear()
        clock[0] += 1.0
        one.warning("a.line", "%(n)d", Limit("x", 1.0, 2), n=5)
        assert shown(records) == [("log.suppressed", 3), ("a.line", 5)]
        assert records[0].levelno == logging.WARNING
        assert records[0].msg == "suppressed 3 more lines about: a.line: x"


def test_the_report_counts_what_no_later_line_would(clock: list[float]) -> None:
    one = Log("t")
    with recorded() as records:
        for n in range(3):
            one.error("a.line", "%(n)d", Limit(burst=1), n=n)
        one.report_suppressed()
        one.report_suppressed()
        assert shown(records) == [("a.line", 0), ("log.suppressed", 2)]
        one.error("a.line", "%(n)d", Limit(burst=1), n=3)
        clock[0] += 1.0
        one.report_suppressed()
        assert shown(records)[2:] == [("log.suppressed", 1)]
        assert not one._bursts, "what has ended is forgotten"


def test_the_sessions_of_a_tunnel_share_its_limits(clock: list[float]) -> None:
    assert clock
    one = Log("t")
    with recorded() as records:
        for n in range(3):
            one.session(str(n)).info("a.line", "%(n)d", Limit(burst=1), n=n)
        one.report_suppressed()
    assert shown(records) == [("a.line", 0), ("log.suppressed", 2)]
    assert [each.session for each in records] == ["0", ""]


def test_a_level_that_is_not_logged_uses_up_no_limit() -> None:
    one = Log("t")
    with recorded(logging.ERROR) as records:
        one.warning("a.line", "-", Limit(burst=1))
        one.log(logging.ERROR, "a.line", "-", Limit(burst=1))
    assert shown(records) == [("a.line", None)]


def test_the_levels_are_those_of_urls() -> None:
    assert tuple(log.LEVELS) == LOG_LEVELS


# Every call in the package

METHODS = {"debug", "info", "warning", "error", "log", "always"}
PARAMETERS = {"limit", "crash"}


class LogCall:
    """A call of the log: where it is, its event, the texts that its sentence may consist of, and its fields."""

    def __init__(self, call: ast.Call, function: ast.AST, where: str) -> None:
        self.where = where
        event, sentence = call.args[call.func.attr == "log" :][:2]  # type: ignore[attr-defined]
        self.events = _texts(event, function)
        self.sentence = "".join(_texts(sentence, function))
        self.fields = {each.arg for each in call.keywords if each.arg} - PARAMETERS
        self.has_more_fields = any(each.arg is None for each in call.keywords)


def _texts(node: ast.expr, function: ast.AST) -> list[str]:
    """The constants in an expression; of a name, in what the function has assigned to it last."""
    if isinstance(node, ast.Name):
        assigned = [
            each
            for each in ast.walk(function)
            if isinstance(each, ast.Assign) and each.lineno < node.lineno and node.id in _names(each.targets)
        ]
        node = max(assigned, key=lambda each: each.lineno).value if assigned else node
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def _names(targets: list[ast.expr]) -> set[str]:
    return {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}


def log_calls() -> Iterator[LogCall]:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "log.py":
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for call in ast.walk(function):
                    if (
                        isinstance(call, ast.Call)
                        and isinstance(call.func, ast.Attribute)
                        and call.func.attr in METHODS
                        and ast.unparse(call.func.value).lower().endswith(("log", "log(tunnel)"))
                    ):
                        yield LogCall(call, function, f"{path.relative_to(PACKAGE)}:{call.lineno}")


def complaints(call: LogCall) -> list[str]:
    """What is wrong with a call of the log."""
    named = set(re.findall(r"%\((\w+)\)", call.sentence.replace("%%", "")))
    found = [
        (not (call.events or call.has_more_fields), "no constant name: its function must be given it"),
        (not all(re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", event) for event in call.events), f"names: {call.events}"),
        (bool(call.fields & set(log.RESERVED)), f"reserved fields: {call.fields}"),
        (not (call.has_more_fields or named <= call.fields), f"not given: {named - call.fields}"),
        ("%s" in call.sentence, "%s"),
    ]
    return [f"{call.where}: {what}" for wrong, what in found if wrong]


def test_each_call_has_an_event_and_the_fields_of_its_sentence() -> None:
    calls = list(log_calls())
    assert len(calls) > 50
    assert not [each for call in calls for each in complaints(call)]
