"""`make matrix`: unit tests and some end-to-end tests on every Python, with the highest and the lowest dependencies.

The highest versions are those that requirements.txt and setup.py allow; the lowest are their lower bounds, which are
releases with a wheel for each Python that the line applies to. Only wheels are installed. Each combination has a
virtual environment in `.matrix/`, which the next run uses again, and its log there. The tests run in a copy of the
checkout, because `bin/nodepass` prefers the `.venv` beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.matrix.dependencies import CHOICES, Choice, lines_for, read_requirements
from tests.matrix.interpreters import VERSIONS, Interpreter, Unusable, find
from tests.support.process import REPOSITORY
from tests.support.wheels import build_wheel

FOLDER = REPOSITORY / ".matrix"
LEFT_OUT = ("__pycache__", "*.egg-info", "build", "dist")
SUITES = {
    "unit": ("tests/unit",),
    "end to end": tuple(
        f"tests/e2e/test_{name}.py"
        for name in ("start", "sessions", "udp", "tls", "tls_public_api", "metrics_endpoint")
    ),
}
SHOWN = ("gevent", "pyOpenSSL", "cryptography", "ConfigArgParse", "service-identity")
TIMEOUT = 1800  # seconds for one suite
LINES = 40  # of a log, the last ones, that a failure shows


class Failed(Exception):
    """A step of a combination; the text is its result in the table."""


@dataclass
class Combination:
    """One Python with one choice of dependencies."""

    python: Interpreter
    choice: Choice
    versions: dict[str, str] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)

    @property
    def has_failed(self) -> bool:
        return any(not result.startswith("passed") for result in self.results.values())

    @property
    def name(self) -> str:
        return f"{self.python.text}-{self.choice}"

    @property
    def log(self) -> Path:
        return FOLDER / f"{self.name}.log"

    @property
    def interpreter(self) -> Path:
        """That of its virtual environment."""
        return FOLDER / self.name / "bin" / "python"

    def run(self, wheel: Path, checkout: Path) -> None:
        """Install, and run the suites; `results` says how it went."""
        self.log.write_text("")
        try:
            self._install(wheel)
        except Failed as error:
            self.results = {"install": str(error)}
            return
        for suite, paths in SUITES.items():
            self.results[suite] = self._test(paths, checkout)

    def _install(self, wheel: Path) -> None:
        if not self.interpreter.exists():
            self._call("not created", self.python.path, "-m", "venv", "--clear", str(FOLDER / self.name))
        lines = lines_for(read_requirements(wheel), self.python.text.rpartition(".")[0], self.choice)
        wanted = FOLDER / f"{self.name}.txt"
        wanted.write_text("".join(f"{line}\n" for line in lines))
        pip = (str(self.interpreter), "-m", "pip", "--disable-pip-version-check", "--quiet")
        install = (*pip, "install", "--only-binary", ":all:")
        self._call("no wheels", *install, "--upgrade", "--upgrade-strategy", "eager", "--requirement", str(wanted))
        self._call("not installed", *install, "--no-deps", "--force-reinstall", str(wheel))
        self._call("in conflict", *pip, "check")
        code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        done = subprocess.run([self.interpreter, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
        self.versions = dict(zip(SHOWN, done.stdout.split(), strict=True))

    def _call(self, failure: str, *command: str) -> None:
        with self.log.open("a") as log:
            if subprocess.run(command, stdout=log, stderr=log, check=False).returncode:
                raise Failed(failure)

    def _test(self, paths: Sequence[str], checkout: Path) -> str:
        options = ("-q", "-p", "no:cacheprovider", "--numprocesses", "4", "--dist", "loadfile")
        began = time.monotonic()
        with self.log.open("a+") as log:
            start = log.seek(0, os.SEEK_END)
            try:
                done = subprocess.run(
                    [self.interpreter, "-m", "pytest", *options, *paths],
                    cwd=checkout,
                    stdout=log,
                    stderr=log,
                    env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                    timeout=TIMEOUT,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"failed: not done after {TIMEOUT} s"
            log.seek(start)
            counts = re.findall(r"\d+ (?:passed|failed|errors?)\b", (log.read().splitlines() or [""])[-1])
        seconds = time.monotonic() - began
        word = "passed" if done.returncode == 0 else "failed"
        return f"{word}: {', '.join(counts) or 'no test ran'} in {seconds:.0f} s"


def main() -> int:
    """Run the combinations; 0 when all that could run have passed."""
    options = parse_options()
    pythons, missing = [], {}
    for version in options.python or VERSIONS:
        try:
            pythons.append(find(version))
        except Unusable as error:
            missing[version] = str(error)
            say(f"Python {version}: skipped: {error}")
    FOLDER.mkdir(exist_ok=True)
    combinations = [Combination(python, choice) for python in pythons for choice in options.dependencies or CHOICES]
    with tempfile.TemporaryDirectory(prefix="nodepass-matrix-") as folder:
        wheel = build_wheel(Path(folder), Path(folder, "sources"))
        checkout = copy_checkout(Path(folder, "checkout"))
        for each in combinations:
            each.run(wheel, checkout)
            report(each)
    say("")
    for line in table(combinations, missing):
        say(line)
    return 0 if combinations and not any(each.has_failed for each in combinations) else 1


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", action="append", choices=VERSIONS, help="only this one; may be repeated")
    parser.add_argument("--dependencies", action="append", choices=CHOICES, help="only these")
    return parser.parse_args()


def copy_checkout(folder: Path) -> Path:
    """A copy without what other tools have made, which begins with a dot but for CI's own."""
    for path in REPOSITORY.iterdir():
        if path.name.startswith(".") and path.is_dir() and path.name != ".ci":
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy2(path, folder / path.name)
    return folder


def report(combination: Combination) -> None:
    """One line, and the end of the log of one that failed."""
    results = "; ".join(f"{suite} {result}" for suite, result in combination.results.items())
    say(f"Python {combination.python.text}, {combination.choice} dependencies: {results}")
    if combination.has_failed:
        for line in combination.log.read_text(errors="replace").splitlines()[-LINES:]:
            say(f"    {line}")
        say(f"    the whole log: {os.path.relpath(combination.log)}")


def table(combinations: Sequence[Combination], missing: dict[str, str]) -> Iterator[str]:
    """The results as columns."""
    rows: list[tuple[str, ...]] = [("Python", "versions", *SHOWN, "result")]
    for each in combinations:
        versions = (each.versions.get(name, "") for name in SHOWN)
        rows.append((each.python.text, each.choice, *versions, "failed" if each.has_failed else "passed"))
    rows += [(version, *("-" for _ in ("", *SHOWN)), "skipped") for version in missing]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
