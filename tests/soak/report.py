"""What a soak says at its end."""

from __future__ import annotations

from statistics import median

from tests.soak.soak import Soak
from tests.soak.vitals import BLOCKS, CREEP, HEAP, slopes


def report(soak: Soak, seed: int, minutes: float) -> str:
    """The report, as lines of text."""
    tally = soak.tally
    lines = [
        f"seed {seed}, {minutes:.1f} minutes, {soak.cycles} rounds",
        *([f"without the pair on two machines: {soak.without}"] if soak.without else []),
        f"sessions: {_counts(tally.sessions)}; {tally.bytes['received'] / 1e6:.0f} MB received and checked",
        f"datagrams: {_counts(tally.datagrams)}",
        "faults, and seconds from their end until the tunnel worked:",
    ]
    lines += [_recovery(name, times) for name, times in sorted(soak.recoveries.items())]
    runs = [run for pair, _ in soak.pairs for run in pair.runs]
    lines.append(
        f"memory after warm-up (flat: heap {HEAP[0]:.0f} KiB and {HEAP[1]:.0f} KiB a minute, blocks {BLOCKS[0]:.0f} and"
        f" {BLOCKS[1]:.0f} a minute, resident {100 * CREEP:.0f} %):"
    )
    lines += [f"  {found}" for run in runs if (found := slopes(run))] or ["  no process lived long enough for a slope"]
    lines.append(f"idle processes, looked at {sum(soak.base_lines.seen.values())} times; their base lines:")
    for kind, descriptors in sorted(soak.base_lines.descriptors.items()):
        greenlets = soak.base_lines.greenlets.get(kind, "not counted")
        lines.append(f"  {kind}: {descriptors} descriptors, greenlets: {greenlets}")
    lines += [f"FOUND: {finding}" for finding in tally.findings]
    lines.append("FAILED" if tally.findings else "passed")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _recovery(name: str, times: list[float]) -> str:
    return f"  {name}: {len(times)} times; {min(times):.2f} / {median(times):.2f} / {max(times):.2f} (min/median/max)"
