"""What of the installed packages no run of nodepass reads: tests, sources, other event loops, tools for building.

Used by the image's build, as `python unneeded.py DIRECTORY` with a `site-packages`, and by `bundle`, which leaves the
same files out. Knows nothing about where a directory came from.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

PATTERNS = (
    "**/tests",
    "**/testing",
    # Sources of what is compiled, and types.
    "**/*.[ch]",
    "**/*.[ch]pp",
    "**/*.p[xy][xdi]",
    "**/*.pyi",
    "**/py.typed",
    # gevent on Linux runs on libev by its Cython module, and looks names up in threads.
    "gevent/_ffi",
    "gevent/libuv",
    "gevent/libev/_corecffi*",
    "gevent/resolver/cares*",
    "greenlet/platform",
    # cryptography brings its own binding, which needs _cffi_backend only.
    "cffi",
    "cffi-*.dist-info/entry_points.txt",
    "pycparser*",
    # rich without Markdown and syntax colours.
    "markdown_it*",
    "mdurl*",
    "pygments*",
    # Tools.
    "_distutils_hack",
    "distutils-precedence.pth",
    "pip",
    "pkg_resources",
    "setuptools",
    # Notes of the installers.
    "*.dist-info/RECORD",
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
    "*.dist-info/sboms",
    "*.egg-info",
)


def find(library: Path) -> Iterator[Path]:
    """The files and directories in a `site-packages` that are not needed; one may be below another."""
    for pattern in PATTERNS:
        yield from library.glob(pattern)


def remove(library: Path) -> None:
    """Delete them."""
    for path in list(find(library)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


if __name__ == "__main__":
    remove(Path(sys.argv[1]))
