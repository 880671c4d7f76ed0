"""What goes wrong, on purpose: each fault is done and undone, and says which lines of the log it explains."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.soak.pairs import Explained, Pair, Role
from tests.soak.places import Apart
from tests.support.log import one_of

LONGEST = 5.0
"""Seconds that a fault lasts, at most: beyond the three heartbeats after which a peer is given up."""

TARGET_AWAY = (
    Explained("target.unreachable"),
    Explained("target.down"),
    Explained("client.target_unreachable"),
    Explained("visitor.unserved", reason="target_down"),
    Explained("datagram.dropped", reason=one_of("target_refused", "target_unreachable")),
    Explained("log.suppressed", suppressed=one_of("target.unreachable", "visitor.unserved", "datagram.dropped")),
)
PEER_AWAY = (
    Explained("server.unreachable"),
    Explained("server.rejected", reason="busy"),
    Explained("client.replaced"),
    Explained("client.rejected", reason="busy"),
    Explained("data.dial_failed"),
    Explained("data.rejected"),
    Explained("visitor.unserved"),
    Explained("datagram.dropped", reason=one_of("unserved", "lane_full", "lane_missing", "flow_over")),
    Explained("launch.unknown"),
    Explained("log.suppressed"),
)
STOPPING = (Explained("process.cut"),)


@dataclass(frozen=True)
class Fault:
    """One kind."""

    name: str
    inject: Callable[[Pair, random.Random], None]
    explains: tuple[Explained, ...] = ()


def kill(role: Role) -> Callable[[Pair, random.Random], None]:
    """A process dies at once, and another takes its place a while later."""

    def inject(pair: Pair, rng: random.Random) -> None:
        pair.process(role).kill()
        time.sleep(rng.uniform(0, LONGEST / 2))
        pair.start(role)

    return inject


def pause(role: Role) -> Callable[[Pair, random.Random], None]:
    """A process does nothing for a while, as on a machine that is suspended."""

    def inject(pair: Pair, rng: random.Random) -> None:
        pair.process(role).send(signal.SIGSTOP)
        try:
            time.sleep(rng.uniform(0.2, LONGEST))
        finally:
            pair.process(role).send(signal.SIGCONT)

    return inject


def replace(pair: Pair, rng: random.Random) -> None:
    """Both processes are asked to stop, and others take their place, set up in another way."""
    roles: list[Role] = ["server", "client"]
    rng.shuffle(roles)
    for role in roles:
        code = pair.process(role).stop()
        assert code == 0, f"{pair.current[role].kind} ended with status {code}"
    pair.reshape(rng)
    pair.start("server")
    pair.start("client")


def renew(pair: Pair, _: random.Random) -> None:
    """The server is given a new certificate."""
    server = pair.process("server")
    mark = server.mark()
    fingerprint = pair.renew_certificate().fingerprint
    server.send(signal.SIGHUP)
    server.wait_for("certificate.reloaded", after=mark, sha256=fingerprint)


def stop_target(pair: Pair, rng: random.Random) -> None:
    """The service goes away, and comes back."""
    pair.service.stop()
    time.sleep(rng.uniform(0, LONGEST / 2))
    pair.place.at_client(pair.service.start)


def reset(pair: Pair, rng: random.Random) -> None:
    """Somebody in the middle resets some or all connections of the tunnel."""
    assert pair.middle
    pair.middle.reset(rng.choice((0.1, 0.5, 1.0)))


def pull(pair: Pair, rng: random.Random) -> None:
    """The cable between the two ends is pulled, and plugged in again."""
    assert isinstance(pair.place, Apart)
    pair.place.network.pull()
    try:
        time.sleep(rng.uniform(0.2, LONGEST))
    finally:
        pair.place.network.mend()


KILLED = (
    Fault("server killed", kill("server"), PEER_AWAY),
    Fault("client killed", kill("client"), PEER_AWAY),
)
PAUSED = (
    Fault("server paused", pause("server"), PEER_AWAY),
    Fault("client paused", pause("client"), PEER_AWAY),
)
TARGET_STOPPED = Fault("target stopped", stop_target, TARGET_AWAY)

STEADY = (Fault("connections reset", reset, PEER_AWAY), Fault("certificate renewed", renew), TARGET_STOPPED)
"""For a pair whose processes live as long as the soak."""

BATTERED = (*KILLED, *PAUSED, TARGET_STOPPED, Fault("both replaced", replace, PEER_AWAY + STOPPING))
"""For a pair that is set up in one way after the other."""

CABLED = (Fault("cable pulled", pull, PEER_AWAY), *PAUSED, Fault("client killed", kill("client"), PEER_AWAY))
"""For a pair on two machines."""
