"""`nodepass top` on a terminal: a table that is redrawn after each scrape, in colour, as much of it as fits.

The only module that imports rich.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nodepass.tools.top_scrape import Scrape, Source
from nodepass.tools.top_table import COLUMNS, NOTHING, Watch, fit, sparkline
from nodepass.tunnel.security import NONE

GRAPH = "UP+DOWN"
SMALLEST_GRAPH = 8  # characters; with less room there is no graph
LOOK = 0.2  # seconds between two checks of the terminal's size
FRAME_LINES = 4  # headline, titles, footer, and the cursor's line


class Screen:
    """The terminal's contents; a context manager that restores the terminal."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._console = Console()
        self._live = Live(console=self._console, screen=True, auto_refresh=False, transient=True)
        self._stack = contextlib.ExitStack()
        self._watch = Watch()
        self._problem = ""

    def __enter__(self) -> Screen:
        self._stack.enter_context(_keys_unechoed())
        self._stack.enter_context(self._live)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, scrape: Scrape | None, problem: str = "") -> None:
        """Draw a new scrape, or the last one again with the reason why there is no new one."""
        if scrape:
            self._watch.add(scrape)
        self._problem = problem
        self._draw()

    def wait(self, seconds: float) -> bool:
        """Wait that long; False if `q` was pressed meanwhile."""
        deadline = time.monotonic() + seconds
        size = self._console.size
        while (left := deadline - time.monotonic()) > 0:
            if not sys.stdin.isatty():
                time.sleep(left)
            elif select.select([sys.stdin], [], [], min(left, LOOK))[0]:
                keys = os.read(sys.stdin.fileno(), 64)
                if not keys or b"q" in keys.lower():
                    return False
            if self._console.size != size:
                size = self._console.size
                self._draw()
        return True

    def _draw(self) -> None:
        width, height = self._console.size
        headline = Text(self._watch.headline(), style="bold", no_wrap=True, overflow="ellipsis")
        footer = Text(f"{self._source}   q: quit", style="dim", no_wrap=True, overflow="ellipsis")
        if self._problem:
            footer = Text(f"{self._problem}; retrying", style="bold red", no_wrap=True, overflow="ellipsis")
        table = self._table(width, max(1, height - FRAME_LINES))
        self._live.update(Group(headline, table, footer), refresh=True)

    def _table(self, width: int, lines: int) -> Table:
        rows = self._watch.rows()
        kept = fit(rows, width)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), style="dim" if self._problem else "")
        for i in kept:
            table.add_column(COLUMNS[i].title, justify="right" if COLUMNS[i].right else "left", no_wrap=True)
        used = sum(max(COLUMNS[i].width, *(len(row[i]) for row in rows), 0) + 2 for i in kept)
        graph = width - used
        if graph >= SMALLEST_GRAPH:
            table.add_column(GRAPH, no_wrap=True)
        names = list(self._watch.last.tunnels) if self._watch.last else []
        shown = rows if len(rows) <= lines else rows[: lines - 1]
        for name, row in zip(names, shown, strict=False):
            cells = [_coloured(COLUMNS[i].title, row[i]) for i in kept]
            if graph >= SMALLEST_GRAPH:
                cells.append(Text(sparkline(self._watch.history(name), graph), style="cyan"))
            table.add_row(*cells)
        if len(shown) < len(rows):
            table.add_row(Text(f"{len(rows) - len(shown)} more", style="dim"))
        return table


def _coloured(title: str, cell: str) -> Text:
    if title == "STATE":
        return Text(cell, style="green" if cell == "ready" else "bold red")
    if (title in ("FAIL/S", "DROP/S") and cell not in ("0", NOTHING)) or (title, cell) == ("SECURITY", NONE):
        return Text(cell, style="yellow")
    return Text(cell)


@contextlib.contextmanager
def _keys_unechoed() -> Iterator[None]:
    """Read keys as they are pressed, without an echo."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
