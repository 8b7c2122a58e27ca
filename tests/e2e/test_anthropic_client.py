"""The real `anthropic` client against a real server: a toy model behind a template with tools and thinking."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from tests.e2e.server import Server, serving
from tests.entrypoints.claude_code import TOOLS, first_turn, second_turn
from tests.text.templates import QWEN3
from tests.toy import VOCAB_SIZE, toy_llama

BLOCK = 16
ASK: dict[str, Any] = {
    "model": "toy",
    "max_tokens": 24,
    "system": [{"type": "text", "text": "You write small programs. " * 8, "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": "Reverse a list in Python."}],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("anthropic")
    toy_llama(folder / "toy", seed=5, max_position_embeddings=4096)
    template = Path(folder / "template.jinja")
    template.write_text(QWEN3)
    flags = ["--model", str(folder / "toy"), "--dtype", "float32", "--block-size", str(BLOCK), "--num-threads", "1"]
    with serving(folder / "log", *flags, "--chat-template", str(template), "--api-key", "key") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as it:
        yield it


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def asked(client: anthropic.Anthropic, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A greedy answer. The client's own arguments leave sampling out."""
    return client.messages.create(**{**ASK, **fields}, extra_body={"temperature": 0, **(extra or {})})


def test_a_message_is_the_same_whole_streamed_and_as_raw_events(client: anthropic.Anthropic) -> None:
    whole = asked(client)
    with client.messages.stream(**ASK, extra_body={"temperature": 0}) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert text_of(whole) == text_of(final) == "".join(pieces) != ""
    assert (whole.stop_reason, whole.type, whole.role, whole.model) == ("max_tokens", "message", "assistant", "toy")
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == whole.usage.output_tokens == 24
    kinds = [event.type for event in asked(client, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_tokens_from_the_cache_are_counted_apart_and_all_are_what_counting_says(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(**{key: value for key, value in ASK.items() if key != "max_tokens"})
    fresh = asked(client, {"cache_salt": "fresh"}).usage
    again = asked(client, {"cache_salt": "fresh"}).usage
    assert (fresh.input_tokens, fresh.cache_read_input_tokens) == (counted.input_tokens, 0)
    assert again.cache_read_input_tokens is not None
    assert again.cache_read_input_tokens >= counted.input_tokens - BLOCK
    assert again.input_tokens + again.cache_read_input_tokens == counted.input_tokens
    assert fresh.cache_creation_input_tokens == 0


def test_a_stop_sequence_is_named(client: anthropic.Anthropic) -> None:
    letter = text_of(asked(client))[5]
    stopped = asked(client, stop_sequences=[letter, "never written"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", letter)
    assert letter not in text_of(stopped)


def test_an_assistants_text_is_continued(client: anthropic.Anthropic) -> None:
    whole = text_of(asked(client))
    begun = {"role": "assistant", "content": [{"type": "text", "text": "Use slices: "}]}
    messages = [*ASK["messages"], begun]
    continued = asked(client, messages=messages)
    assert text_of(continued) != whole
    longer = client.messages.count_tokens(model="toy", system=ASK["system"], messages=messages)
    assert continued.usage.input_tokens + (continued.usage.cache_read_input_tokens or 0) == longer.input_tokens


def test_what_the_route_takes_is_taken_from_the_client(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(
        model="toy",
        max_tokens=8,
        system="Be brief.",
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "no such folder", "is_error": True},
                    {"type": "text", "text": "go on"},
                ],
            },
        ],
        tools=[*TOOLS, {"type": "web_search_20250305", "name": "web_search"}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
        metadata={"user_id": '{"session_id": "s1"}'},
        context_management={"edits": []},
        service_tier="auto",
        betas=["context-management-2025-06-27"],
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 20, "seed": 1, "min_p": 0.1, "priority": 1},
    )
    assert message.usage.output_tokens <= 8 and message.stop_reason in ("max_tokens", "end_turn")


def plain_ids(server: Server) -> list[int]:
    """Tokens of printable ASCII: whatever they make can be told to a client and comes back as it was."""
    found = []
    for id in range(VOCAB_SIZE):
        body = json.dumps({"tokens": [id]}).encode()
        headers = {"Content-Type": "application/json", "x-api-key": "key"}
        request = urllib.request.Request(f"{server.url}/detokenize", body, headers)
        text = json.loads(urllib.request.urlopen(request, timeout=10).read())["prompt"]
        if text.isascii() and text.isprintable() and "<" not in text:
            found.append(id)
    return found


def test_two_turns_of_claude_code_share_their_prefix(client: anthropic.Anthropic, server: Server) -> None:
    sampling = {"temperature": 0, "allowed_token_ids": plain_ids(server)}

    def turn(body: dict[str, Any]) -> Any:
        fields = {key: value for key, value in body.items() if key != "stream"}
        with client.beta.messages.stream(**fields, extra_body=sampling) as stream:
            return stream.get_final_message()

    first = turn(first_turn("toy", max_tokens=64))
    content = [block.to_dict() for block in first.content]
    second = turn(second_turn(content, "toy", max_tokens=8))
    seen = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert first.usage.output_tokens == 64
    assert second.usage.cache_read_input_tokens >= seen + 64 - BLOCK


def test_errors_arrive_as_the_clients_own_types(client: anthropic.Anthropic, server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.create(**{**ASK, "messages": [{"role": "user", "content": "long " * 4000}]})
    assert "prompt is too long: " in long.value.message and " tokens > 4096 maximum" in long.value.message
    with pytest.raises(anthropic.BadRequestError) as bad:
        asked(client, {"temperature": -1})
    assert "temperature" in bad.value.message and bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**ASK, "model": "claude-unknown"})
    with (
        anthropic.Anthropic(base_url=server.url, api_key="other", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError),
    ):
        stranger.messages.create(**ASK)
    with anthropic.Anthropic(base_url=server.url, auth_token="key", api_key=None, max_retries=0) as bearer:
        assert bearer.messages.create(**ASK).content


def test_a_limit_beyond_the_context_ends_with_it(client: anthropic.Anthropic) -> None:
    longest = {**ASK, "messages": [{"role": "user", "content": "word " * 1250}], "max_tokens": 4000}
    count = client.messages.count_tokens(model="toy", system=ASK["system"], messages=longest["messages"]).input_tokens
    assert 3900 < count < 4090
    with client.messages.stream(**longest, extra_body={"ignore_eos": True}) as stream:
        final = stream.get_final_message()
    assert final.stop_reason == "model_context_window_exceeded"
    assert final.usage.output_tokens == 4096 - count
