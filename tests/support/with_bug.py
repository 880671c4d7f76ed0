"""Runs the program with a bug in it: `with_bug.py nodepass.client.connector:Connector._connect 2 1 ARGUMENTS...`.

The function that is named raises on so many calls (the 1), after so many that go well (the 2); several are separated by
commas. The program itself has no place where a fault could be put in.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

from gevent import monkey


class Bug(Exception):
    """What nobody expects."""


def put_in(where: str, after: int, times: int) -> None:
    """Have the function at `module:Class.function` raise on calls number after + 1 to after + times."""
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for each in classes:
        owner = getattr(owner, each)
    right: Callable[..., object] = owner.__dict__[name]
    calls = count(1)

    @functools.wraps(right)
    def wrong(*args: object, **kwargs: object) -> object:
        if after < next(calls) <= after + times:
            raise Bug(f"put into {where}")
        return right(*args, **kwargs)

    setattr(owner, name, wrong)


def main() -> int:
    """Patch as the program itself does, for its modules to be imported; then break one of them and run it."""
    monkey.patch_socket()
    monkey.patch_time()
    monkey.patch_select()
    where, after, times = sys.argv[1:4]
    del sys.argv[1:4]
    for each in where.split(","):
        put_in(each, int(after), int(times))
    from nodepass.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
