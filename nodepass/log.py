"""The log: one event per line on stderr, as text for people or as JSON for programs (`LOG_FORMAT`).

An event has a stable name (`client.connected`), fields, and a sentence made of them; docs/logging.md lists all. As text
a line is `time LEVEL tunnel [session] sentence`, for journald `<priority>tunnel [session] sentence`, because journald
keeps the time itself; as JSON it is an object with the keys of RESERVED and the fields. A `Log` is what the rest of the
program writes to; it leaves out lines of a frequent event and counts them. The levels, handlers and files are those of
`logging`; only its call syntax is not used.

Secrets never reach this module. Every text is escaped and has a greatest length here, whatever it is made of: a peer's
bytes, the names in a certificate, OpenSSL's words. Modules that show such text cut it to what is worth reading before.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TextIO


class _Level(NamedTuple):
    name: str
    priority: int  # syslog's, which journald reads
    colour: int  # SGR code


_LEVELS = {
    logging.DEBUG: _Level("debug", 7, 2),
    logging.INFO: _Level("info", 6, 32),
    logging.WARNING: _Level("warn", 4, 33),
    logging.ERROR: _Level("error", 3, 31),
    logging.CRITICAL: _Level("fatal", 2, 35),
}
LEVELS = {level.name: number for number, level in _LEVELS.items()}
LONGEST_FIELD = 2_000  # characters of a text
LONGEST_SENTENCE = 4_000  # characters; a line of statistics has 1,500
LONGEST_TRACEBACK = 20_000  # characters, of which the last are the ones to keep
RESERVED = ("time", "level", "tunnel", "session", "event", "message", "traceback")  # keys of JSON that no field has

_root = logging.getLogger("nodepass")


@dataclass(frozen=True)
class Limit:
    """At most `burst` lines of an event within so many seconds; lines with another `key` are counted separately."""

    key: object = ""
    seconds: float = 1.0
    burst: int = 10


class _Burst:
    """The lines of one limited event and key, from its first one on."""

    __slots__ = ("ends", "level", "lines", "suppressed")

    def __init__(self, level: int, ends: float) -> None:
        self.level = level
        self.ends = ends  # time.monotonic()
        self.lines = self.suppressed = 0


def literal(text: str) -> str:
    """A sentence that consists of this text, whatever its fields are."""
    return text.replace("%", "%%")


class Log:
    """The log of one tunnel, or of one of its sessions.

    Each method takes an event's name, its sentence with `%(field)s` in it, and the fields. A `limit` suppresses lines,
    which `report_suppressed` counts; a `crash` is logged with its traceback.
    """

    def __init__(self, tunnel: str) -> None:
        self.tunnel = tunnel
        self._session = ""
        self._server = ""
        self._bursts: dict[tuple[str, object], _Burst] = {}

    def session(self, id: str) -> Log:
        """The log of one session of this tunnel; limits count the lines of all sessions together."""
        log = Log(self.tunnel)
        log._session, log._server, log._bursts = id, self._server, self._bursts
        return log

    def server(self, name: str) -> Log:
        """The log of one of a client's several servers: its lines say which, and have limits of their own."""
        log = Log(self.tunnel)
        log._server = name
        return log

    def debug(self, event: str, sentence: str, /, **fields: object) -> None:
        if _root.isEnabledFor(logging.DEBUG):  # a session calls this many times
            self._write(logging.DEBUG, event, sentence, fields)

    def info(self, event: str, sentence: str, /, limit: Limit | None = None, **fields: object) -> None:
        self.log(logging.INFO, event, sentence, limit, None, **fields)

    def warning(self, event: str, sentence: str, /, limit: Limit | None = None, **fields: object) -> None:
        self.log(logging.WARNING, event, sentence, limit, None, **fields)

    def error(
        self,
        event: str,
        sentence: str,
        /,
        limit: Limit | None = None,
        crash: BaseException | None = None,
        **fields: object,
    ) -> None:
        self.log(logging.ERROR, event, sentence, limit, crash, **fields)

    def log(
        self,
        level: int,
        event: str,
        sentence: str,
        /,
        limit: Limit | None = None,
        crash: BaseException | None = None,
        **fields: object,
    ) -> None:
        """Log at one of the levels of `logging`."""
        if _root.isEnabledFor(level) and (limit is None or self._admits(level, event, limit)):
            self._write(level, event, sentence, fields, crash)

    def always(self, event: str, sentence: str, /, **fields: object) -> None:
        """Log what an operator has requested, whatever the level."""
        self._write(logging.INFO, event, sentence, fields)

    def report_suppressed(self) -> None:
        """Log how many lines were suppressed since the last report, so that none is lost silently."""
        now = time.monotonic()
        for (event, key), burst in list(self._bursts.items()):
            self._report(event, key, burst)
            if now >= burst.ends:
                del self._bursts[event, key]

    def _report(self, event: str, key: object, burst: _Burst) -> None:
        lines, burst.suppressed = burst.suppressed, 0
        if lines:
            about = f"{event}: {key}" if key else event
            words = "suppressed %(lines)d more lines about: %(about)s"
            self.log(burst.level, "log.suppressed", words, lines=lines, suppressed=event, about=about)

    def _admits(self, level: int, event: str, limit: Limit) -> bool:
        """Whether the limit allows one more line; if not, it is counted."""
        now, key = time.monotonic(), (event, limit.key)
        burst = self._bursts.get(key)
        if burst is None or now >= burst.ends:
            if burst:
                self._report(event, limit.key, burst)
            burst = self._bursts[key] = _Burst(level, now + limit.seconds)
        if burst.lines >= limit.burst:
            burst.suppressed += 1
            return False
        burst.lines += 1
        return True

    def _write(
        self, level: int, event: str, sentence: str, fields: Mapping[str, object], crash: BaseException | None = None
    ) -> None:
        trace = (type(crash), crash, crash.__traceback__) if crash else None
        if self._server:
            fields = {"server": self._server, **fields}
        about = self._session or self._server
        extra = {"tunnel": self.tunnel, "session": self._session, "about": about, "event": event, "fields": fields}
        text = _cut(sentence % fields, LONGEST_SENTENCE)
        _root.handle(_root.makeRecord(_root.name, level, "", 0, text, (), trace, extra=extra))


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, tunnel, session or server, sentence; the level is coloured on a terminal."""

    default_msec_format = "%s.%03d"

    def __init__(self, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        name, _, colour = _LEVELS[record.levelno]
        level = f"{name.upper():<5}"
        if self._colours:
            level = f"\x1b[{colour}m{level}\x1b[0m"
        return f"{self.formatTime(record)} {level} {self._text(record)}"

    def _text(self, record: Any) -> str:
        """What follows the level; only a traceback has more than one line."""
        about = f" [{record.about}]" if record.about else ""
        lines = [f"{record.tunnel}{about} {_printable(record.msg)}"]
        if record.exc_info:
            lines += map(_printable, _traceback(self, record).split("\n"))
        return "\n".join(lines)


class JournalFormatter(TextFormatter):
    """Lines for journald: a priority in front of each, no time and no level."""

    def format(self, record: logging.LogRecord) -> str:
        return _with_priority(record, self._text(record))


class JSONFormatter(logging.Formatter):
    """One object per line; for journald with a priority in front, which it removes."""

    def __init__(self, for_journald: bool = False) -> None:
        super().__init__()
        import datetime
        import json

        self._for_journald = for_journald
        self._encode = json.JSONEncoder().encode
        self._from_timestamp = datetime.datetime.fromtimestamp
        self._utc = datetime.timezone.utc

    def format(self, record: Any) -> str:
        shown = {
            "time": self._from_timestamp(record.created, self._utc).isoformat(timespec="milliseconds"),
            "level": _LEVELS[record.levelno].name,
            "tunnel": record.tunnel,
            **({"session": record.session} if record.session else {}),
            "event": record.event,
            "message": record.msg,
            **{name: _plain(value) for name, value in record.fields.items()},
            **({"traceback": _traceback(self, record)} if record.exc_info else {}),
        }
        line = self._encode(shown)
        return _with_priority(record, line) if self._for_journald else line


def _plain(value: Any) -> Any:
    """A field as JSON has it; what JSON has no type for is its text, such as an address, a named tuple."""
    if value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if type(value) in (list, tuple) else _cut(str(value), LONGEST_FIELD)


def _traceback(formatter: logging.Formatter, record: Any) -> str:
    trace = formatter.formatException(record.exc_info)
    return trace if len(trace) <= LONGEST_TRACEBACK else f"…{trace[-LONGEST_TRACEBACK:]}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _with_priority(record: logging.LogRecord, text: str) -> str:
    priority = f"<{_LEVELS[record.levelno].priority}>"
    return "\n".join(priority + line for line in text.split("\n"))


def _printable(text: str) -> str:
    """The text with its control characters escaped: bytes of a peer can neither forge a line nor move a cursor."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def journald_reads(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether JOURNAL_STREAM names this very stream by its device and inode, as systemd.exec(5) describes it."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str, environ: Mapping[str, str], stream: TextIO | None = None, style: str = "text") -> None:
    """Send the log to `stream` (stderr) as "text" or "json", in the form for what reads it."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    for_journald = journald_reads(stream, environ)
    if style == "json":
        handler.setFormatter(JSONFormatter(for_journald))
    elif for_journald:
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(TextFormatter(stream.isatty() and "NO_COLOR" not in environ))
    _root.handlers = [handler]
    _root.propagate = False
    _root.setLevel(LEVELS[level])
