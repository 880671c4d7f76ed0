"""Inside every process of a soak, by PYTHONPATH: SIGUSR2 has it say how much memory is in use.

What the kernel counts also holds what the allocator keeps for later, which creeps up to its high-water mark for a long
time. What is in use does not, so that a leak of a few bytes per session shows within minutes.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2 (2.33)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def heap_in_use() -> int:
    """Bytes; 0 where this C library does not say."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo.restype = Mallinfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


EVENT = (
    b'{"time": "", "level": "info", "tunnel": "soak", "event": "soak.memory", "message": "", "heap": %d, "blocks": %d}'
)


def tell(*_: object) -> None:
    """Write an event to standard error. Garbage is collected before: what only waits for that is no leak."""
    gc.collect()
    os.write(2, EVENT % (heap_in_use(), sys.getallocatedblocks()) + b"\n")


signal.signal(signal.SIGUSR2, tell)
