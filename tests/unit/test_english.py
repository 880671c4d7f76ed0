"""Documents, comments and messages are plain technical English: some phrases are refused, with what to write instead.

Documents are read without their inline code, Python files by their docstrings, comments and other texts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 120  # columns of prose


class Phrase(NamedTuple):
    """A pattern, what to write instead, and an example that the pattern refuses. Case counts."""

    pattern: str
    instead: str
    example: str


PHRASES = (
    Phrase("[«»]", 'quotation marks ("…"), *emphasis* or `code`', "the loop «report»"),
    Phrase(r"\b[Cc](?:ome|omes|ame|oming) to nothing\b", "fails", "a connection came to nothing"),
    Phrase(r"\b[Hh]ear(?:s|d|ing)? of\b", "notices, receives", "the server hears of it"),
    Phrase(r"\b(?:[Tt]ell|[Tt]ells|[Tt]old|[Tt]elling) of\b", "reports", "it is told of nowhere"),
    Phrase(r"\b[Aa]new\b", "again, re-", "the tunnel is made anew"),
    Phrase(r"\b[Ff]or ever\b", "forever, without limit", "it waits for ever"),
    Phrase(r"\b[Bb]e it\b", "whether it is", "be it its own bytes or its turn"),
    Phrase(r"\b(?:is|are|was|were) to (?:be|have)\b", "must, will, or the plain present", "the key is to be kept"),
    Phrase(r"\b(?:[Nn]o|[Ss]ome|[Aa]ny|[Ee]very)body\b", "the peer, process or user that is meant", "nobody listens"),
    Phrase(r"\b[Ww]ho(?:m)?ever\b", "the peer, process or user that is meant", "whoever connects meanwhile"),
    Phrase(r"(?:\bWho|[:;(] who)\b(?![^.;|]*\?)", "the peer or user that is meant", "Who is silent keeps its place."),
    Phrase(
        r"\b[Ww]hatever (?:is|are|was|were|has|had|comes|came|stands|needs|wants|says|parses|renews)\b",
        "everything that",
        "whatever renews it",
    ),
    Phrase(r"\b[Nn]ewcomers?\b", "pending connection, new connection", "a newcomer waits"),
    Phrase(r"\b[Ll]obb(?:y|ies)\b", "pending connections", "it leaves the lobby"),
    Phrase(r"\b[Ss]trangers?\b", "unauthenticated peer, other host", "a stranger as client"),
    Phrase(r"\b[Tt]urn(?:s|ed|ing)? (?:\w+ ){0,2}away\b", "rejects", "client turned away"),
    Phrase(r"\b(?:[Tt]hought|[Tt]hinks?|[Tt]hinking) (?:\w+ ){0,3}over\b", "re-evaluates", "the size is thought over"),
    Phrase(r"\b[Mm]ade out to\b", "the name in the certificate", "it is made out to example.com"),
    Phrase(r"\b[Mm]ean(?:s|t)? (?:ill|well)\b", "is malicious, is legitimate", "a peer that means ill"),
    Phrase(r"\b[Ss]igns? of life\b", "response; not responding", "no sign of life"),
    Phrase(r"\b(?:is|are) (?:not )?well\b(?!-)", "is (un)healthy", "this tunnel is not well"),
    Phrase(r"\bthat (?:is|are) none\b", "invalid, that is not one", "a line that is none"),
    Phrase(r"\b[Ss]ettl(?:e|es|ed) for less\b", "refuses", "it never settles for less"),
    Phrase(
        r"\b[Aa]n? (?:line|object|warning|second) an? (?:line|finding|row|day|session|second)\b",
        "one … per …",
        "an object a line",
    ),
    Phrase(r"\bdeaf\b", "stops accepting", "it makes the endpoint deaf"),
    Phrase(r"\b[Aa]il(?:ment|s)\b", "unhealthy", "what ails it"),
    Phrase(r"\b(?:[Gg]ates?|[Dd]oors?|[Ee]ntrances?)\b", "listener", "the server's gate"),
    Phrase(r"\b[Cc]rews?\b", "task group", "a crew of greenlets"),
    Phrase(r"\b[Ff]illers?\b", "data listener, data dialer", "the pool's filler"),
    Phrase(r"\bbios\b", "memory BIOs, the module tls/bio", "as bios says"),
    Phrase(r"\b[Aa]ttachments?\b", "connection", "a client's attachment"),
)
INNOCENT = (
    "The first step is to open the port.",
    "Who sends heartbeats? Which module?",
    "| Who sends heartbeats and gives up? | `tunnel/control.py` |",
    "A client that authenticates, whatever it sends, is heard from.",
    "The tunnel is well-behaved, well known, and not well-formed.",
    "OpenSSL's memory BIOs; the gateway; outdoors; one line per finding.",
)

DOCUMENTS = sorted(
    each
    for pattern in ("*.md", "docs/*.md", "docs/nodepass.1", "contrib/**/README.md", "benchmarks/README.md")
    for each in ROOT.glob(pattern)
)
TEXTS = sorted(
    each
    for pattern in ("systemd/*@.*", "systemd/*.env", "docker/*", "prometheus/*.yml", "grafana/*.json")
    for each in (ROOT / "contrib").glob(pattern)
)
PROGRAMS = sorted(
    [*(ROOT / "nodepass").rglob("*.py"), ROOT / "contrib/demo/demo.py", ROOT / "contrib/systemd/nodepass-manager"]
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each paragraph, row or item of a document, without its inline code."""
    begin, lines = 1, list[str]()
    for number, line in enumerate([*path.read_text().splitlines(), ""], 1):
        starts = not line.strip() or re.match(r"\s*(?:[|#*.-]|\d+\.)", line)
        if starts and lines:
            yield begin, re.sub(r"`[^`]*`", "`", " ".join(lines))
            lines = []
        if line.strip():
            begin, lines = (begin if lines else number), [*lines, line.strip().lstrip("# ")]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the text of each string and each comment of a Python file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())
    last, begin, lines = 0, 0, list[str]()
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.search(r"(?:^|\s)#(.*)", line)  # also within a string: a tokenizer takes ten times as long
        if comment is None:
            continue
        if number != last + 1 and lines:
            yield begin, " ".join(lines)
            lines = []
        begin, last = (begin if lines else number), number
        lines.append(comment[1].strip("#: "))
    yield begin, " ".join(lines)


def findings(texts: Iterable[tuple[int, str]]) -> list[str]:
    """What is refused in these texts; first it is looked which phrases are in any of them at all."""
    texts = list(texts)
    whole = ".\0".join(text for _, text in texts)  # a phrase ends at a full stop
    found = [phrase for phrase in PHRASES if re.search(phrase.pattern, whole)]
    return [
        f"line {line}: …{text[max(0, each.start() - 30) : each.end() + 30]}…: write: {phrase.instead}"
        for line, text in texts
        for phrase in found
        for each in re.finditer(phrase.pattern, text)
    ]


def test_every_refused_phrase_is_found_in_its_example() -> None:
    assert [phrase for phrase in PHRASES if not re.search(phrase.pattern, phrase.example)] == []


def test_good_prose_is_not_refused() -> None:
    assert findings((1, text) for text in INNOCENT) == []


def test_a_document_has_no_refused_phrase() -> None:
    assert [(name(path), found) for path in [*DOCUMENTS, *TEXTS] for found in findings(paragraphs(path))] == []


def test_a_program_has_no_refused_phrase() -> None:
    assert [(name(path), found) for path in PROGRAMS for found in findings(texts_of(path))] == []


def test_the_prose_of_a_document_is_wrapped() -> None:
    wide, fenced = [], False
    for path in (path for path in DOCUMENTS if path.suffix == ".md"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fenced ^= line.startswith("```")
            if len(line) > WIDTH and not fenced and not line.startswith(("|", "    ", "![")):
                wide.append((name(path), number))
        assert not fenced, name(path)
    assert not wide
