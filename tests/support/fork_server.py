"""A process that has imported the program, and forks itself for every start of it.

A start by fork takes a fifth of the CPU time of one that imports everything anew. The child has the arguments, the
environment, the output streams and the limit of descriptors that the request names, and nothing on standard input; it
runs `main` of the module that the request names, and ends as any Python program does. `forked` asks for it.

A request is one JSON message on standard input, a socket, with three descriptors: standard output and error, and a pipe
into which go the process id and, at its end, the exit status. The process ends when the other side closes the socket.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import mmap
import os
import resource
import socket
import struct
import sys
from collections.abc import Callable
from select import POLLIN, poll
from typing import TypedDict

from nodepass.__main__ import patch

LONGEST = 1 << 17  # bytes of a request
NUMBER = struct.Struct("i")  # of a process or an exit status, in the pipe

USUAL = (
    "nodepass.cli",
    "nodepass.tools.check",
    "nodepass.tls.stream",
    "nodepass.tls.certificates",
    "nodepass.metrics.endpoint",
    "service_identity",
)
"""What most runs import; the program itself imports each of these only where it is needed."""


class Request(TypedDict):
    """A program to start."""

    module: str
    arguments: list[str]
    environment: dict[str, str]
    limit: tuple[int, int]
    """Of descriptors: the soft and the hard one."""


class Children:
    """The processes that were started and have not ended, each with the pipe of its own."""

    def __init__(self) -> None:
        self._pipes: dict[int, tuple[int, int]] = {}  # by the descriptor that stands for the process

    def add(self, pid: int, pipe: int) -> int:
        """Report its number; the descriptor that is readable at its end."""
        os.write(pipe, NUMBER.pack(pid))
        ended = os.pidfd_open(pid)
        self._pipes[ended] = pid, pipe
        return ended

    def end(self, ended: int) -> None:
        """Report its exit status."""
        pid, pipe = self._pipes.pop(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # the test has given it up
            os.write(pipe, NUMBER.pack(status))
        os.close(pipe)
        os.close(ended)


def serve(control: socket.socket) -> Request | None:
    """Fork for each request: the request in a child, None in this process when there will be no more."""
    children = Children()
    watched = poll()
    watched.register(control, POLLIN)
    while True:
        for descriptor, _ in watched.poll():
            if descriptor != control.fileno():
                watched.unregister(descriptor)
                children.end(descriptor)
                continue
            data, passed, _, _ = socket.recv_fds(control, LONGEST, 3)
            if not data:
                return None
            *streams, pipe = passed
            if not (pid := os.fork()):
                control.detach()
                return become(json.loads(data), streams)
            for each in streams:
                os.close(each)
            watched.register(children.add(pid, pipe), POLLIN)


def become(request: Request, streams: list[int]) -> Request:
    """Make this process what the request asks for."""
    for target, source in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the one of the listing is closed already
                os.close(int(name))
    resource.setrlimit(resource.RLIMIT_NOFILE, request["limit"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    return request


def main() -> int:
    """Serve; in a child, run the program."""
    control = socket.socket(fileno=0)  # made before the patch, as poll is imported before it: gevent has no loop yet
    patch()
    # The program's buffers, which are anonymous maps: by default all the children would share them.
    mmap.mmap = functools.partial(mmap.mmap, flags=mmap.MAP_PRIVATE)  # type: ignore[misc,assignment]
    for name in USUAL:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else each child collects at its end what it shares with the others: 0.15 s
    request = serve(control)
    if request is None:
        return 0
    run: Callable[[], int] = importlib.import_module(request["module"]).main
    return run()


if __name__ == "__main__":
    sys.exit(main())
