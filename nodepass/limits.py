"""The process's limit on open files: raised as far as it goes, and a word where even that is too little."""

from __future__ import annotations

import resource

from nodepass.config import Settings
from nodepass.log import Log

PER_SESSION = 2  # descriptors: the visitor's or the target's, and the data connection
OWN = 32  # descriptors: listeners, control connections, gevent's own


def raise_descriptor_limit(tunnels: int, settings: Settings, log: Log) -> None:
    """Raise the soft limit to the hard one; warn where so many tunnels could need more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard or soft == resource.RLIM_INFINITY:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a sandbox may forbid it
            hard = soft
    needed = tunnels * (PER_SESSION * settings.semaphore_limit + settings.max_pool_capacity) + OWN
    if hard not in (resource.RLIM_INFINITY, -1) and needed > hard:
        log.warning(
            "open files: SEMAPHORE_LIMIT and MAX_POOL_CAPACITY can need %d, %d more than the limit of %d allows;"
            " raise it (ulimit -Hn, LimitNOFILE=) or lower them",
            needed,
            needed - hard,
            hard,
        )
