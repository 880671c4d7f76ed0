"""Which Pythons are installed: on PATH, and where pyenv keeps its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PROBE = """
import importlib.util, json, sys, sysconfig
lacks = [name for name in ("venv", "ensurepip") if not importlib.util.find_spec(name)]
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    lacks.append("global interpreter lock")
print(json.dumps([sys.executable, sys.version_info[:3], lacks]))
"""
PROBE_TIMEOUT = 20  # seconds


@dataclass(frozen=True, order=True)
class Interpreter:
    """A Python that can make virtual environments."""

    release: tuple[int, int, int]
    path: str

    @property
    def text(self) -> str:
        """Its version in full."""
        return ".".join(map(str, self.release))


class Unusable(Exception):
    """There is no such Python here, or it cannot be used; the text says why."""


def find(version: str) -> Interpreter:
    """The latest patch release of a version, such as 3.12, that is installed. Raises Unusable."""
    found, reasons = [], []
    for path in _candidates(version):
        try:
            found.append(probe(path, version))
        except Unusable as error:
            reasons.append(str(error))
    if not found:
        raise Unusable("; ".join(reasons) or f"no python{version} on PATH or among pyenv's versions")
    return max(found)


def probe(path: Path, version: str) -> Interpreter:
    """Run an interpreter to learn its release. Raises Unusable."""
    try:
        done = subprocess.run(
            [path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT, check=True
        )
        executable, release, lacks = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        raise Unusable(f"{path} does not run") from None  # pyenv's command for a version that is not selected
    if lacks:
        raise Unusable(f"{path} has no {' and no '.join(lacks)}")
    if ".".join(map(str, release[:2])) != version:
        raise Unusable(f"{path} is another version")
    return Interpreter(tuple(release), executable)


def _candidates(version: str) -> Iterator[Path]:
    for folder in [*map(Path, os.get_exec_path()), *_pyenv_folders()]:
        path = folder / f"python{version}"
        if os.access(path, os.X_OK):
            yield path


def _pyenv_folders() -> list[Path]:
    if not shutil.which("pyenv"):
        return []
    done = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
    return sorted(Path(done.stdout.strip(), "versions").glob("*/bin")) if done.returncode == 0 else []
