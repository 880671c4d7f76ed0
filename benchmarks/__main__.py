"""The command line of the benchmark: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import datetime
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.picture import draw
from benchmarks.report import Circumstances, format_report, write_report
from benchmarks.results import Results
from benchmarks.rounds import keep_available, run_rounds
from benchmarks.scenes import SCENES, Scene
from benchmarks.systems import System, all_systems, parse_peer

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Named = TypeVar("Named", Scene, System)


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    print(text, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line: what can be said and what it means."""
    scenes = ", ".join(scene.name for scene in SCENES)
    systems = ", ".join(system.name for system in all_systems([]))
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measures tunnels against each other, all on loopback. A program that is not installed "
        "is skipped by name; on Debian: apt-get install nginx iperf3 wrk haproxy openssh-server.",
        epilog='From make: make bench ARGS="--quick --scenes churn,connect"',
    )
    parser.add_argument("--scenes", metavar="A,B", help=f"only these, of {scenes}")
    parser.add_argument("--systems", metavar="A,B", help=f"only these, of {systems}, or a peer's NAME and NAME-tls")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default 3)")
    parser.add_argument("--seconds", type=int, default=3, metavar="S", help="seconds of each load (default 3)")
    parser.add_argument("--quick", action="store_true", help="one round of one second: a first look, not a result")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="also measure this NodePass-compatible program; its server or client URL is appended",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/out"),
        metavar="DIR",
        help="where the results go (default %(default)s)",
    )
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; exits with a line of explanation when they make no sense."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 1, 1
    if not 1 <= options.rounds <= 100 or not 1 <= options.seconds <= 60:
        parser.error("--rounds is from 1 to 100, --seconds from 1 to 60")
    try:
        peers = [system for text in options.peer for system in parse_peer(text)]
        options.scenes = choose(options.scenes, SCENES)
        options.systems = choose(options.systems, all_systems(peers))
    except ValueError as error:
        parser.error(str(error))
    return options


def choose(names: str | None, known: Sequence[Named]) -> list[Named]:
    """Return those of `known` that are named, all if `names` is None; ValueError for an unknown name."""
    if names is None:
        return list(known)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = set(wanted) - {one.name for one in known}
    if unknown or not wanted:
        raise ValueError(
            f"{', '.join(sorted(unknown)) or 'nothing'} is not among {', '.join(one.name for one in known)}"
        )
    return [one for one in known if one.name in wanted]


def raise_file_limit() -> None:
    """Allow as many open files as the machine lets us: the hold scene needs thousands in each process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End the run by unwinding it; an impatient second signal does not cut that short."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> int:
    """Measure, write, show; returns the exit status: 1 if nothing at all could be measured."""
    scenes, systems, skipped = keep_available(options.scenes, options.systems)
    for line in skipped:
        say(line)
    if not scenes or not systems:
        return 1
    circumstances = Circumstances(
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        rounds=options.rounds,
        seconds=options.seconds,
        machine=describe_machine(),
        versions=describe_versions(),
        skipped=skipped,
    )
    with tempfile.TemporaryDirectory(prefix="nodepass-bench-") as folder:
        samples = list(run_rounds(scenes, systems, options.rounds, options.seconds, Path(folder), say))
    results = Results(scenes, systems, samples)
    options.out.mkdir(parents=True, exist_ok=True)
    written = write_report(results, circumstances, options.out)
    say(f"\n{format_report(results, circumstances)}")
    if all(sample.failure is not None for sample in samples):
        return 1
    picture = options.out / "benchmark.svg"
    try:
        draw(results, picture)
        written.append(picture)
    except ImportError:
        say("No picture: matplotlib is not installed (pip install '.[bench]')")
    say(f"Written: {', '.join(map(str, written))}")
    return 0


def main() -> int:
    """Parse, run, end cleanly on a signal."""
    options = parse_arguments()
    raise_file_limit()
    for number in ENDING_SIGNALS:
        signal.signal(number, interrupt)
    try:
        return run(options)
    except KeyboardInterrupt:
        say("\nInterrupted: everything that was started has been ended, and nothing was written.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
