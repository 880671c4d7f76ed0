"""Turns the samples of the rounds into medians and ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.rounds import Sample
from benchmarks.scenes import Scene
from benchmarks.systems import System

BASES = ("haproxy", "direct")  # the system that others are compared to: the first that has the scene


@dataclass(frozen=True)
class Results:
    """Everything that one run found out."""

    scenes: Sequence[Scene]
    systems: Sequence[System]
    samples: Sequence[Sample]

    def values(self, scene: str, system: str, key: str) -> dict[int, float]:
        """Return a metric's values by round; without those that could not be measured."""
        return {
            sample.round: sample.values[key]
            for sample in self.samples
            if (sample.scene, sample.system) == (scene, system) and not math.isnan(sample.values.get(key, math.nan))
        }

    def median(self, scene: str, system: str, key: str) -> float | None:
        """Return the median over the rounds, None if there is no value."""
        values = self.values(scene, system, key)
        return statistics.median(values.values()) if values else None

    def failed(self, scene: str, system: str) -> bool:
        """Tell whether a measurement of this pair failed in any round."""
        return any(
            sample.failure is not None for sample in self.samples if (sample.scene, sample.system) == (scene, system)
        )

    def base(self, scene: Scene) -> str | None:
        """Return the name of the system that a scene's ratios refer to."""
        return next((name for name in BASES if self.values(scene.name, name, scene.headline.key)), None)

    def ratio(self, scene: Scene, system: str) -> float | None:
        """Return the median of the rounds' ratios of the headline to the base's; None without one."""
        key = scene.headline.key
        base = self.base(scene)
        if base is None:
            return None
        divisors = self.values(scene.name, base, key)
        ratios = [
            value / divisors[number]
            for number, value in self.values(scene.name, system, key).items()
            if math.isfinite(divisors.get(number, math.nan)) and divisors[number] > 0
        ]
        return statistics.median(ratios) if ratios else None
