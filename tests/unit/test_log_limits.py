"""Every line that a peer can cause before it has authenticated is limited, so that it cannot fill a disk."""

from __future__ import annotations

from nodepass.log import Log
from nodepass.stats import Stats
from nodepass.tasks import report_bug
from tests.unit.log_calls import events_of_the_program
from tests.unit.records import recorded

# Events that only the operator, the machine or this program's own timers cause. Every other one above debug can be
# caused from outside: by what connects to a port, by a visitor, or by a server that is not the client's.
FROM_INSIDE = {
    # a start
    "config.warning",
    "process.limits",
    "process.limits_exceeded",
    "metrics.listening",
    "server.leaving",
    "server.listening",
    "certificate.loaded",
    "tls.public_api",
    "traffic.unlocked",
    "traffic.unusable",
    "tunnel.security",  # also when a connection makes it known more exactly, but each text once
    # a stop
    "process.cut",
    "process.exiting",
    "process.hangup",
    "process.stopped",
    "process.stopping",
    # a signal or a file that has changed
    "access.reopen_failed",
    "certificate.kept",
    "certificate.reloaded",
    "certificate.unchanged",
    "client.revoked",
    "keys.missing",
    "keys.reload_failed",
    "keys.reloaded",
    "process.bugs",
    "process.dump_failed",
    "process.handed_over",
    "process.handover",
    "process.handover_failed",
    "process.handover_refused",
    "process.reloading",
    "process.took_over",
    "rules.kept",
    "rules.reloaded",
    "tunnel.report",
    # a timer
    "access.lost",  # once for half a queue at most
    "certificate.expiring",
    "log.lost",  # once for half a queue at most
    "log.suppressed",
    "traffic.nearly_used",  # once in a day, and so are the next two
    "traffic.renewed",
    "traffic.used_up",
    "tunnel.crashed",  # once in SERVICE_COOLDOWN
    "tunnel.restart_failed",
}


def test_every_line_that_is_caused_from_outside_is_limited() -> None:
    unlimited = {name for name, found in events_of_the_program().items() if not found.is_always_limited}
    assert unlimited == FROM_INSIDE


def test_bugs_are_limited_by_kind_and_not_by_where_they_happen() -> None:
    log = Log("t")
    with recorded() as records:
        for number in range(100):
            report_bug(f"<callback at {number:#x}>", ValueError(), log, Stats())
    assert len(records) == 10
