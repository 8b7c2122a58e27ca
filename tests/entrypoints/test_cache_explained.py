"""Why a turn shares less with the one before than it could, told to clients that ask and in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.served import Reply, Served, chat, serving
from tokenspeed.text.divergence import ANSWER, CHANGED, FIRST, WHOLE

CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}


def explanation(reply: Reply) -> dict[str, Any]:
    assert reply.status == 200, reply.text
    found: dict[str, Any] = json.loads(reply.headers["x-cache-explanation"])
    return found


def ask(served: Served, key: str, *messages: dict[str, str], **fields: Any) -> Reply:
    body = chat(messages=list(messages), prompt_cache_key=key, **fields)
    return served.post(CHAT, body, X_Explain_Cache="1")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as it:
        it.call(lambda: setattr(it.engine, "script", list(b"fine")))
        yield it


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_asks_is_told_what_a_turn_shares(served: Served, stream: bool) -> None:
    key = f"told-{stream}"
    assert explanation(ask(served, key, HELLO, stream=stream)) == {"shared": 0, "previous": 0, "reason": FIRST}
    kept = explanation(ask(served, key, HELLO, {"role": "assistant", "content": "fine"}, HELLO, stream=stream))
    size = len("?user:hello?assistant:fine")
    assert kept == {"shared": size, "previous": size + 1, "reason": WHOLE}


def test_an_answer_or_a_message_that_came_back_changed_is_named(served: Served) -> None:
    ask(served, "changed", HELLO)
    other = explanation(ask(served, "changed", HELLO, {"role": "assistant", "content": "fin"}, HELLO))
    assert (other["reason"], other["message"]) == (ANSWER, 1)
    hallo = explanation(ask(served, "changed", {"role": "user", "content": "hallo"}, HELLO))
    assert (hallo["reason"], hallo["message"], hallo["shared"]) == (CHANGED, 0, len("?user:h"))


def test_nobody_is_told_who_does_not_ask(served: Served) -> None:
    assert "x-cache-explanation" not in served.post(CHAT, chat()).headers
    assert "x-cache-explanation" not in served.post(CHAT, chat(), X_Explain_Cache="0").headers


def test_the_log_tells_it_at_debug_level_without_the_text(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as served, caplog.at_level(logging.DEBUG, "tokenspeed.entrypoints.turns"):
        served.post(CHAT, chat(messages=[{"role": "user", "content": "secret words"}]))
    lines = [record.getMessage() for record in caplog.records if record.name == "tokenspeed.entrypoints.turns"]
    assert len(lines) == 1 and FIRST in lines[0] and "secret" not in lines[0]
