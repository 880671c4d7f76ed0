"""Draws the comparison as an SVG: one panel a scene, one bar a system, by the scene's headline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.report import format_number
from benchmarks.results import Results
from benchmarks.scenes import Scene

COLUMNS = 3
PANEL_INCHES = (4.4, 0.85, 0.24)  # width; height without bars; height of a bar
OURS, OTHERS, GREY = "#2a6f97", "#b8c4cc", "#5b6770"
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "nodepass",  # the same numbers give the same file
    "font.size": 9,
    "axes.titlesize": 9.5,
}


def draw_panel(axes: Any, results: Results, scene: Scene) -> None:
    """Draw one scene; a system that failed it has a word for a bar, one that cannot do it has no row."""
    headline = scene.headline
    medians = {system: results.median(scene.name, system.name, headline.key) for system in results.systems}
    rows = [
        (system, median or 0.0)
        for system, median in medians.items()
        if median is not None or results.failed(scene.name, system.name)
    ]
    lengths = [median if math.isfinite(median) else 0.0 for _, median in rows]
    words = ["failed" if medians[system] is None else format_number(median) for system, median in rows]
    colors = [OURS if system.name.startswith("nodepass") else OTHERS for system, _ in rows]
    bars = axes.barh([system.title for system, _ in rows], lengths, color=colors, height=0.72)
    axes.bar_label(bars, words, padding=3, color=GREY, fontsize=8)
    axes.set_ylim(len(results.systems) - 0.5, -0.5)  # the same thickness in all panels, the first on top
    axes.margins(x=0.18)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    direction = "more is better" if headline.more_is_better else "less is better"
    axes.set_title(f"{scene.title}\n{headline.label}; {direction}", loc="left", color=GREY)


def draw(results: Results, path: Path) -> None:
    """Write the picture; ImportError where matplotlib, the `bench` extra, is not installed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    scenes = [
        scene
        for scene in results.scenes
        if any(results.values(scene.name, system.name, scene.headline.key) for system in results.systems)
    ]
    columns = min(COLUMNS, len(scenes))
    rows = -(-len(scenes) // columns)
    width, fixed, bar = PANEL_INCHES
    size = (width * columns, rows * (fixed + bar * len(results.systems)))
    with pyplot.rc_context(SETTINGS):
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(h_pad=0.12)
        for axes in grid.flat[len(scenes) :]:
            axes.set_axis_off()
        for axes, scene in zip(grid.flat, scenes, strict=False):
            draw_panel(axes, results, scene)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
