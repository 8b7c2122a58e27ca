"""Masks of the tokens that a row may sample: known only once the step before has landed, so steps wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from tokenspeed.batch import Plan
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.interface import Binding, Mask

NO_SLOTS: tuple[int, ...] = ()


class MaskedSlots:
    """The slots of requests whose every token needs a mask, as of the last step that was launched."""

    def __init__(self) -> None:
        self._slots: set[int] = set()

    def launched(self, plan: Plan, bindings: Sequence[Binding]) -> tuple[int, ...]:
        """The slots of a step's samples that need a mask, in the order of its samples."""
        if plan.num_released and self._slots:
            self._slots.difference_update(plan.released.tolist())
        for slot, at in plan.bound.tolist() if plan.num_bound else ():
            (self._slots.add if bindings[at].masked else self._slots.discard)(slot)
        if not self._slots:
            return NO_SLOTS
        return tuple(slot for slot in plan.row_slot[plan.sample_rows].tolist() if slot in self._slots)


class AwaitedMasks:
    """The masks of one step, given by the thread that launches and awaited by another."""

    def __init__(self) -> None:
        self._given: Future[list[Mask]] = Future()

    def give(self, masks: Sequence[Mask]) -> None:
        """One for each sample that needs one, in their order. Once."""
        self._given.set_result(list(masks))

    def abandon(self) -> None:
        """None will come: whoever waits for them gets `InvariantBroken`."""
        if not self._given.done():
            self._given.set_exception(InvariantBroken("the executor was closed while a step waited for its masks"))

    def wait(self) -> list[Mask]:
        """The masks, as soon as they are there."""
        return self._given.result()


def checked(slots: Sequence[int], masks: Sequence[Mask]) -> Sequence[Mask]:
    """The masks of a step whose samples of `slots` need one."""
    if len(masks) != len(slots):
        raise InvariantBroken(f"{len(masks)} masks were given to a step that needs {len(slots)}")
    return masks


def num_words(vocab_size: int) -> int:
    """Words of 32 bits that hold a bit a token."""
    return -(-vocab_size // 32)
