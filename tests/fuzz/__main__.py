"""`make fuzz`: each target for a while under atheris, which looks for inputs that reach new code.

Begins with the seeds that are kept and with what earlier runs have found. What it finds goes to `found/`, which is not
kept; an input that fails is written there too, and how to replay it is said. Replaying needs no atheris.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.targets import TARGETS, seeds

FOUND = Path(__file__).parent / "found"
PYTHONS = ((3, 11), (3, 13))
"""The first and the last Python that the `fuzz` extra has an atheris for."""

LARGEST = 4096
"""Bytes of an input, at most."""

SLOW = 10
"""Seconds after which an input counts as one that hangs."""


def main() -> int:
    options = parse_options()
    if options.replay:
        return replay(options.replay, options.target)
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        first, last, this = (f"{major}.{minor}" for major, minor in (*PYTHONS, sys.version_info[:2]))
        print(f"make fuzz: atheris runs on Python {first} to {last}, this is {this}: say make PYTHON=...")
        return 2
    names = [options.target] if options.target else list(TARGETS)
    failed = [name for name in names if not fuzz(name, options.seconds)]
    print(f"{len(names) - len(failed)} of {len(names)} targets passed" + "".join(f"; {name} failed" for name in failed))
    return 1 if failed else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--target", choices=TARGETS, help="this one only")
    parser.add_argument("--replay", type=Path, help="run one input, a file, through its target")
    return parser.parse_args()


def replay(file: Path, target: str | None) -> int:
    """Run one input; it raises what it raised."""
    name = target or file.resolve().parent.name
    data = file.read_bytes()
    print(f"{name}: {data!r}")
    TARGETS[name](data)
    print(f"passed; to keep it, add that literal as a line to tests/fuzz/seeds/{name}.txt")
    return 0


def fuzz(name: str, seconds: int) -> bool:
    """Whether a target has run so long without failing."""
    found = FOUND / name
    found.mkdir(parents=True, exist_ok=True)
    before = set(found.iterdir())
    with tempfile.TemporaryDirectory(prefix="nodepass-fuzz-") as kept:
        for number, seed in enumerate(seeds(name)):
            Path(kept, str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", f"-timeout={SLOW}"]
        limits += [f"-artifact_prefix={found}{os.sep}"]
        command = [sys.executable, "-m", "tests.fuzz.under_atheris", name, str(found), kept, *limits]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    runs = [line for line in done.stderr.splitlines() if line.startswith(("Done", "#"))]
    print(f"{name}: {runs[-1] if runs else 'no run'}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        for file in sorted(set(found.glob("*-*")) - before):
            print(f"replay it with: {sys.executable} -m tests.fuzz --replay {os.path.relpath(file)}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
