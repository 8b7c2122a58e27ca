"""A chat as a turn of a conversation, and why the prefix cache does not find all of the turn before it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.schema_chat import Conversation
from tokenspeed.text.divergence import Fingerprint, message_after

log = logging.getLogger(__name__)

ASKED, EXPLAINED = "X-Explain-Cache", "X-Cache-Explanation"
"""The header of a request that wants to know, and that of the answer: JSON."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """What a conversation consists of, and how to compare it with another one."""

    messages: Sequence[Mapping[str, Any]]
    fingerprint: Fingerprint

    @classmethod
    def of(cls, talk: Conversation) -> ChatTurn:
        """The turn that asks for the answer to a conversation."""
        return cls(talk.messages, Fingerprint.of(talk.messages, talk.tool_use.tools, talk.template_kwargs))


async def begin_turn(
    request: web.Request, door: Door, turn: ChatTurn, stream: Stream, salt: str, session: str
) -> dict[str, str]:
    """Note an admitted turn for the next one. Gives the header that explains this one, if the request asks for it."""
    wanted = request.headers.get(ASKED) not in (None, "0", "false")
    headers: dict[str, str] = {}
    ids = stream.prompt_token_ids
    if wanted or log.isEnabledFor(logging.DEBUG):
        headers = await door.off_loop(4 * len(ids), _explained, door, turn, stream, salt, session)
    packed = await door.off_loop(4 * len(ids), array, "i", ids)
    door.turns.note(salt, session, packed, turn.fingerprint, stream.generated())
    return headers if wanted else {}


def _explained(door: Door, turn: ChatTurn, stream: Stream, salt: str, session: str) -> dict[str, str]:
    ids = stream.prompt_token_ids

    def message_behind(shared: int) -> int | None:
        return message_after(turn.messages, door.engine.tokenizer.decode(ids[:shared], skip_special_tokens=False))

    explanation = door.turns.explain(salt, session, ids, turn.fingerprint, message_behind)
    text = msgspec.json.encode(explanation).decode()
    log.debug("prefix cache: request %s: %s", stream.request_id, text)
    return {EXPLAINED: text}
