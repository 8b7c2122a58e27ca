"""What is told of the prefix cache, written apart from csrc/: nothing is counted, the tiers are looked into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from tokenspeed._core import Scheduler
from tokenspeed._core.scheduler import block_hashes
from tokenspeed.batch import CacheChange, CacheEvents

Key = tuple[bytes, tuple[int, ...]]
"""What a full block means: the tenant's salt and all tokens from the first one to the block's last."""

Entry = tuple[CacheChange, Key | None]
"""What has become of a block; None: of all."""

Held = TypeVar("Held")


class Log:
    """What has not been read yet of what became of blocks without a salt."""

    def __init__(self) -> None:
        self.tiers: list[Tier[object]] = []
        self.told: set[Key] = set()
        self.unread: list[Entry] = []

    def look(self, key: Key) -> None:
        """Something may have become of this block."""
        found = any(key in tier for tier in self.tiers)
        if key[0] or found == (key in self.told):
            return
        (self.told.add if found else self.told.remove)(key)
        self.unread.append((CacheChange.STORED if found else CacheChange.REMOVED, key))

    def dropped(self) -> None:
        if self.unread and not self.told:
            self.unread = [(CacheChange.CLEARED, None)]

    def take(self) -> list[Entry]:
        taken, self.unread = self.unread, []
        return taken


class Tier(dict[Key, Held]):
    """The blocks of one tier that can be found."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log
        log.tiers.append(self)  # type: ignore[arg-type]

    def __setitem__(self, key: Key, held: Held) -> None:
        super().__setitem__(key, held)
        self._log.look(key)

    def __delitem__(self, key: Key) -> None:
        super().__delitem__(key)
        self._log.look(key)

    def take(self, key: Key) -> Held | None:
        """As `pop` with None."""
        held = self.get(key)
        if held is not None:
            del self[key]
        return held


Told = tuple[CacheChange, int, int | None, tuple[int, ...]]
"""A record: what became of the block of this name, its parent's name and its own tokens where it is stored."""


class Names:
    """Blocks by the names that the compiled scheduler gives them: half of their hash."""

    def __init__(self, hash_key: bytes, block_size: int) -> None:
        self._hash_key, self._size = hash_key, block_size
        self._known: dict[Key, int] = {}

    def of(self, key: Key) -> int:
        if key not in self._known:
            salt, tokens = key
            digest = block_hashes(self._hash_key, salt, np.array(tokens, np.int32), self._size)[-1]
            self._known[key] = int.from_bytes(digest[:8], "little", signed=True)
        return self._known[key]

    def records(self, entries: Iterable[Entry]) -> list[Told]:
        """What the oracle tells, as the compiled scheduler says it."""
        return [self._record(change, key) for change, key in entries]

    def _record(self, change: CacheChange, key: Key | None) -> Told:
        if key is None:
            return change, 0, None, ()
        if change is CacheChange.REMOVED:
            return change, self.of(key), None, ()
        salt, tokens = key
        before = tokens[: -self._size]
        return change, self.of(key), self.of((salt, before)) if before else None, tokens[-self._size :]


class Reader:
    """Reads every record of a compiled scheduler. `live` are the blocks that it then takes for cached."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self.live: dict[int, tuple[int, ...]] = {}

    def read(self, events: CacheEvents) -> list[Told]:
        told: list[Told] = []
        tokens = np.frombuffer(events.token_ids, np.int32).reshape(-1, self._size).tolist()
        contents = iter(map(tuple, tokens))
        for name, parent, change, chained in events.entries():
            if change == CacheChange.STORED:
                assert name not in self.live, "a block is stored twice"
                self.live[name] = next(contents)
                told.append((CacheChange.STORED, name, parent if chained else None, self.live[name]))
            elif change == CacheChange.REMOVED:
                del self.live[name]
                told.append((CacheChange.REMOVED, name, None, ()))
            else:
                assert change == CacheChange.CLEARED
                self.live.clear()
                told.append((CacheChange.CLEARED, name, None, ()))
        assert next(contents, None) is None, "tokens of no block"
        return told


class LogReaders:
    """The logs of a compiled scheduler, from its beginning on, and of its oracle, read side by side."""

    def __init__(self, core: Scheduler, log: Log, hash_key: bytes, block_size: int) -> None:
        self._core, self._log = core, log
        self._names, self._reader = Names(hash_key, block_size), Reader(block_size)
        core.open_cache_log()

    def compare(self) -> Counter[str]:
        """Both tell the same, and its reader knows of the blocks that can be found. How much was told."""
        told = [record for events in self._core.take_cache_events() for record in self._reader.read(events)]
        expected = self._names.records(self._log.take())
        assert told == expected, (told, expected)
        findable = {key for tier in self._log.tiers for key in tier if not key[0]}
        assert set(self._reader.live) == set(map(self._names.of, findable))
        return Counter(f"blocks {change.name}" for change, *_ in told)
