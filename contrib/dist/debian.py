"""The Debian package: the bundle below /opt/nodepass, and around it what a service needs of a system.

`make` lays the files out below a directory and calls dpkg-deb. The parts that are no code are in contrib/debian.
Called by `__main__`.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path

from contrib.dist import completion

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "contrib" / "debian"
UNITS = ROOT / "contrib" / "systemd"
SCRIPTS = ("postinst", "prerm", "postrm")


def make(output: Path, root: Path, values: Mapping[str, str], epoch: int) -> None:
    """Write the package. `root` has the bundle in opt/nodepass; `values` are for the @NAMES@ in control."""
    add_programs(root)
    add_documents(root, values["VERSION"], epoch)
    completion.write(root / "usr/share/bash-completion/completions", root / "usr/share/zsh/vendor-completions")
    (root / "etc" / "nodepass").mkdir(parents=True)
    set_modes(root)
    add_control(root, values)
    subprocess.run(["find", str(root), "-exec", "touch", "--no-dereference", f"--date=@{epoch}", "{}", "+"], check=True)
    path = output / f"nodepass_{values['VERSION']}_{values['ARCHITECTURE']}.deb"
    command = ["dpkg-deb", "--root-owner-group", "-Zxz", "-z6", "--build", str(root), str(path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def add_programs(root: Path) -> None:
    """Add commands, units and the manager."""
    place(PARTS / "nodepass", root / "usr/bin/nodepass", 0o755)
    manager = Path("opt/nodepass/share/nodepass/systemd/nodepass-manager")
    script = (UNITS / "nodepass-manager").read_text()
    write(root / manager, script.replace("#!/usr/bin/env python3", "#!/opt/nodepass/bin/nodepass -ISB", 1))
    (root / "usr/sbin").mkdir()
    (root / "usr/sbin/nodepass-manager").symlink_to("/" / manager)
    for name in ("nodepass@.service", "nodepass@.socket"):
        unit = (UNITS / name).read_text().replace("/usr/local/bin/nodepass", "/usr/bin/nodepass")
        write(root / "usr/lib/systemd/system" / name, unit)
    place(PARTS / "nodepass.sysusers", root / "usr/lib/sysusers.d/nodepass.conf")
    place(ROOT / "contrib/logrotate/nodepass", root / "etc/logrotate.d/nodepass")


def add_documents(root: Path, version: str, epoch: int) -> None:
    """Add the manual pages, the guides, and what Debian wants of each package."""
    documents = root / "usr/share/doc/nodepass"
    for page in (ROOT / "docs").glob("*.[0-9]"):
        compress(page.read_text(), root / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz")
    for guide in sorted((ROOT / "docs").glob("*.md")):
        place(guide, documents / "docs" / guide.name)
    place(ROOT / "README.md", documents / "README.md")
    place(UNITS / "example.env", documents / "examples/example.env")
    compress((ROOT / "CHANGELOG.md").read_text(), documents / "NEWS.md.gz")
    text = (PARTS / "changelog").read_text().replace("@VERSION@", version).replace("@DATE@", formatdate(epoch))
    compress(text, documents / "changelog.gz")
    lines = (ROOT / "LICENSE").read_text().strip().splitlines()[2:]
    licence = "\n".join(f" {line}" if line else " ." for line in lines)
    write(documents / "copyright", (PARTS / "copyright").read_text().replace("@LICENSE@", licence))
    place(PARTS / "lintian-overrides", root / "usr/share/lintian/overrides/nodepass")


def add_control(root: Path, values: Mapping[str, str]) -> None:
    """Add the description of the package, its scripts, and the sums of its files."""
    control = root / "DEBIAN"
    files = sorted(each for each in root.rglob("*") if each.is_file() and not each.is_symlink())
    size = sum(1 + each.stat().st_size // 1024 for each in files)
    text = (PARTS / "control").read_text()
    for name, value in {**values, "SIZE": str(size)}.items():
        text = text.replace(f"@{name}@", value)
    write(control / "control", text)
    write(control / "conffiles", "/etc/logrotate.d/nodepass\n")
    sums = (f"{hashlib.md5(each.read_bytes()).hexdigest()}  {each.relative_to(root)}\n" for each in files)
    write(control / "md5sums", "".join(sums))
    for name in SCRIPTS:
        place(PARTS / name, control / name, 0o755)


def set_modes(root: Path) -> None:
    """All may read everything, and the instances are for root until postinst gives them to the group."""
    for path in (each for each in root.rglob("*") if not each.is_symlink()):
        executable = path.is_dir() or path.parent.name == "bin" or path.read_bytes()[:2] == b"#!"
        path.chmod(0o755 if executable else 0o644)
    (root / "etc" / "nodepass").chmod(0o750)
    root.chmod(0o755)


def place(source: Path, target: Path, mode: int = 0o644) -> None:
    """Copy a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def write(target: Path, text: str) -> None:
    """Write a file for all to read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    target.chmod(0o644)


def compress(text: str, target: Path) -> None:
    """Write a file compressed, without a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
