"""The package is divided into levels: a module imports only from lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import nodepass

PACKAGE = Path(nodepass.__file__).parent

# From the bottom up; modules on one line do not know each other. CONTRIBUTING.md says what each level is for.
LEVELS = (
    ("__init__", "errors", "capacity", "frames", "health"),
    ("config", "urls", "protocol", "stats", "log", "secret", "systemd"),
    ("proofs", "top_scrape", "findings", "keepalive"),
    ("net", "sorting", "verification", "limits", "top_table", "bios", "records"),
    ("stream", "pipes", "top_screen", "inherited", "readiness", "procnet"),
    ("session",),
    ("listen", "tls", "crew", "lanes", "direction", "target", "unix"),
    ("certificates", "control", "pool", "relay", "datagrams", "lobby", "httpd", "metrics"),
    ("handshake", "visitor_flows", "target_flows", "server_pool", "client_pool", "exposition"),
    ("fillers",),
    ("link",),
    ("gate", "entrance", "door", "attachment"),
    ("server", "client", "monitor", "check_client", "check_ports"),
    ("tunnels",),
    ("daemon", "top", "check"),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: number for number, modules in enumerate(LEVELS) for module in modules}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nodepass"):
            name = node.module.removeprefix("nodepass").removeprefix(".")
            found |= {name} if name else {alias.name for alias in node.names} & set(LEVEL)
    return found


def test_every_module_has_a_level() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(LEVEL)


def test_a_module_imports_only_from_lower_levels() -> None:
    wrong = [(above, below) for above in LEVEL for below in imports(above) if LEVEL[below] >= LEVEL[above]]
    assert not wrong


def test_the_package_imports_nothing_before_the_patch() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def test_openssl_is_imported_only_by_the_modules_of_tls() -> None:
    importers = set()
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        # What is only needed by a type checker costs no memory.
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if (module or "").partition(".")[0] in ("OpenSSL", "cryptography"):
                    importers.add(path.stem)
    assert importers == {"tls", "certificates", "verification", "records"}
