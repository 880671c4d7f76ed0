"""What `nodepass top` shows: rates between two scrapes, one row of cells per tunnel, and their plain text.

Nothing here knows about terminals: `top_screen` draws the same cells in colour, as many as fit.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from nodepass.tools.top_scrape import Scrape, Tunnel

HISTORY = 60  # rates kept for the sparklines
BARS = "▁▂▃▄▅▆▇█"
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column: its title, the least width of its cells, and how early it is dropped for lack of room."""

    title: str
    width: int
    dropped: int  # the highest first; 0: never
    right: bool = True


COLUMNS = (
    Column("TUNNEL", 12, 0, right=False),
    Column("STATE", 5, 1, right=False),
    Column("PEER", 15, 5, right=False),
    Column("SECURITY", 8, 5, right=False),
    Column("RTT", 7, 6),
    Column("POOL", 7, 7),
    Column("TARGETS", 7, 7),
    Column("TCP", 4, 4),
    Column("UDP", 4, 4),
    Column("RATE", 9, 13),
    Column("LEFT", 7, 12),
    Column("SESS/S", 6, 8),
    Column("FAIL/S", 6, 9),
    Column("DROP/S", 6, 10),
    Column("REFUSE/S", 8, 11),
    Column("UP/S", 8, 2),
    Column("DOWN/S", 8, 2),
)


@dataclass(frozen=True)
class Rates:
    """Rates per second, between two scrapes."""

    ended: float
    failed: float
    drops: float
    refused: float
    up: float
    down: float


class Watch:
    """The scrapes of one process: the last one, its rates since the one before, and the history of rates."""

    def __init__(self) -> None:
        self.last: Scrape | None = None
        self.cpu: float | None = None  # share of one processor
        self.rates: dict[str, Rates] = {}
        self._history: dict[str, deque[float]] = {}

    def add(self, scrape: Scrape) -> None:
        """Add a scrape; after a restart of the process the rates begin again."""
        before, self.last = self.last, scrape
        self.rates, self.cpu = {}, None
        self._history = {name: rates for name, rates in self._history.items() if name in scrape.tunnels}
        if before is None or before.started != scrape.started:
            return
        seconds = max(1e-3, scrape.taken - before.taken)
        if scrape.cpu is not None and before.cpu is not None:
            self.cpu = max(0.0, scrape.cpu - before.cpu) / seconds
        for name, tunnel in scrape.tunnels.items():
            if name in before.tunnels:
                rates = self.rates[name] = _rates(before.tunnels[name], tunnel, seconds)
                self._history.setdefault(name, deque(maxlen=HISTORY)).append(rates.up + rates.down)

    def history(self, name: str) -> Sequence[float]:
        """Bytes per second of a tunnel, both directions together, the latest last."""
        return self._history.get(name, ())

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of each tunnel, in the order of COLUMNS."""
        if self.last is None:
            return []
        return [_cells(tunnel, self.rates.get(name)) for name, tunnel in self.last.tunnels.items()]

    def headline(self) -> str:
        """One line about the process."""
        scrape = self.last
        if scrape is None:
            return ""
        ready = sum(tunnel.ready for tunnel in scrape.tunnels.values())
        parts = [f"nodepass {scrape.version}", f"{ready} of {len(scrape.tunnels)} tunnels ready"]
        if scrape.started is not None:
            parts.append(f"up {duration(time.time() - scrape.started)}")
        if scrape.memory is not None:
            parts.append(f"memory {scrape.memory / 2**20:.0f} MiB")
        if self.cpu is not None:
            parts.append(f"cpu {100 * self.cpu:.0f} %")
        return ", ".join(parts)


def _rates(before: Tunnel, now: Tunnel, seconds: float) -> Rates:
    def rate(old: float, new: float) -> float:
        return (new - old if new >= old else new) / seconds  # after a restart it counts from 0

    return Rates(
        rate(before.ended, now.ended),
        rate(before.failed + before.handshakes_failed, now.failed + now.handshakes_failed),
        rate(before.drops, now.drops),
        rate(before.refused, now.refused),
        rate(before.up, now.up),
        rate(before.down, now.down),
    )


def _cells(tunnel: Tunnel, rates: Rates | None) -> tuple[str, ...]:
    far = NOTHING if tunnel.round_trip is None else f"{1000 * tunnel.round_trip:.1f}ms"
    cells = (
        tunnel.name,
        "ready" if tunnel.ready else "down",
        (f"{tunnel.peers_connected} of {tunnel.peers}" if tunnel.peers > 1 else tunnel.peer) or NOTHING,
        tunnel.security or NOTHING,
        far,
        f"{tunnel.pool_idle}/{tunnel.pool_capacity}",
        f"{tunnel.targets_up:.0f}/{tunnel.targets}" if tunnel.targets else NOTHING,
        str(tunnel.tcp_open),
        str(tunnel.udp_open),
        _limits(tunnel.rate_up, tunnel.rate_down),
        NOTHING if tunnel.traffic_limit is None else size(max(0.0, tunnel.traffic_limit - tunnel.traffic_used)),
    )
    if rates is None:
        return (*cells, *[NOTHING] * 6)
    numbers = tuple(f"{each:.3g}" for each in (rates.ended, rates.failed, rates.drops, rates.refused))
    return (*cells, *numbers, size(rates.up), size(rates.down))


def _limits(up: float | None, down: float | None) -> str:
    """The limits of the rate, as a user writes them: 10M/50M."""
    if up is None and down is None:
        return NOTHING
    return "/".join(NOTHING if each is None else _bits(8 * each) for each in (up, down))


def _bits(rate: float) -> str:
    for unit in ("", "k", "M"):
        if rate < 1000:
            return f"{rate:g}{unit}"
        rate /= 1000
    return f"{rate:g}G"


def size(count: float) -> str:
    """Bytes as text: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """A time span as text, in its two largest units."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    return f"{hours}h{minutes}m" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest values as bars, the highest of them full; a value above 0 is never shown as 0."""
    shown = list(values)[-width:] if width > 0 else []
    highest = max(shown, default=0.0)
    if not highest:
        return BARS[0] * len(shown)
    return "".join(BARS[min(7, int(value / highest * 7) + (0 < value < highest / 7))] for value in shown)


def fit(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """The indices of the columns that fit into this width; the first column always stays."""
    widths = [max(column.width, *(len(row[i]) for row in rows), 0) for i, column in enumerate(COLUMNS)]
    kept = list(range(len(COLUMNS)))
    while len(kept) > 1 and sum(widths[i] + 2 for i in kept) > width:
        kept.remove(max(kept, key=lambda i: (COLUMNS[i].dropped, i)))
    return kept


def plain(rows: Sequence[Sequence[str]]) -> str:
    """A table as text: all columns, separated by two or more spaces."""
    table = [tuple(column.title for column in COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    lines = []
    for row in table:
        cells = zip(row, widths, COLUMNS, strict=True)
        line = "  ".join(cell.rjust(width) if column.right else cell.ljust(width) for cell, width, column in cells)
        lines.append(line.rstrip())
    return "\n".join(lines)
