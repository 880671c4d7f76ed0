"""The entry point: patches the standard library for gevent, then imports the rest.

Nothing else but `installed` may be imported before the patch: a socket made by an unpatched module would block the
whole process.
"""

import gc
import os
import sys

from nodepass.installed import how_to_add


def main() -> int:
    """Run nodepass with the arguments of the command line; its exit status."""
    if sys.argv[1:2] == ["top"]:  # blocking code, which needs no gevent
        from nodepass.tools.top import main as top

        return top(sys.argv[2:])
    if not sys.stderr:  # closed by what started this: descriptor 2 must not become a tunnel's
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    if sys.platform != "linux":
        sys.stderr.write(f"nodepass: this system is {sys.platform}; allowed: linux\n")
        return 1
    if "NODEPASS_HANDOVER" in os.environ:
        from nodepass.handover.program import detach

        detach()
    gc.disable()  # imports leave no garbage; `cli` enables it
    try:
        from gevent import events, monkey
    except ImportError as error:
        sys.stderr.write(f"nodepass: {error}; {how_to_add(error)}\n")
        return 1
    # Searching for plug-ins of the patching would import a mail parser and more: 2.7 MB.
    events.notify_and_call_entry_points = events.notify  # type: ignore[attr-defined]  # its stubs know neither
    # Not ssl, subprocess and threads: the program uses none of them, and each costs memory.
    monkey.patch_socket()
    monkey.patch_time()
    monkey.patch_select()

    try:
        from nodepass.cli import main as run
    except ImportError as error:
        sys.stderr.write(f"nodepass: {error}; {how_to_add(error)}\n")
        return 1
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
