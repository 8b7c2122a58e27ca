"""Sessions in plain Python: which requests are turns of one, and which sessions fit in the tiers together."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.core.oracle_cache import Key

IDLE_SECONDS = 90.0
MOST_DISPLACED = 1024


@dataclass(eq=False)
class Session:
    name: int  # 0: recognised by its prompts alone
    blocks: int = 0
    active: int = 0
    resident: bool = False
    returned: bool = False
    idle_since: float = 0.0
    left: int = 0  # order in which sessions became idle, or lost their place
    anchors: list[Key] = field(default_factory=list)


class Sessions:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sessions: list[Session] = []
        self.chance_of_return = 1.0
        self.departures = 0
        self.num_displaced = 0

    def resident(self) -> list[Session]:
        return [session for session in self.sessions if session.resident]

    def find(self, name: int, prompt: list[Key]) -> Session | None:
        if name:
            return next((session for session in self.sessions if session.name == name), None)
        anchors = {key: session for session in self.sessions for key in session.anchors}
        return next((anchors[key] for key in reversed(prompt) if key in anchors), None)

    def arrive(self, name: int, prompt: list[Key], blocks: int) -> Session:
        """The session of a new request; `prompt` has the keys of its full blocks."""
        session = self.find(name, prompt)
        if session is None:
            session = Session(name)
            self.sessions.append(session)
        elif session.active == 0:
            if not session.returned:
                self.chance_of_return += (1 - self.chance_of_return) / 8
            session.returned = True
        comes_back = session.active == 0
        session.active += 1
        session.blocks = blocks if comes_back else max(blocks, session.blocks)
        self.make_room(session)
        if comes_back and session.resident and not self.fits(session):
            session.resident = False
        taken = {key for other in self.sessions if other is not session for key in other.anchors}
        session.anchors = [prompt[-back] for back in steps_back(len(prompt)) if prompt[-back] not in taken]
        return session

    def leave(self, session: Session, blocks: int, now: float) -> None:
        session.active -= 1
        if session.active == 0:
            session.blocks, session.idle_since = blocks, now
            self.make_room(session)
            self.note(session)

    def note(self, session: Session) -> None:
        """It has become idle or lost its place. Of those without a place only so many are remembered."""
        self.departures += 1
        session.left = self.departures
        displaced = [s for s in self.sessions if not s.active and not s.resident]
        if len(displaced) > MOST_DISPLACED:
            self.sessions.remove(min(displaced, key=lambda s: s.left))

    def fits(self, session: Session) -> bool:
        others = sum(other.blocks for other in self.resident() if other is not session)
        return others + min(session.blocks, self.capacity) <= self.capacity

    def make_room(self, grown: Session) -> None:
        while sum(session.blocks for session in self.resident()) > self.capacity:
            leaver = self.next_to_leave(grown)
            if leaver is None:
                return
            self.displace(leaver)

    def settle(self, session: Session, now: float, *, urgent: bool, overdue: bool = False) -> bool:
        while not self.fits(session):
            leaver = self.next_to_leave(session)
            if leaver is None and overdue:
                break
            if leaver is None:
                return False
            unlikely = not leaver.returned and self.chance_of_return < 0.5
            if not (urgent or unlikely or now - leaver.idle_since >= IDLE_SECONDS):
                return False
            self.displace(leaver)
        session.resident = True
        return True

    def displace(self, leaver: Session) -> None:
        if not leaver.returned:
            self.chance_of_return -= self.chance_of_return / 16
        leaver.resident = False
        self.note(leaver)
        self.num_displaced += 1

    def next_to_leave(self, stays: Session) -> Session | None:
        """An idle session: one that never came back where such ones seldom do, else the one that is idle longest."""
        others = (s for s in self.resident() if not s.active and s is not stays)
        idle = sorted(others, key=lambda s: s.left)
        fresh = [s for s in idle if not s.returned]
        if fresh and self.chance_of_return < 0.5:
            return fresh[0]
        returned = [s for s in idle if s.returned]
        return min(returned[:1] + fresh[:1], key=lambda s: s.idle_since, default=None)


def steps_back(size: int) -> list[int]:
    """How far from the end of `size` blocks a session is recognised: 1, 2, 3, 5, 9, ... within the last quarter."""
    near = [1, *(1 + (1 << i) for i in range(size.bit_length() + 1))]
    return [back for back in near if back <= size and 4 * (back - 1) <= size]
