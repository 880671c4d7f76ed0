"""`make dist`: what is released, reproducibly, below dist/, and the SHA-256 of each in dist/SHA256SUMS.

The wheel, the source distribution, one executable file and a Debian package. The same commit, interpreter and tools
give the same bytes: times are SOURCE_DATE_EPOCH, which is the commit's unless it is set, and everything that is
installed on the way comes from contrib/lock by its hash. Needs the programs of NEEDED.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from contrib.dist import bundle, debian

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
NEEDED = {"strip": "binutils", "objdump": "binutils", "ldd": "libc-bin", "dpkg-deb": "dpkg"}
"""Programs, and the Debian packages that have them."""
LAUNCHER = Path(__file__).resolve().with_name("executable.sh")
SOURCES = (
    *("setup.py", "pyproject.toml", "requirements.txt", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"),
    *("nodepass", "docs", "contrib"),
)
"""What the wheel and the source distribution are built from."""

BUILD = """\
import sys
from setuptools import build_meta
target = sys.argv.pop()  # setuptools looks at its arguments, too
build_meta.build_sdist(target)
build_meta.build_wheel(target)
"""


def find_epoch() -> int:
    """The time of everything that is built, in seconds: SOURCE_DATE_EPOCH, or that of the last commit."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit("dist: this is no git checkout, so set SOURCE_DATE_EPOCH to the release's time, in seconds")
    return int(done.stdout)


def copy_sources(target: Path, epoch: int) -> None:
    """Copy what is built from, without what earlier builds have left, with modes and times of its own."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target / name)
    normalize(target, epoch)


def normalize(tree: Path, epoch: int) -> None:
    """Set modes and times: read by all, written by the owner, executable as before."""
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            executable = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def build_python(output: Path, workspace: Path, epoch: int) -> Path:
    """Build the wheel and the source distribution; the wheel."""
    source, built = workspace / "source", workspace / "built"
    source.mkdir()
    copy_sources(source, epoch)
    built.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(built)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=source, umask=0o022)
    (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
    unpacked = workspace / "unpacked"
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked)
    (output / archive.name).write_bytes(pack(unpacked, epoch))
    return Path(shutil.copy(wheel, output))


def pack(tree: Path, epoch: int) -> bytes:
    """A directory as tar.gz, in the order of names, owned by root."""
    normalize(tree, epoch)
    packed = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, packed, mtime=epoch) as compressed:
        with tarfile.open(fileobj=compressed, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(tree.rglob("*")):
                entry = archive.gettarinfo(path, str(path.relative_to(tree)))
                entry.uid = entry.gid = 0
                entry.uname = entry.gname = "root"
                with path.open("rb") if entry.isfile() else io.BytesIO() as content:
                    archive.addfile(entry, content)
    return packed.getvalue()


def make_executable(output: Path, tree: Path, version: str, architecture: str, epoch: int) -> None:
    """Write the executable: the launcher, and the tree behind it."""
    archive = pack(tree, epoch)
    digest = hashlib.sha256(archive).hexdigest()[:16]
    text = LAUNCHER.read_text().replace("@VERSION@", version).replace("@ARCH@", architecture)
    text = text.replace("@TREE@", f"{version}-{digest}")
    length = len(text.encode()) - len("@OFFSET@")
    offset = next(number for number in range(length, 2 * length) if number == length + len(str(number)) + 1)
    path = output / f"nodepass-{version}-linux-{architecture}"
    path.write_bytes(text.replace("@OFFSET@", str(offset)).encode() + archive)
    path.chmod(0o755)


def write_sums(output: Path) -> None:
    """List the SHA-256 of everything, as `sha256sum --check` reads it."""
    files = sorted(each for each in output.iterdir() if each.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(each.read_bytes()).hexdigest()}  {each.name}\n" for each in files]
    (output / "SHA256SUMS").write_text("".join(lines))
    print(*lines, sep="", end="")


def main() -> int:
    """Build everything; the exit status."""
    parser = argparse.ArgumentParser(prog="make dist", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="directory, which is replaced")
    output = parser.parse_args().output
    if missing := {package for program, package in NEEDED.items() if not shutil.which(program)}:
        sys.exit(f"dist: not installed, by the names of Debian's packages: {', '.join(sorted(missing))}")
    epoch = find_epoch()
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    with tempfile.TemporaryDirectory(prefix="nodepass-dist.") as directory:
        workspace = Path(directory)
        wheel = build_python(output, workspace, epoch)
        (version,) = re.findall(r"nodepass-(.+?)-py3", wheel.name)
        root = workspace / "root"
        tree = root / "opt" / "nodepass"
        bundle.make(tree, wheel, workspace)
        make_executable(output, tree, version, architecture, epoch)
        c_library = bundle.find_c_library(tree)
        debian.make(output, root, {"VERSION": version, "ARCHITECTURE": architecture, "LIBC": c_library}, epoch)
        print("needs the GNU C library", c_library, "or newer")
    write_sums(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
