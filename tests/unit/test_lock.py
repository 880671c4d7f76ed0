"""The locked dependencies of releases: complete, hashed, and within the ranges of requirements.txt."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.table import each_row

LOCKS = Path(__file__).resolve().parents[2] / "contrib" / "lock"
EXTRAS = {"base": set[str](), "metrics": {"metrics"}, "top": {"metrics", "top"}}


def read(name: str) -> list[tuple[Requirement, list[str]]]:
    """The requirements of a lock, and the hashes of each."""
    lines = (LOCKS / f"{name}.txt").read_text().replace("\\\n", " ").splitlines()
    return [
        (Requirement(line.partition(" --hash")[0].strip()), re.findall(r"--hash=sha256:(\w+)", line)) for line in lines
    ]


@each_row("name", [*EXTRAS, "build", "dist"])
def test_every_release_is_exact_and_has_its_hashes(name: str) -> None:
    for requirement, hashes in read(name):
        (exact,) = requirement.specifier
        assert exact.operator == "=="
        assert not requirement.url
        assert hashes
        assert all(len(each) == 64 for each in hashes)


@pytest.mark.parametrize("name", EXTRAS)
def test_every_requirement_is_locked_within_its_range(name: str) -> None:
    locked = [
        (canonicalize_name(requirement.name), next(iter(requirement.specifier)).version)
        for requirement, _ in read(name)
        if not requirement.marker or requirement.marker.evaluate()
    ]
    wanted = [
        requirement
        for requirement in map(Requirement, metadata.requires("nodepass") or [])
        if not requirement.marker or any(requirement.marker.evaluate({"extra": each}) for each in ("", *EXTRAS[name]))
    ]
    assert {canonicalize_name(each.name) for each in wanted} <= {each for each, _ in locked}
    for requirement in wanted:
        (version,) = (version for each, version in locked if each == canonicalize_name(requirement.name))
        assert version in requirement.specifier, requirement
