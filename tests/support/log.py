"""The log of a run as events. Tests match an event's name and its fields, never its sentence.

With LOG_FORMAT=json, which runs have by default, each line is an object. What else a process writes to stderr, such as
the line about a bad setting or an interpreter's traceback, becomes an `Entry` that is no event.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

PRIORITY = re.compile(r"^<\d>")
"""What journald reads off the beginning of a line."""

OWN = ("time", "level", "tunnel", "session", "event", "message", "traceback")
"""Keys of a line that are no fields of its event."""


OF_SEVERAL = "server"
"""A field of every line about one of a client's several servers."""

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "logging.md"
"""Lists all events; a unit test compares it with the code."""


@dataclass(frozen=True)
class Documented:
    """What the document says of an event."""

    levels: frozenset[str]
    fields: frozenset[str]


@functools.cache
def documented() -> dict[str, Documented]:
    """Every event of the document by its name."""
    rows = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| ([a-z, ]+) \|([^|]*)\|", DOCUMENT.read_text(), re.MULTILINE)
    return {
        name: Documented(frozenset(levels.split(", ")), frozenset(re.findall(r"`(\w+)`", fields)))
        for name, levels, fields in rows
    }


def check_wanted(event: str, wanted: Collection[str]) -> None:
    """That there is such an event with such fields: one that is misspelt would never be found."""
    known = documented()
    assert not event or event in known, f"no event has this name: {event}"
    fields = known[event].fields if event else frozenset().union(*(each.fields for each in known.values()))
    unknown = set(wanted) - fields - (set(OWN) - {"message"}) - {OF_SEVERAL}
    assert not unknown, f"{event or 'no event'} has no field {', '.join(sorted(unknown))}"


def one_of(*values: object) -> Callable[[object], bool]:
    """A predicate for a field: `find("client.rejected", reason=one_of("key_required", "key_mismatch"))`."""
    return lambda value: value in values


loud = one_of("warn", "error", "fatal")
"""For the level: `find(level=loud)`."""


@dataclass(frozen=True, repr=False)
class Entry:
    """One line: an event with `data`, or text that is no event. `entry["client"]` is a field."""

    line: str
    data: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.data[name]

    @property
    def event(self) -> str:
        """The event's name, empty where the line is no event."""
        return str(self.data.get("event", ""))

    @property
    def moment(self) -> float:
        """When the program logged it, in seconds since the epoch."""
        return datetime.fromisoformat(self["time"]).timestamp()

    @property
    def fields(self) -> dict[str, Any]:
        """What the event says beside its sentence."""
        return {name: value for name, value in self.data.items() if name not in OWN}

    @property
    def is_crash(self) -> bool:
        """Whether it shows a traceback, logged or printed by the interpreter."""
        return "traceback" in self.data or (not self.data and "Traceback" in self.line)

    def matches(self, event: str, wanted: Mapping[str, Any]) -> bool:
        """Whether it is this event (any, where that is empty) and each field is as wanted.

        A field is wanted as a value, as a compiled pattern to be found in it, or as a predicate.
        """
        if not self.data or (event and self.event != event):
            return False
        return all(name in self.data and _fits(self.data[name], each) for name, each in wanted.items())

    def text(self) -> str:
        """The line as LOG_FORMAT=text has it."""
        if not self.data:
            return self.line
        session = f" [{self['session']}]" if "session" in self.data else ""
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in self["message"])
        text = f"{self['time'][11:23]} {self['level'].upper():<5} {self['tunnel']}{session} {message}"
        return f"{text}\n{self['traceback']}" if "traceback" in self.data else text

    def __repr__(self) -> str:
        return f"<{self.event or 'no event'}: {self.text()}>"

    def __str__(self) -> str:
        """What a failed test shows: the line as text, then its event and fields."""
        return f"{self.text()}  # {self.event} {self.fields}" if self.data else self.line


def parse(line: str) -> Entry:
    """What a line says."""
    text = PRIORITY.sub("", line)
    if text.startswith("{"):
        try:
            data = json.loads(text)
        except ValueError:
            return Entry(line, {})
        if "event" in data:
            return Entry(line, data)
    return Entry(line, {})


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, re.Pattern):
        return bool(wanted.search(str(value)))
    return bool(wanted(value)) if callable(wanted) else bool(value == wanted)
