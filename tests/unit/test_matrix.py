"""Which Pythons and which versions of the dependencies `make matrix` takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.matrix import interpreters
from tests.matrix.__main__ import SUITES
from tests.matrix.dependencies import lines_for
from tests.matrix.interpreters import Interpreter, Unusable, find
from tests.support.process import REPOSITORY

THIS = f"{sys.version_info.major}.{sys.version_info.minor}"
REQUIREMENTS = [
    "gevent<27,>=24.2.1",
    'gevent>=24.10.1; python_version >= "3.13"',
    "service_identity>=24.1",
    'rich>=13.7; extra == "top"',
    'pytest>=8; extra == "test"',
    'PyYAML>=6.0.1; python_version >= "3.12" and extra == "test"',
]


@pytest.mark.parametrize(
    ("python", "lines"),
    [
        ("3.10", ["gevent==24.2.1", "service-identity==24.1", "pytest==8"]),
        ("3.12", ["gevent==24.2.1", "service-identity==24.1", "pytest==8", "pyyaml==6.0.1"]),
        ("3.13", ["gevent==24.10.1", "service-identity==24.1", "pytest==8", "pyyaml==6.0.1"]),
    ],
)
def test_the_lowest_versions_are_the_lower_bounds_for_that_python(python: str, lines: list[str]) -> None:
    assert lines_for(REQUIREMENTS, python, "lowest") == lines


def test_the_highest_versions_are_left_to_pip_within_the_ranges() -> None:
    assert lines_for(REQUIREMENTS, "3.10", "highest") == ["gevent<27,>=24.2.1", "service_identity>=24.1", "pytest>=8"]


def test_a_requirement_without_a_lower_bound_is_an_error() -> None:
    with pytest.raises(ValueError, match="no lower bound: gevent"):
        lines_for(["gevent<27"], "3.10", "lowest")


def test_the_suites_are_there() -> None:
    for paths in SUITES.values():
        assert all((REPOSITORY / path).exists() for path in paths)


def make_python(folder: Path, version: str, output: str, status: int = 0) -> None:
    """A program in the place of an interpreter, which prints this when it is probed."""
    folder.mkdir(parents=True)
    program = folder / f"python{version}"
    program.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n")
    program.chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose sub-folders a, b and c are the PATH."""
    monkeypatch.setenv("PATH", ":".join(str(tmp_path / name) for name in "abc"))
    return tmp_path


def test_the_latest_patch_release_is_taken_and_what_does_not_run_is_passed_over(path: Path) -> None:
    make_python(path / "a", "3.12", '["/a/python", [3, 12, 1], []]')
    make_python(path / "b", "3.12", "pyenv: python3.12: command not found", 127)
    make_python(path / "c", "3.12", '["/c/python", [3, 12, 10], []]')
    assert find("3.12") == Interpreter((3, 12, 10), "/c/python")


def test_a_python_that_cannot_be_used_is_named_with_the_reason(path: Path) -> None:
    make_python(path / "a", "3.12", '["/a/python", [3, 12, 1], ["ensurepip"]]')
    make_python(path / "b", "3.12", '["/b/python", [3, 11, 1], []]')
    with pytest.raises(Unusable, match=r"/a/python3\.12 has no ensurepip; .*/b/python3\.12 is another version"):
        find("3.12")


def test_a_python_that_is_not_there_is_said_to_be_missing(path: Path) -> None:
    assert path
    with pytest.raises(Unusable, match=r"no python3\.12 on PATH"):
        find("3.12")


def test_pyenvs_versions_are_found(path: Path) -> None:
    make_python(path / "versions" / "3.12.2" / "bin", "3.12", '["/pyenv/python", [3, 12, 2], []]')
    make_python(path / "a", "", "")
    (path / "a" / "python").rename(path / "a" / "pyenv")
    (path / "a" / "pyenv").write_text(f"#!/bin/sh\necho {path}\n")
    assert find("3.12") == Interpreter((3, 12, 2), "/pyenv/python")


def test_this_python_is_probed_as_what_it_is() -> None:
    found = interpreters.probe(Path(sys.executable), THIS)
    assert found.release == sys.version_info[:3]
