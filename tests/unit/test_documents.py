"""The documents agree with the repository: their links lead somewhere, and the files that CONTRIBUTING names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.table import each_row

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("contrib/**/*.md"), *ROOT.glob("bench*/*.md")]
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """The fragments of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_row("path", DOCUMENTS)
def test_every_link_of_a_document_leads_to_a_file_and_a_heading(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not link.startswith("https://"):
            file, _, fragment = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize(("path", "least"), [("CONTRIBUTING.md", 13), ("docs/security.md", 20)])
def test_a_document_that_answers_with_modules_names_those_that_exist(path: str, least: int) -> None:
    files = re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / path).read_text())
    assert len(files) >= least
    assert not [file for file in files if not (ROOT / "nodepass" / file).exists()]
