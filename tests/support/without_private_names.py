"""Runs the program with a pyOpenSSL that lacks some of its private names, as a later version may.

`without_private_names.py BIO_new_mem_buf,SSL_set_bio ARGUMENTS...`
"""

from __future__ import annotations

import sys
from typing import Any

from gevent import monkey


class Hiding:
    """Another object with some attributes replaced; those replaced by None are missing."""

    def __init__(self, hidden: Any, **replaced: Any) -> None:
        self._hidden = hidden
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        if name not in self._replaced:
            return getattr(self._hidden, name)
        if self._replaced[name] is None:
            raise AttributeError(name)
        return self._replaced[name]


def main() -> int:
    """Patch as the program itself does, hide the names, and run it."""
    monkey.patch_socket()
    monkey.patch_time()
    monkey.patch_select()
    names = sys.argv.pop(1)
    from OpenSSL import SSL

    binding: Any = SSL
    binding._lib = Hiding(binding._lib, **dict.fromkeys(names.split(",")))
    from nodepass.__main__ import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
