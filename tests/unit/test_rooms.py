"""The package is divided into rooms: a module imports only from its own, from rooms before it, and from the root."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import nodepass

PACKAGE = Path(nodepass.__file__).parent
# In the order of imports.
ROOMS = (
    *("config", "wire", "net", "tls", "outbound", "tunnel", "visitors", "server"),
    *("client", "metrics", "handover", "daemon", "tools"),
)
APART = {"server", "client"}
LIMIT = 12  # modules in a room, and
ROOT_LIMIT = 10  # at the root
COMMAND = {"cli", "__main__"}  # they stand at the root and above all rooms
ROOT = ("__init__", "installed", "errors", "stats", "log", "tasks")  # in the order of imports


@functools.cache
def modules() -> list[str]:
    """The dotted names of all modules, without the package's own."""
    return [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")]


def path_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


@functools.cache
def parsed(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text())


@functools.cache
def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions and for types only."""
    found, known = set(), set(modules())
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nodepass":
            source = node.module.partition(".")[2]
            members = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            found |= (members & known) or ({source} if source else {"__init__"})
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("nodepass.")}
    return found


def level(module: str) -> float:
    room, _, rest = module.partition(".")
    if rest:
        return ROOMS.index(room)
    return len(ROOMS) if room in COMMAND else -1


def room(module: str) -> str:
    return module.partition(".")[0] if "." in module else ""


def test_every_module_is_in_a_room_or_named_at_the_root() -> None:
    assert {room(module) for module in modules()} == {"", *ROOMS}
    assert {module for module in modules() if not room(module)} == {*ROOT, *COMMAND}


def test_rooms_stay_small_enough_to_be_read_at_a_glance() -> None:
    for name in ROOMS:
        assert len([each for each in modules() if room(each) == name and not each.endswith("__init__")]) <= LIMIT, name
    assert len(ROOT) + len(COMMAND) <= ROOT_LIMIT


def test_no_module_imports_from_a_later_room() -> None:
    wrong = [(above, below) for above in modules() for below in imports(above) if level(below) > level(above)]
    assert not wrong


def test_the_root_imports_only_what_stands_before_it() -> None:
    order = {module: number for number, module in enumerate(ROOT)}
    wrong = [(module, below) for module in ROOT for below in imports(module) if order[below] >= order[module]]
    assert not wrong


def test_modules_of_one_room_import_each_other_in_one_direction() -> None:
    graph = {module: {each for each in imports(module) if room(each) == room(module)} for module in modules()}
    while leaves := [module for module, below in graph.items() if not below & set(graph)]:
        for module in leaves:
            del graph[module]
    assert not graph


def test_server_and_client_know_nothing_of_each_other() -> None:
    wrong = [
        (module, other) for module in modules() for other in imports(module) if {room(module), room(other)} == APART
    ]
    assert not wrong


def test_the_package_imports_nothing_before_the_patch() -> None:
    for init in PACKAGE.rglob("__init__.py"):
        tree = ast.parse(init.read_text())
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)), init


def test_openssl_is_imported_only_in_the_room_of_tls() -> None:
    importers = set()
    for module in modules():
        # What only a type checker needs costs no memory.
        for node in parsed(module).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                source = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if (source or "").partition(".")[0] in ("OpenSSL", "cryptography"):
                    importers.add(room(module))
    assert importers == {"tls"}


def test_the_guide_for_contributors_names_the_modules_of_every_room() -> None:
    guide = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    for name in ROOMS:
        (row,) = re.findall(rf"^\| `{name}/` \|.*\|(.*)\|$", guide, re.MULTILINE)
        named = set(re.findall(r"`(\w+)`", row))
        there = {each.partition(".")[2] for each in modules() if room(each) == name} - {"__init__"}
        assert named == there, name
