"""Wheels without a network: of this project, built from the checkout, and of what it needs, from what is installed.

A distribution that pip has installed from a wheel is that wheel unpacked, and its RECORD says what belongs to it; so it
can be packed again.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.process import REPOSITORY

SOURCES = (
    "setup.py",
    "pyproject.toml",
    "requirements.txt",
    "MANIFEST.in",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "nodepass",
    "docs",
    "contrib",
)


def build_wheel(folder: Path, workspace: Path, sources: Sequence[str] = SOURCES) -> Path:
    """The wheel of this project, built in a copy so that the checkout stays as it is."""
    for name in sources:
        source, copy = REPOSITORY / name, workspace / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder))
    subprocess.run([*pip, *options, str(workspace)], check=True, capture_output=True)
    (wheel,) = folder.glob("nodepass-*.whl")
    return wheel


def pack_needed(folder: Path) -> None:
    """Wheels of everything that this project needs to run."""
    for distribution in _needed("nodepass", set()):
        _pack(distribution, folder)


def _needed(name: str, seen: set[str]) -> Iterator[metadata.Distribution]:
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        yield metadata.distribution(requirement.name)
        yield from _needed(requirement.name, seen)


def _pack(distribution: metadata.Distribution, folder: Path) -> None:
    tags = re.findall(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    python, abi, platforms = tags[0].split("-")
    if len(tags) > 1:  # one file name for all of them
        python, abi, platforms = (
            ".".join(sorted(set(parts))) for parts in zip(*(tag.split("-") for tag in tags), strict=True)
        )
    name = re.sub(r"[-_.]+", "_", distribution.metadata["Name"])
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-{python}-{abi}-{platforms}.whl", "w") as wheel:
        for file in distribution.files or []:
            # Scripts are made at installation, byte code is, and pip's own notes are of no use elsewhere.
            if (
                ".." in file.parts
                or file.suffix == ".pyc"
                or file.name in ("INSTALLER", "REQUESTED", "direct_url.json")
            ):
                continue
            wheel.write(str(file.locate()), str(file))
