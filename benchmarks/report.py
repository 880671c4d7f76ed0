"""Writes what a run found as JSON and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.results import Results
from benchmarks.scenes import Metric, Scene

NOTES = """\
Each number is the median of the rounds; in every round all systems take their turn, each with processes
started for this one measurement. In brackets: the ratio to haproxy ×2 (for UDP, to direct), which is the
median of the rounds' ratios. CPU and memory are those of all processes of a system together, without visitors
and targets. haproxy ×2 is two TCP-mode haproxy in a row, one thread each."""
HOLD_NOTE = """
The scene with 5,000 visitors runs with SEMAPHORE_LIMIT=8192 where a program knows it."""


@dataclass(frozen=True)
class Circumstances:
    """What has to be known to repeat a run."""

    date: str
    rounds: int
    seconds: int
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    skipped: list[str]


def format_number(value: float | None) -> str:
    """Return a number with three digits that count and thousands separated; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "not all"  # the only infinity: hold, when some visitors were never served
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def format_cell(results: Results, scene: Scene, metric: Metric, system: str) -> str:
    """Return one cell of the table: the median, and on the headline's row the ratio."""
    median = results.median(scene.name, system, metric.key)
    if median is None and results.failed(scene.name, system):
        return "failed"
    text = format_number(median)
    ratio = results.ratio(scene, system) if metric is scene.headline else None
    if ratio is None or not math.isfinite(ratio) or results.base(scene) == system:
        return text
    return f"{text} ({ratio:.2f}×)" if ratio >= 0.1 else f"{text} ({ratio:.1g}×)"


def format_table(results: Results) -> str:
    """Return the Markdown table: a row for each metric of each scene, a column for each system."""
    lines = [
        "| scene | | " + " | ".join(system.title for system in results.systems) + " |",
        "|---|---|" + "---:|" * len(results.systems),
    ]
    for scene in results.scenes:
        for metric in scene.metrics:
            cells = [format_cell(results, scene, metric, system.name) for system in results.systems]
            if all(cell == "–" for cell in cells):
                continue
            title = f"**{scene.title}**" if metric is scene.headline else ""
            lines.append(f"| {title} | {metric.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_circumstances(run: Circumstances) -> str:
    """Return when, on what, how long and with which versions, in a line each."""
    machine = run.machine
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory']}, {machine['system']}"
    length = f"{run.rounds} round{'s' * (run.rounds > 1)}, {run.seconds} s of load each"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"Measured on {run.date}: {where}.\n{length}.\n{versions}."


def format_report(results: Results, run: Circumstances) -> str:
    """Return the whole Markdown text."""
    hold = HOLD_NOTE if any("SEMAPHORE_LIMIT" in scene.environment for scene in results.scenes) else ""
    parts = [format_circumstances(run), format_table(results), NOTES + hold]
    failures = [
        f"* {sample.scene}, {sample.system}, round {sample.round + 1}: {sample.failure}"
        for sample in results.samples
        if sample.failure
    ]
    remarks = [f"* {line}" for line in run.skipped] + failures
    if remarks:
        parts.append("Left out or failed:\n\n" + "\n".join(remarks))
    return "\n\n".join(parts) + "\n"


def _finite(value: float | None) -> float | None:
    """Return what JSON can say: no nan, no infinity."""
    return value if value is not None and math.isfinite(value) else None


def to_json(results: Results, run: Circumstances) -> str:
    """Return everything as JSON: circumstances, medians, ratios of the headlines, and all samples."""
    names = [system.name for system in results.systems]
    scenes = {
        scene.name: {
            "title": scene.title,
            "metrics": {metric.key: metric.label for metric in scene.metrics},
            "ratio_to": results.base(scene),
            "ratios": {name: _finite(results.ratio(scene, name)) for name in names},
            "medians": {
                name: {metric.key: _finite(results.median(scene.name, name, metric.key)) for metric in scene.metrics}
                for name in names
            },
        }
        for scene in results.scenes
    }
    samples = [
        {**asdict(sample), "values": {key: _finite(value) for key, value in sample.values.items()}}
        for sample in results.samples
    ]
    systems = {system.name: system.title for system in results.systems}
    whole = {**asdict(run), "systems": systems, "scenes": scenes, "samples": samples}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(results: Results, run: Circumstances, folder: Path) -> list[Path]:
    """Write `benchmark.json` and `benchmark.md` into the folder; returns their paths."""
    outputs = {"benchmark.json": to_json(results, run), "benchmark.md": format_report(results, run)}
    for name, text in outputs.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in outputs]
