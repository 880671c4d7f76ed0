"""One target under atheris, in a process of its own: libFuzzer ends the process that it runs in.

Called by `python -m tests.fuzz` with the target's name, then libFuzzer's own arguments.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["nodepass"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
