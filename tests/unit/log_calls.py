"""What the package logs, read from its source: each event with its levels and fields.

A log call names its event and its fields, or takes one or both from the parameters of the function around it; then the
calls of that function say what they are. `**method()` adds the keys of the dictionary that the method returns.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nodepass

PACKAGE = Path(nodepass.__file__).parent
EVENT = re.compile(r"[a-z]+\.[a-z_]+")
LEVELS = {
    "debug": "debug",
    "info": "info",
    "always": "info",
    "warning": "warn",
    "error": "error",
    "log": "",  # chosen when it runs
}
NO_FIELDS = {"limit", "crash"}


@dataclass
class Found:
    """One event, as it is logged in one place or several."""

    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    is_always_limited: bool = True  # but for the calls at debug


class Module:
    """A module, parsed, with the calls in each of its functions: searched often, and walked once."""

    def __init__(self, path: Path) -> None:
        self.functions = [(each, _calls(each)) for each in _functions(ast.parse(path.read_text()))]
        self._callers: defaultdict[str, list[tuple[ast.Call, ast.FunctionDef]]] = defaultdict(list)
        for around, calls in self.functions:
            for call in calls:
                self._callers[_name(call)].append((call, around))

    def callers(self, name: str) -> list[tuple[ast.Call, ast.FunctionDef]]:
        """Each call of a function of that name, and the function around it."""
        return self._callers.get(name, [])


class Package:
    """The modules below a folder."""

    def __init__(self, folder: Path) -> None:
        self._modules = [Module(path) for path in sorted(folder.rglob("*.py"))]

    def events(self) -> dict[str, Found]:
        """Every event that some call can log."""
        events: defaultdict[str, Found] = defaultdict(Found)
        for module in self._modules:
            for function, calls in module.functions:
                for call in calls:
                    for names, fields in self._resolve(call, function, module):
                        level = LEVELS[call.func.attr]  # type: ignore[attr-defined]
                        for name in names:
                            events[name].levels.add(level)
                            events[name].fields |= fields
                            events[name].is_always_limited &= level == "debug" or _is_limited(call)
        return dict(events)

    def _resolve(
        self, call: ast.Call, function: ast.FunctionDef, module: Module
    ) -> Iterator[tuple[list[str], set[str]]]:
        """The events of a log call, with the fields of each."""
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in LEVELS or not call.args:
            return
        given = call.args[1] if call.func.attr == "log" and len(call.args) > 1 else call.args[0]
        names, (fields, passed) = _constants(given), self._fields(call, function)
        if isinstance(given, ast.Name) and given.id in _parameters(function):
            for caller, around in self._callers(function, module):
                if named := [name for each in caller.args for name in _constants(each)]:
                    more = self._passed(caller, around, module, function) if passed else set()
                    yield named, fields | more
        elif names:
            for caller, around in self._callers(function, module) if passed else ():
                fields |= self._passed(caller, around, module, function)
            yield names, fields

    def _fields(self, call: ast.Call, function: ast.FunctionDef) -> tuple[set[str], bool]:
        """What a call gives by name, and whether it passes on what its function was given."""
        fields, passed = set(), False
        for keyword in call.keywords:
            if keyword.arg:
                fields |= {keyword.arg} - NO_FIELDS
            elif isinstance(keyword.value, ast.Call):
                fields |= self._returned_by(keyword.value)
            else:
                passed = isinstance(keyword.value, ast.Name) and keyword.value.id == getattr(
                    function.args.kwarg, "arg", None
                )
                assert passed, f"line {call.lineno}: fields of unknown names"
        return fields, passed

    def _passed(self, call: ast.Call, around: ast.FunctionDef, module: Module, function: ast.FunctionDef) -> set[str]:
        """The fields that a call of a function hands on to the log."""
        fields, passed = self._fields(call, around)
        for caller, outer in self._callers(around, module) if passed else ():
            fields |= self._passed(caller, outer, module, around)
        return fields - _parameters(function)

    def _callers(self, function: ast.FunctionDef, module: Module) -> Iterator[tuple[ast.Call, ast.FunctionDef]]:
        """Where a function is called, and the function around that; a method is called in its own module."""
        is_method = bool(function.args.args) and function.args.args[0].arg == "self"
        for each in [module] if is_method else self._modules:
            for call, around in each.callers(function.name):
                if isinstance(call.func, ast.Attribute) == is_method:
                    yield call, around

    def _returned_by(self, call: ast.Call) -> set[str]:
        """The keys of the dictionary that a call returns."""
        keys: set[str] = set()
        named = [each for module in self._modules for each, _ in module.functions if each.name == _name(call)]
        for function in named:
            for node in ast.walk(function):
                if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
                    keys |= {str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)}
        assert keys, f"line {call.lineno}: no dictionary is returned by {_name(call)}"
        return keys


@functools.cache
def events_of_the_program() -> dict[str, Found]:
    """Every event that the program can log; read once, for all tests of a process."""
    return Package(PACKAGE).events()


def _functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions of a module, and one without a name for what runs when it is imported."""
    top = [each for each in module.body if not isinstance(each, ast.FunctionDef | ast.ClassDef)]
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    yield ast.FunctionDef(name="", args=nothing, body=top, decorator_list=[])
    yield from (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _calls(function: ast.FunctionDef) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call)]


def _name(call: ast.Call) -> str:
    """The name of the function that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else str(getattr(call.func, "id", ""))


def _is_limited(call: ast.Call) -> bool:
    """Whether a log call has a limit, made in place or just before, or a constant."""
    given = (*call.args, *(each.value for each in call.keywords))
    return any(
        _name(each) == "Limit"
        if isinstance(each, ast.Call)
        else isinstance(each, ast.Name) and (each.id == "limit" or each.id.isupper())
        for each in given
    )


def _parameters(function: ast.FunctionDef) -> set[str]:
    return {each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}


def _constants(node: ast.expr) -> list[str]:
    """The names of events that an expression may be."""
    if isinstance(node, ast.IfExp):
        return _constants(node.body) + _constants(node.orelse)
    is_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and EVENT.fullmatch(node.value)
    return [node.value] if is_name else []  # type: ignore[attr-defined]
