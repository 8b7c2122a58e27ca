"""The two tiers of the KV cache in plain Python: blocks are objects, contents are compared token by token.

Block numbers, places on the host and tickets do not exist here: they are the compiled scheduler's own choice.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from tests.core.oracle_log import Key, Log, Tier


@dataclass(eq=False)
class Block:
    """A block on the device that is not free."""

    key: Key | None = None  # set while the block is in the index
    holders: int = 1
    full: bool = False
    copying: bool = False


@dataclass(eq=False)
class Place:
    """A place on the host that is not free."""

    key: Key | None = None  # set while its content is in the index


@dataclass(eq=False)
class Copy:
    """A copy under way. `waiter` is who wants the block, and where in its prefix; None: nobody."""

    to_host: bool
    key: Key
    block: Block
    place: Place
    waiter: tuple[int, int] | None = None  # request id, position


class Cache:
    def __init__(self, num_blocks: int, num_places: int) -> None:
        self.num_blocks = self.free = num_blocks
        self.num_places = self.free_places = num_places
        self.log = Log()
        self.index: Tier[Block] = Tier(self.log)
        self.cached: OrderedDict[Key, Block] = OrderedDict()  # without a holder, least recently used first
        self.places: Tier[Place] = Tier(self.log)
        self.resting: OrderedDict[Key, Place] = OrderedDict()  # neither held nor being copied, likewise
        self.copies: list[Copy] = []
        self.gains = 0
        """Grows whenever an admission that failed for want of blocks might succeed now."""

    # --- the device ---

    def put_free(self) -> None:
        self.free += 1
        self.gains += 1

    def let_go(self, block: Block) -> None:
        block.holders -= 1
        if block.holders == 0:
            self.rest(block)

    def rest(self, block: Block) -> None:
        """It has lost its last holder."""
        if block.key is None:
            self.put_free()
        else:
            self.cached[block.key] = block
            self.gains += 1

    def take_free(self) -> Block:
        assert self.free > 0, "blocks that were counted are not there"
        self.free -= 1
        return Block()

    def take(self) -> Block | None:
        if self.free == 0 and self.cached:
            key, _ = self.cached.popitem(last=False)
            del self.index[key]
            return Block()
        return self.take_free() if self.free else None

    def hit(self, block: Block) -> Block:
        if block.holders == 0:
            assert block.key is not None
            del self.cached[block.key]
        block.holders += 1
        return block

    def seal(self, block: Block, key: Key) -> None:
        block.full = True
        if key not in self.index:
            block.key = key
            self.index[key] = block

    # --- both ---

    def withdraw(self, key: Key) -> None:
        """Nobody may build on this content any more, wherever it is."""
        block = self.index.take(key)
        if block is not None:
            block.key = None
            if self.cached.pop(key, None):
                self.put_free()
        place = self.places.take(key)
        if place is not None:
            place.key = None
            if self.resting.pop(key, None):
                self.put_free_place()

    def drop_cached(self) -> int:
        """Nothing is kept that nobody holds."""
        dropped = len(self.cached) + len(self.resting)
        while self.cached:
            key, _ = self.cached.popitem(last=False)
            del self.index[key]
            self.put_free()
        while self.resting:
            key, _ = self.resting.popitem(last=False)
            del self.places[key]
            self.put_free_place()
        self.log.dropped()
        return dropped

    def match(self, keys: list[Key]) -> tuple[list[Block | Place], bool]:
        """The longest prefix that both tiers hold together, and whether the block after it is on its way."""
        found: list[Block | Place] = []
        for key in keys:
            block, place = self.index.get(key), self.places.get(key)
            if block is not None and not block.copying:
                found.append(block)
            elif block is not None or (place is not None and key not in self.resting):
                return found, True
            elif place is not None:
                found.append(place)
            else:
                break
        return found, False

    # --- the host ---

    def put_free_place(self) -> None:
        self.free_places += 1

    def take_place(self) -> Place | None:
        if self.free_places == 0:
            if not self.resting:
                return None
            key, _ = self.resting.popitem(last=False)
            del self.places[key]
            return Place()
        self.free_places -= 1
        return Place()

    def hold(self, place: Place) -> Place:
        assert place.key is not None
        del self.resting[place.key]
        return place

    def put_back(self, place: Place) -> None:
        if place.key is None:
            self.put_free_place()
        else:
            self.resting[place.key] = place
            self.gains += 1

    # --- copies ---

    def begin_offload(self, key: Key, place: Place) -> Copy:
        """The least recently used block, whose key is given, goes to the host."""
        block = self.cached.pop(key)
        block.copying = True
        copy = Copy(True, key, block, place)
        self.copies.append(copy)
        return copy

    def begin_load(self, place: Place, block: Block, request_id: int, position: int) -> Copy:
        """`place` is held, `block` was free."""
        key = place.key
        assert key is not None and key not in self.index
        block.key, block.holders, block.copying = key, 0, True
        self.index[key] = block
        copy = Copy(False, key, block, place, (request_id, position))
        self.copies.append(copy)
        return copy

    def land(self, copy: Copy, *, failed: bool) -> bool:
        """Whether the content has arrived. A loaded block has one holder then; without a key it is room again."""
        self.copies.remove(copy)
        self.gains += 1
        block, place = copy.block, copy.place
        arrived = block.key is not None and not failed
        if copy.to_host and arrived and copy.key not in self.places:  # first, so that it can be found all the time
            place.key = copy.key
            self.places[copy.key] = place
        if block.key is not None and (copy.to_host or failed):
            del self.index[block.key]
            block.key = None
        if copy.to_host:
            self.put_free()
            self.put_back(place)
            return arrived
        if place.key is not None:
            del self.places[place.key]
        self.put_free_place()
        block.copying, block.full, block.holders = False, arrived, 1
        return arrived

    @property
    def coming_back(self) -> int:
        """Copies that make a block available when they end."""
        return sum(copy.to_host or copy.waiter is None for copy in self.copies)

    @property
    def offloads(self) -> int:
        return sum(copy.to_host for copy in self.copies)
