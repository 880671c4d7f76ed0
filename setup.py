"""All metadata of the nodepass distribution; pyproject.toml holds tool settings only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
METRICS = "prometheus-client>=0.20,<1"
RICH = "rich>=13.7,<16"
COVERAGE = "coverage>=7.10,<8"


def read_version() -> str:
    """Return the version written in nodepass/__init__.py, without importing the package and what it needs."""
    source = (ROOT / "nodepass" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"""^__version__\b[^=\n]*=\s*["']([^"']+)["']""", source, re.MULTILINE)
    if found is None:
        raise SystemExit("setup.py: nodepass/__init__.py has no line __version__ = '...'")
    return found.group(1)


def read_requirements() -> list[str]:
    """Return the lines of requirements.txt that name a requirement."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    stripped = (line.partition("#")[0].strip() for line in lines)
    return [line for line in stripped if line]


def read_readme() -> str:
    """Return README.md; an image build that leaves it out gets an empty description."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


# What belongs to the program and is no Python: where a prefix has it, or a virtual environment.
DATA = {
    "share/man/man1": "docs/nodepass.1",
    "share/man/man8": "docs/nodepass-manager.8",
    "share/nodepass/systemd": "contrib/systemd/*",
    "share/nodepass/lock": "contrib/lock/*.txt",
}


def find_data() -> list[tuple[str, list[str]]]:
    """Return the files of DATA; an image build may leave them out."""
    found = ((where, sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(what))) for where, what in DATA.items())
    return [(where, files) for where, files in found if files]


setup(
    name="nodepass",
    version=read_version(),
    description="A TCP and UDP reverse tunnel as one small daemon",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="nodepass contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords="tunnel reverse-tunnel tcp udp tls gevent",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: No Input/Output (Daemon)",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: Proxy Servers",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    package_dir={"": "."},  # said, so that an editable install is a path and no import hook, which costs 25 ms a start
    packages=find_packages(include=["nodepass", "nodepass.*"]),
    package_data={"nodepass": ["py.typed"]},
    data_files=find_data(),
    install_requires=read_requirements(),
    extras_require={
        "metrics": [METRICS],
        "top": [METRICS, RICH],
        "test": [
            "setuptools>=77.0.1",
            "PyYAML>=6,<7",
            "PyYAML>=6.0.1; python_version >= '3.12'",
            "PyYAML>=6.0.2; python_version >= '3.13'",
            "PyYAML>=6.0.3; python_version >= '3.14'",
            "pytest>=8,<10",
            "pytest-xdist>=3.6.1,<4",
            "hypothesis>=6.100,<7",
            "proxy-protocol>=0.11,<0.12",
            METRICS,
            RICH,
        ],
        "lint": ["ruff>=0.17,<0.18", "mypy>=2.4,<3", "types-gevent", "types-setuptools", METRICS, RICH, COVERAGE],
        "kubernetes": ["kubernetes-validate>=1.33,<2"],
        "lock": ["uv>=0.9,<1"],
        "bench": ["matplotlib>=3.8,<4"],
        "coverage": [COVERAGE],
        "fuzz": ["atheris>=3,<4; python_version >= '3.11' and python_version < '3.14'"],
    },
    entry_points={"console_scripts": ["nodepass = nodepass.__main__:main"]},
)
