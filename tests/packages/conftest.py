"""What is released, built once for all tests; and the logs of the processes beside every failure."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import pytest_runtest_makereport, pytest_runtest_setup, stack
from tests.support.process import REPOSITORY

__all__ = ["pytest_runtest_makereport", "pytest_runtest_setup", "stack"]
TOOLS = REPOSITORY / "contrib" / "lock" / "dist.txt"


def build(output: Path) -> Path:
    """Build the releases as `make dist` does."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install")
    subprocess.run([*pip, "--require-hashes", "--requirement", str(TOOLS)], check=True)
    command = [sys.executable, "-m", "contrib.dist", "--output", str(output)]
    subprocess.run(command, check=True, cwd=REPOSITORY, capture_output=True)
    return output


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the releases."""
    workers = tmp_path_factory.getbasetemp()
    shared = workers.parent if re.match(r"popen-gw\d", workers.name) else workers
    with (shared / "dist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker that needs it builds it
        if not (shared / "dist" / "SHA256SUMS").exists():
            build(shared / "dist")
    return shared / "dist"


@pytest.fixture(scope="session")
def executable(dist: Path) -> Path:
    """The one executable file."""
    (found,) = dist.glob("nodepass-*-linux-*")
    return found
