"""Which versions of the dependencies a combination has, from the metadata of the wheel."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRA = "test"
Choice = Literal["highest", "lowest"]
CHOICES: tuple[Choice, ...] = ("highest", "lowest")


def read_requirements(wheel: Path) -> list[str]:
    """What a wheel requires, with its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])


def lines_for(requirements: Iterable[str], python: str, choice: Choice) -> list[str]:
    """The lines of a requirements file for a Python, such as 3.12: of the tests' extra too."""
    wanted = [Requirement(line) for line in requirements]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": EXTRA}
    wanted = [each for each in wanted if each.marker is None or each.marker.evaluate(environment)]
    if choice == "highest":
        return [f"{each.name}{each.specifier}" for each in wanted]
    return [f"{name}=={version}" for name, version in _lower_bounds(wanted).items()]


def _lower_bounds(requirements: Iterable[Requirement]) -> dict[str, Version]:
    lowest: dict[str, Version] = {}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        bounds = [Version(each.version) for each in requirement.specifier if each.operator == ">="]
        lowest[name] = max([*bounds, lowest.get(name, Version("0"))])
    if unbound := [name for name, version in lowest.items() if version == Version("0")]:
        raise ValueError(f"no lower bound: {', '.join(unbound)}")
    return lowest
