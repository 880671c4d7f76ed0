"""docs/logging.md lists every event that the package can log, with its levels and fields, and no other."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from tests.support.log import DOCUMENT, OWN, documented
from tests.unit.log_calls import Package, events_of_the_program


def test_every_event_of_the_code_is_in_the_document_and_no_other() -> None:
    assert len(events_of_the_program()) > 50
    assert sorted(documented()) == sorted(events_of_the_program())


def test_the_document_has_the_fields_of_each_event() -> None:
    fields = {name: set(event.fields) for name, event in documented().items()}
    assert fields == {name: found.fields for name, found in events_of_the_program().items()}


def test_the_document_has_the_levels_of_each_event() -> None:
    for name, event in documented().items():
        levels = events_of_the_program()[name].levels
        if "" in levels:  # chosen when it runs
            assert event.levels >= levels - {""}, name
        else:
            assert event.levels == levels, name


def test_no_field_hides_what_every_line_has() -> None:
    assert not [name for name, found in events_of_the_program().items() if found.fields & set(OWN)]


def test_each_event_stands_once_in_the_document() -> None:
    names = re.findall(r"^\| `([a-z]+\.[a-z_]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert sorted(names) == sorted(set(names))


def test_a_call_is_read_with_what_its_function_was_given(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        textwrap.dedent(
            """
            class Part:
                def run(self):
                    self._log.warning("part.failed", "%(error)s", Limit(), error=1, **self.traffic())
                    self._count("kind", "part.malformed", "words", line=2)
                    drop(self._log, "why", size=3)
                    self._log.info("part.started" if self.new else "part.resumed", "words")

                def traffic(self):
                    return {"up": 1, "down": 2}

                def _count(self, kind, event, words, **fields):
                    self._log.error(event, words, crash=kind, **fields)

            def drop(log, why, **fields):
                log.debug("part.dropped", "words", reason=why, **fields)

            Log("x").log(level, "part.imported", "words", missing=1)
            """
        )
    )
    found = Package(tmp_path).events()
    assert {name: (each.levels, each.fields) for name, each in found.items()} == {
        "part.failed": ({"warn"}, {"error", "up", "down"}),
        "part.malformed": ({"error"}, {"line"}),
        "part.dropped": ({"debug"}, {"reason", "size"}),
        "part.started": ({"info"}, set()),
        "part.resumed": ({"info"}, set()),
        "part.imported": ({""}, {"missing"}),
    }
