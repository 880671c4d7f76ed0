"""`python -m tests.soak --minutes 10 --seed 1`: status 0 if all held, 1 if not; the report is on standard output."""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.report import report
from tests.soak.soak import Soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of an earlier run, to repeat it")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave every context, and so end every process
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"soak: seed {options.seed}, {options.minutes:g} minutes", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nodepass-soak-") as directory:
        soak = Soak(options.minutes * 60, options.seed, Path(directory))
        soak.run()
    print(report(soak, options.seed, (time.monotonic() - began) / 60), flush=True)
    return 1 if soak.tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
