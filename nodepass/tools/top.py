"""`nodepass top`: a live view of a running process, from its metrics endpoint. A program of its own inside the command.

Blocking code throughout, because there is only one thing to do. On a terminal `top_screen` draws; otherwise, and with
--plain or --once, the output is lines of text. `__main__` calls `main` without gevent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from nodepass.config.kinds import parse_duration
from nodepass.errors import ConfigError
from nodepass.installed import how_to_add
from nodepass.tools.top_scrape import ALLOWED, NoAnswer, Scrape, Source, parse_source, take
from nodepass.tools.top_table import Watch, plain

DESCRIPTION = "Show the tunnels of a running nodepass, peers, pool, sessions and rates, until Ctrl-C or q."
SHORTEST, LONGEST = 0.1, 3600.0  # seconds between two scrapes


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"nodepass top: {message}\n")
        sys.exit(2)


def _interval(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = -1.0
    if seconds != 0 and not SHORTEST <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable; allowed: a duration from 100ms to 1h, or 0")
    return seconds


def _source(text: str) -> Source:
    try:
        return parse_source(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> Parser:
    """The command line of `nodepass top`."""
    parser = Parser(prog="nodepass top", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "source", metavar="ENDPOINT", type=_source, help=f"the METRICS_LISTEN of the process: {ALLOWED}"
    )
    parser.add_argument(
        "--interval", metavar="DURATION", type=_interval, default=1.0, help="between two scrapes; default 1s"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="print one table and exit; its rates are over one interval, --interval 0 prints none",
    )
    parser.add_argument("--plain", action="store_true", help="print lines of text on a terminal as well")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `nodepass top`. 0: printed, or ended by the user. 1: no response. 2: bad input, or a package is missing."""
    parser = make_parser()
    options = parser.parse_args(list(arguments))
    if not options.interval and not options.once:
        parser.error("--interval 0 is for --once; allowed: a duration from 100ms to 1h")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the terminal is restored
    try:
        if options.once:
            _print_once(options.source, options.interval)
        elif options.plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            _print_forever(options.source, options.interval)
        else:
            _draw_forever(options.source, options.interval)
    except NoAnswer as error:
        sys.stderr.write(f"nodepass top: {error}\n")
        return 1
    except ImportError as error:
        instead = ", or use --plain" if error.name == "rich" else ""
        sys.stderr.write(f"nodepass top: {error}; {how_to_add(error)}{instead}\n")
        return 2
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader is gone; else the flush at exit fails, too
    except KeyboardInterrupt:
        pass
    return 0


def _print_once(source: Source, interval: float) -> None:
    watch = Watch()
    watch.add(take(source))
    if interval:
        time.sleep(interval)
        watch.add(take(source))
    sys.stdout.write(f"{plain(watch.rows())}\n")
    sys.stdout.flush()


def _print_forever(source: Source, interval: float) -> None:
    watch = Watch()
    watch.add(take(source))
    while True:
        time.sleep(interval)
        if scrape := _try(source):
            watch.add(scrape)
            sys.stdout.write(f"{time.strftime('%H:%M:%S')} {watch.headline()}\n{plain(watch.rows())}\n\n")
            sys.stdout.flush()


def _try(source: Source) -> Scrape | None:
    try:
        return take(source)
    except NoAnswer as error:
        sys.stderr.write(f"nodepass top: {error}; retrying\n")
        return None


def _draw_forever(source: Source, interval: float) -> None:
    from nodepass.tools.top_screen import Screen

    first = take(source)  # if it fails, the error is printed before the screen is cleared
    with Screen(source) as screen:
        screen.show(first)
        while screen.wait(interval):
            try:
                screen.show(take(source))
            except NoAnswer as error:
                screen.show(None, str(error))
