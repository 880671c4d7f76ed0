"""Makes a directory of installed packages small: without what no run of nodepass reads, and as byte code only.

The image's build runs it, as `python slim.py DIRECTORY` with a `site-packages`; `bundle` uses its parts. Needs nothing
but Python's standard library, and knows nothing about where a directory came from.
"""

from __future__ import annotations

import compileall
import py_compile
import shutil
import struct
import sys
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
    "gevent/libev/*corecffi*",
    "gevent/libev/watcher.py",
    "gevent/resolver/*ares*",
    "gevent/resolver/dnspython.py",
    "gevent/resolver_ares.py",
    # Parts of it that the program does not import.
    "gevent/_gevent_c_tracer*",
    "gevent/_monitor.py",
    "gevent/_tracer.py",
    "gevent/ares.py",
    "gevent/backdoor.py",
    "gevent/baseserver.py",
    "gevent/server.py",
    "gevent/pywsgi.py",
    "gevent/ssl.py",
    "gevent/subprocess.py",
    "gevent/win32util.py",
    "prometheus_client/openmetrics/parser.py",
    "prometheus_client/aiohttp",
    "prometheus_client/bridge",
    "prometheus_client/django",
    "prometheus_client/twisted",
    "zope/interface/adapter.py",
    "zope/interface/advice.py",
    "zope/interface/common",
    "zope/interface/document.py",
    "zope/interface/registry.py",
    "zope/interface/verify.py",
    "cryptography/fernet.py",
    "cryptography/hazmat/primitives/twofactor",
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
    "pip*",
    "pkg_resources",
    "setuptools*",
    # Notes of the installers.
    "*.dist-info/RECORD",
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
    "*.dist-info/sboms",
    "*.egg-info",
)

"""Tests, sources, other event loops, tools for building: below a `site-packages`."""

ELF = b"\x7fELF\x02\x01"  # of 64 bits, little-endian


def remove_unneeded(library: Path) -> None:
    """Delete what no run reads."""
    for path in [each for pattern in PATTERNS for each in library.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists():  # else it was below another one
            path.unlink()


def compile_packages(library: Path) -> None:
    """Compile all packages; those of others without their docstrings, which are an eighth of the byte code."""
    for compiled in list(library.rglob("__pycache__")):
        shutil.rmtree(compiled)
    for package in [*library.iterdir()]:
        compile_tree(package, library, 0 if package.name == "nodepass" else 2)


def compile_tree(tree: Path, library: Path, optimize: int = 0) -> None:
    """Replace the sources by byte code that is never compared with them. A traceback has lines without their text."""
    sources = [tree] if tree.suffix == ".py" else [*tree.rglob("*.py")]
    for source in sources:
        compileall.compile_file(
            source,
            quiet=1,
            force=True,
            legacy=True,
            optimize=optimize,
            stripdir=str(library),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        source.unlink()


def drop_symbols(file: Path) -> None:
    """Cut off what follows the last segment of a compiled module: symbols for debuggers, and the table of sections.

    The loader looks at segments only. Saves 4 of 16 MB where no `strip` is installed.
    """
    content = bytearray(file.read_bytes())
    if not content.startswith(ELF):
        return
    (table,) = struct.unpack_from("<Q", content, 32)
    size, number = struct.unpack_from("<HH", content, 54)
    headers = [struct.unpack_from("<IIQQQQ", content, table + size * each) for each in range(number)]
    struct.pack_into("<Q", content, 40, 0)  # where sections are described
    struct.pack_into("<HH", content, 60, 0, 0)  # how many there are, and which has their names
    file.write_bytes(content[: max(offset + length for _, _, offset, _, _, length in headers)])


def main(library: Path) -> None:
    """Make a `site-packages` small."""
    remove_unneeded(library)
    compile_packages(library)
    for file in library.rglob("*.so"):
        drop_symbols(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
