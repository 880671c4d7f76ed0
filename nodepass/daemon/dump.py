"""The list of greenlets that SIGUSR1 asks for: hundreds of lines, which are for a file and not for the log.

The file is in the runtime directory that systemd makes for the service (RUNTIME_DIRECTORY). Without one there is no
directory that is known to be this process's alone, so `daemon` logs the lines at debug.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import cast

NAME = "greenlets"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def list_greenlets() -> list[str]:
    """gevent's tree of greenlets, with a stack of each."""
    from gevent.util import format_run_info

    return cast(Callable[[], list[str]], format_run_info)()  # gevent's stubs say that it returns nothing


def count_greenlets(lines: Sequence[str]) -> int:
    """How many greenlets in such a list have not ended."""
    return sum("+--- <" in line and "; finished" not in line for line in lines)


def save(lines: Sequence[str], directory: str) -> str:
    """Replace the file of the last dump; its path. Only the process's user can read it. Raises OSError.

    A link in its place is replaced, not followed. A dump that fails leaves nothing, for what is full may be memory.
    """
    path = os.path.join(directory, NAME)
    fresh = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)  # of a dump that was cut short
    try:
        # Not in the locale's encoding: an error would be no OSError.
        with open(os.open(fresh, _NEW_FILE, 0o600), "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    return path
