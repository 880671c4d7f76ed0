"""Runs the program with sessions that wait less for an acknowledgement: `with_bounds.py 3 60 1 ARGUMENTS...`.

The three are the seconds of `nodepass.net.deadlines.Bounds`, minutes in the program itself, where they are no settings.
"""

from __future__ import annotations

import sys

from gevent import monkey


def main() -> int:
    """Patch as the program itself does, for its modules to be imported; then shorten the bounds and run it."""
    monkey.patch_socket()
    monkey.patch_time()
    monkey.patch_select()
    from nodepass.net import deadlines

    bounds = deadlines.Bounds(*(float(sys.argv.pop(1)) for _ in range(3)))
    deadlines.Bounds = lambda: bounds  # type: ignore[assignment, misc]
    deadlines.ROUND = 0.3
    from nodepass.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
