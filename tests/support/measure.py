"""`make coverage`: which lines of the program the unit tests run, and which all tests of `make test` do.

The program that end-to-end tests start is measured as well, except for the runs that a test kills. Some tests count
calls or greenlets and fail while they are measured: whether tests pass is said by `make test`. Arguments go to pytest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.process import REPOSITORY

DATA = REPOSITORY / ".coverage"
SUITES = {"unit": ["tests/unit"], "rest": ["tests", "--ignore=tests/unit"]}
STATUSES = (0, 1)
"""Exit statuses of pytest that mean that the tests were run."""


class Row(NamedTuple):
    """A module, and how many of its lines are run by whom."""

    name: str
    runnable: int
    by_unit: int
    by_all: int


def run(suite: str, options: list[str]) -> None:
    """Run a suite of tests with every process measured, and join what was noted in one file."""
    command = [sys.executable, "-m", "coverage"]
    data = f"--data-file={DATA}.{suite}"
    for old in REPOSITORY.glob(f"{DATA.name}.{suite}*"):
        old.unlink()
    tests = ["-m", "pytest", "--quiet", *SUITES[suite], *options]
    status = subprocess.run([*command, "run", data, *tests], cwd=REPOSITORY, check=False).returncode
    if status not in STATUSES:
        sys.exit(status)
    subprocess.run([*command, "combine", "--quiet", data], cwd=REPOSITORY, check=True)


def load(*suites: str) -> Any:
    """What these suites have run."""
    from coverage import Coverage  # an extra, which only `make coverage` installs

    loaded = Coverage(data_file=None)
    loaded.combine([f"{DATA}.{suite}" for suite in suites], keep=True)
    return loaded


def lines(loaded: Any, module: Path) -> tuple[int, int]:
    """How many lines of a module can run, and how many have."""
    _, runnable, _, missed, _ = loaded.analysis2(str(module))
    return len(runnable), len(runnable) - len(missed)


def percent(part: int, whole: int) -> str:
    """The share, rounded down."""
    return f"{100 * part // whole:3d} %" if whole else "    -"


def main() -> int:
    """Run the tests and print a row for each module, the least covered by unit tests first."""
    for suite in SUITES:
        run(suite, sys.argv[1:])
    unit, everything = load("unit"), load(*SUITES)
    rows = [
        Row(str(module.relative_to(REPOSITORY)), *lines(unit, module), lines(everything, module)[1])
        for module in sorted((REPOSITORY / "nodepass").rglob("*.py"))
    ]
    rows = sorted((row for row in rows if row.runnable), key=lambda row: row.by_unit / row.runnable)
    rows.append(Row("all modules", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True))))
    print(f"{'module':44} lines  unit   all")
    for row in rows:
        print(
            f"{row.name:44} {row.runnable:5} {percent(row.by_unit, row.runnable)} {percent(row.by_all, row.runnable)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
