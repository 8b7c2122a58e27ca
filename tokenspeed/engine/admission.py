"""What a caller says about a request besides its tokens, and what the engine's refusal is to the caller."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from tokenspeed.engine.messages import Refused, Submit
from tokenspeed.errors import FloorNotKept, InvalidRequest, NoRoom, Overloaded, QueueFull, RequestError
from tokenspeed.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Terms:
    """How a request is admitted, as `Submit` has it."""

    salt: bytes
    priority: int
    session: int
    tps_floor: float | None

    @classmethod
    def checked(cls, *, cache_salt: str, priority: int, prompt_cache_key: str, tps_floor: float | None) -> Self:
        """Raise `InvalidRequest` naming the first of these that makes no sense."""
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequest(f"priority must fit a signed 32-bit integer, got {priority}", param="priority")
        check_floor(tps_floor)
        salt = _utf8("cache_salt", cache_salt)
        key = _utf8("prompt_cache_key", prompt_cache_key)
        return cls(salt, priority, _session(salt, key), None if tps_floor is None else float(tps_floor))

    def submits(
        self, ids: list[int], prompt: bytes, params: SamplingParams, seed: int, grammar: bytes
    ) -> list[Submit]:
        """One for each choice. Those of a seeded request differ, and each is reproducible by itself."""
        encoded = msgspec.Raw(msgspec.msgpack.encode(params))
        return [
            Submit(
                id=id,
                prompt=prompt,
                params=encoded,
                seed=(seed + index) % 2**63,
                salt=self.salt,
                priority=self.priority,
                session=self.session,
                tps_floor=self.tps_floor,
                grammar=grammar,
            )
            for index, id in enumerate(ids)
        ]


async def admit(
    send: Callable[[Submit], None], submits: Sequence[Submit], admitted: Sequence[asyncio.Future[None]]
) -> None:
    """Send these choices, and wait until the engine has queued each. Raises the first refusal."""
    for submit in submits:
        send(submit)
    for outcome in await asyncio.gather(*admitted, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def check_floor(tps_floor: float | None) -> None:
    """Raise `InvalidRequest` unless it is None or a finite number of at least 0."""
    if tps_floor is None:
        return
    number = isinstance(tps_floor, (int, float)) and not isinstance(tps_floor, bool)
    if not number or not 0 <= tps_floor < math.inf:
        raise InvalidRequest(f"tps_floor must be a number of at least 0, got {tps_floor!r}", param="tps_floor")


def _session(salt: bytes, key: bytes) -> int:
    """63 bits that stand for one key within one salt; 0, no session, for the empty key."""
    if not key:
        return 0
    digest = hashlib.blake2b(len(salt).to_bytes(8, "little") + salt + key, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is no valid Unicode", param=name) from error


_OVERLOADED: dict[str, tuple[type[Overloaded], str]] = {
    "QUEUE_FULL": (QueueFull, "too many requests are waiting; try again later"),
    "FLOOR": (
        FloorNotKept,
        "beside this request a promised floor of tokens per second could not be kept, its own or that of a running "
        "one; try again later or ask for a lower tps_floor",
    ),
    "NO_ROOM": (
        NoRoom,
        "the KV cache is full of sessions in use, and this one would have to wait too long; try again later",
    ),
}


def as_error(refused: Refused) -> RequestError:
    """What a refusal of the engine is to whoever asked; `code` is its reason in lower case where it may pass."""
    if refused.reason in _OVERLOADED:
        kind, message = _OVERLOADED[refused.reason]
        return kind(message, code=refused.reason.lower(), retry_after=refused.retry_after)
    match refused.reason:
        case "TOO_LONG_FOR_CACHE":
            return InvalidRequest("the prompt does not fit the server's KV cache", param="prompt")
        case "FLOOR_OUT_OF_REACH":
            return InvalidRequest(
                "not even alone does a request of this length reach the floor of tokens per second (its tps_floor, or "
                "the server's)",
                param="tps_floor",
            )
        case "NO_PROMISES":
            return InvalidRequest(
                "a server whose groups of ranks have requests of their own (--attn-dp-size) promises no floor",
                param="tps_floor",
            )
        case "INVALID":
            return InvalidRequest(f"the engine refused the request: {refused.detail}", param=refused.param)
        case reason:
            return InvalidRequest(f"the engine refused the request: {reason.lower()}", param="prompt")
