"""Runs the scenes: every system in rotation, each measurement with processes of its own."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import MeasurementError, Processes
from benchmarks.scenes import Course, Scene, Values
from benchmarks.systems import System, open_system
from benchmarks.targets import find_program

Say = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One measurement: its values, or why there are none."""

    scene: str
    system: str
    round: int
    values: Values
    failure: str | None = None


def fits(scene: Scene, system: System) -> bool:
    """Tell whether a system can be put through a scene at all."""
    if system.direct and scene.weighs:
        return False
    if scene.datagrams and not system.datagrams:
        return False
    return scene.tunnels == 1 or system.many_tunnels


def keep_available(scenes: Sequence[Scene], systems: Sequence[System]) -> tuple[list[Scene], list[System], list[str]]:
    """Return the scenes and systems whose programs are there, and a sentence for each that is left out."""
    skipped = []
    kept_scenes = []
    for scene in scenes:
        missing = next((program for program in scene.programs if find_program(program) is None), None)
        if missing is None:
            kept_scenes.append(scene)
        else:
            skipped.append(f"scene {scene.name} skipped: {missing} is not installed")
    kept_systems = []
    for system in systems:
        missing = system.missing()
        if missing is None:
            kept_systems.append(system)
        else:
            skipped.append(f"system {system.name} skipped: {missing} is not installed")
    return kept_scenes, kept_systems, skipped


def plan(scenes: Sequence[Scene], systems: Sequence[System], rounds: int) -> Iterator[tuple[int, Scene, System]]:
    """Yield every measurement; in each round another system begins, so that none is always first."""
    for number in range(rounds):
        turn = number % len(systems)
        for scene in scenes:
            for system in [*systems[turn:], *systems[:turn]]:
                if fits(scene, system):
                    yield number, scene, system


def measure(scene: Scene, system: System, seconds: int, folder: Path) -> Values:
    """Start target and system, wait until they work, run the load, end them; MeasurementError on failure."""
    with ExitStack() as stack:
        behind = stack.enter_context(Processes(folder / "target"))
        processes = stack.enter_context(Processes(folder / "system"))
        targets = [scene.target.open(behind)] * scene.tunnels
        ports = open_system(system, processes, targets, scene.environment)
        for port in ports:
            scene.target.wait(port, behind, processes)
        values = scene.run(Course(ports, processes, seconds, system.direct))
        processes.check()
    return values


def describe(scene: Scene, sample: Sample) -> str:
    """Return a sample's line for the terminal."""
    if sample.failure is not None:
        return f"failed: {sample.failure}"
    pairs = ((metric.label, sample.values[metric.key]) for metric in scene.metrics)
    return "   ".join(f"{label} {value:,.4g}" for label, value in pairs if not math.isnan(value))


def run_rounds(
    scenes: Sequence[Scene], systems: Sequence[System], rounds: int, seconds: int, folder: Path, say: Say
) -> Iterator[Sample]:
    """Yield one sample after the other; what fails is a sample with a reason, and the run goes on."""
    for count, (number, scene, system) in enumerate(plan(scenes, systems, rounds)):
        try:
            values = measure(scene, system, seconds, folder / f"{count}-{scene.name}-{system.name}")
            sample = Sample(scene.name, system.name, number, values)
        except (MeasurementError, OSError, subprocess.SubprocessError, LookupError, ValueError) as error:
            sample = Sample(scene.name, system.name, number, {}, f"{type(error).__name__}: {error}")
        say(f"{number + 1}/{rounds}  {scene.name:<11}{system.title:<18}{describe(scene, sample)}")
        yield sample
