"""TCP sessions: what each is like, how both ends know, and what is wrong with how it went."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import dataclass
from typing import Literal

from tests.soak.content import Content
from tests.soak.conversation import End, Part

HEADER = struct.Struct(">QQQBQ")
"""What a visitor says first: number, bytes up, bytes down, manner, bytes after which somebody leaves."""

LARGEST = 20_000_000
"""Bytes of one direction."""

SLOW_LARGEST = 1_000_000
"""Bytes that a slow reader is sent."""

DAWDLES = 3.0
"""Seconds that an end is silent before it says what it has to, at most."""

MANNERS = (
    "whole",
    "whole",
    "whole",
    "whole",
    "visitor reads slowly",
    "target reads slowly",
    "visitor listens first",
    "visitor dawdles",
    "target dawdles",
    "visitor leaves",
    "visitor resets",
    "target leaves",
    "target resets",
    "visitor says nothing",
)

Outcome = Literal["complete", "left", "cut", "unserved"]


def log_uniform(rng: random.Random, largest: int) -> int:
    """From 1 to `largest`, each order of magnitude as likely as any other."""
    return round(math.exp(rng.uniform(0, math.log(largest))))


@dataclass(frozen=True)
class Session:
    """What both ends of a session know of it."""

    number: int
    up: int
    down: int
    manner: str = "whole"
    leaves_after: int = 0

    @classmethod
    def random(cls, number: int, rng: random.Random) -> Session:
        """Any session."""
        manner = rng.choice(MANNERS)
        largest = SLOW_LARGEST if "slowly" in manner else LARGEST
        up, down = log_uniform(rng, largest), log_uniform(rng, largest)
        return cls(number, up, down, manner, rng.randrange(up + down))

    @classmethod
    def decode(cls, header: bytes) -> Session:
        """The session that a target is told of."""
        number, up, down, manner, leaves_after = HEADER.unpack(header)
        return cls(number, up, down, MANNERS[manner], leaves_after)

    def encode(self) -> bytes:
        """The header."""
        return HEADER.pack(self.number, self.up, self.down, MANNERS.index(self.manner), self.leaves_after)

    @property
    def is_whole(self) -> bool:
        """Whether both ends mean to stay to the end."""
        return not any(word in self.manner for word in ("leaves", "resets", "nothing"))

    def visitors_part(self) -> Part:
        return self._part("visitor", 2 * self.number, self.up, 2 * self.number + 1)

    def targets_part(self) -> Part:
        return self._part("target", 2 * self.number + 1, self.down, 2 * self.number)

    def _part(self, who: str, says: int, size: int, hears: int) -> Part:
        mine = self.manner.startswith(who)
        slow = mine and "slowly" in self.manner
        return Part(
            Content(says),
            size,
            Content(hears),
            leaves_after=self.leaves_after if mine and ("leaves" in self.manner or "resets" in self.manner) else None,
            leaves_by="reset" if "resets" in self.manner else "close",
            bite=4096 if slow else 1 << 18,
            pause=0.01 if slow else 0.0,
            listens_first=mine and "listens" in self.manner,
            delay=self.number % 100 / 100 * DAWDLES if mine and "dawdles" in self.manner else 0.0,
        )


def wrongs(session: Session, visitor: End, target: End | None) -> list[str]:
    """What must never be, fault or no fault."""
    found = _wrong_way(session, "down", target, visitor)
    return found + (_wrong_way(session, "up", visitor, target) if target else [])


def _wrong_way(session: Session, way: str, sender: End | None, receiver: End) -> list[str]:
    sent = sender.sent if sender else 0
    where = f"{session} {way}: {receiver.received} of {sent} bytes arrived"
    found = []
    if not receiver.is_right:
        found.append(f"{where}, not those that were sent")
    if receiver.received > sent:
        found.append(f"{where}, more than were sent")
    if receiver.heard == "stuck":
        found.append(f"{where}, and then nothing more")
    if receiver.heard == "end" and not (sender and sender.said_end and receiver.received == sent):
        found.append(f"{where}, and it looked whole")
    return found


def outcome(session: Session, visitor: End, target: End | None) -> Outcome:
    """How it went."""
    if target is None:
        return "left" if session.manner == "visitor says nothing" or visitor.has_left else "unserved"
    if all(end.heard == "end" and end.said_end for end in (visitor, target)):
        return "complete"
    return "left" if visitor.has_left or target.has_left else "cut"
