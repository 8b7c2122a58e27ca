"""POST /v1/responses with a real model behind it: the `openai` client, and the traffic of Codex."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.e2e.server import Server, serving
from tests.e2e.test_serving import at_rest
from tests.entrypoints import codex
from tests.text.templates import QWEN3
from tests.toy import toy_llama

BLOCK = 16
EVENT = pydantic.TypeAdapter[Any](ResponseStreamEvent)
GREEDY: dict[str, Any] = {"model": "toy", "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("responses")
    toy_llama(folder / "toy", seed=5, max_position_embeddings=4096)
    (folder / "template").write_text(QWEN3)
    flags = ["--model", str(folder / "toy"), "--chat-template", str(folder / "template"), "--dtype", "float32"]
    with serving(folder / "log", *flags, "--block-size", str(BLOCK), "--num-threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def streamed(client: openai.OpenAI, **fields: Any) -> Response:
    """The last event's response; every event is of a type that the client knows, in one sequence."""
    told = list(client.responses.create(stream=True, **{**GREEDY, **fields}))
    assert [event.sequence_number for event in told] == list(range(len(told)))
    for event in told:
        EVENT.validate_python(event.to_dict(mode="json"))
    assert [event.type for event in told[:2]] == ["response.created", "response.in_progress"]
    last = told[-1]
    assert last.type == "response.completed"
    return last.response


def test_a_response_is_the_same_whole_and_streamed_and_the_same_text_as_chat(client: openai.OpenAI) -> None:
    whole = client.responses.create(**GREEDY, input="Reverse a list.", max_output_tokens=24)
    told = streamed(client, input="Reverse a list.", max_output_tokens=24)
    chat = client.chat.completions.create(
        **GREEDY, messages=[{"role": "user", "content": "Reverse a list."}], max_tokens=24
    )
    assert whole.output_text == told.output_text == chat.choices[0].message.content != ""
    assert whole.status == told.status == "incomplete" and whole.usage is not None and chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens and whole.usage.output_tokens == 24
    with client.responses.stream(**GREEDY, input="Reverse a list.", max_output_tokens=24) as stream:
        assert stream.get_final_response().output_text == whole.output_text


def test_codexs_second_turn_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    first = streamed(client, **from_codex(codex.OPENING), max_output_tokens=40)
    assert first.usage is not None
    items = [*codex.OPENING, *codex.answered([item.to_dict() for item in first.output], "README.md")]
    second = streamed(client, **from_codex([*items, codex.message("msg_d", "user", "And now?")]), max_output_tokens=4)
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - BLOCK
    again = streamed(client, **from_codex([*items, codex.message("msg_d", "user", "And now?")]), max_output_tokens=4)
    assert again.usage is not None and again.output_text == second.output_text
    assert again.usage.input_tokens_details.cached_tokens >= again.usage.input_tokens - BLOCK


def from_codex(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of Codex's request as the client takes them."""
    fields = codex.request(items)
    fields["extra_body"] = {"client_metadata": fields.pop("client_metadata")}
    del fields["stream"]
    return fields


def test_a_stored_conversation_goes_on_and_hits_the_cache(client: openai.OpenAI) -> None:
    first = client.responses.create(**GREEDY, input="Count to ten. " * 20, max_output_tokens=16, store=True)
    assert client.responses.retrieve(first.id) == first and first.usage is not None
    second = streamed(client, input="Further.", previous_response_id=first.id, store=True, max_output_tokens=8)
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens - BLOCK
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in listed] == ["message"] * 3
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    assert client.responses.retrieve(second.id).output_text == second.output_text


class Verdict(pydantic.BaseModel):
    passed: bool
    faults: int = pydantic.Field(ge=0, le=99)


def test_the_client_parses_what_a_format_of_the_text_made_the_model_say(client: openai.OpenAI) -> None:
    unthinking = {"chat_template_kwargs": {"enable_thinking": False}}
    parsed = client.responses.parse(
        **GREEDY, input="Did it pass?", text_format=Verdict, max_output_tokens=1500, extra_body=unthinking
    )
    assert parsed.status == "completed" and isinstance(parsed.output_parsed, Verdict)
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            **GREEDY, input="x", text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "foo"}}}
        )
    assert str(refused.value.param).startswith("text.format")


def test_cancelling_a_running_response_frees_what_it_held(server: Server, client: openai.OpenAI) -> None:
    ends: list[Any] = []
    ids: list[str] = []

    def follow() -> None:
        stream = client.responses.create(
            **GREEDY, input="x", stream=True, store=True, max_output_tokens=3500, extra_body={"ignore_eos": True}
        )
        for event in stream:
            if event.type == "response.created":
                ids.append(event.response.id)
            ends[:] = [event]

    reader = threading.Thread(target=follow)
    reader.start()
    end = time.monotonic() + 20
    while not ids and time.monotonic() < end:
        time.sleep(0.01)
    assert client.responses.retrieve(ids[0]).status == "in_progress"
    cancelled = client.responses.cancel(ids[0])
    reader.join(20)
    assert cancelled.status == client.responses.retrieve(ids[0]).status == "cancelled"
    assert (ends[0].type, ends[0].response.status) == ("response.incomplete", "cancelled")
    assert cancelled.usage is not None and cancelled.usage.output_tokens < 3500
    asyncio.run(at_rest(server))


def test_errors_arrive_as_the_clients_own_types(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**GREEDY, input="long " * 5000, stream=stream)
        assert (refused.value.code, refused.value.type) == ("context_length_exceeded", "invalid_request_error")
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="other", input="x", stream=stream)
        assert refused.value.param == "input"


def test_log_probabilities_come_with_the_text(server: Server, client: openai.OpenAI) -> None:
    letters = client.post(f"{server.url}/tokenize", cast_to=object, body={"prompt": "a b c d e f g"})
    wanted: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    only = {"allowed_token_ids": letters["tokens"]}  # type: ignore[index]
    told = streamed(client, input="Say something.", max_output_tokens=12, extra_body=only, **wanted)
    part = told.output[0].content[0]  # type: ignore[union-attr,index]
    assert part.type == "output_text" and part.logprobs
    assert "".join(entry.token for entry in part.logprobs) == part.text and len(part.logprobs) == 12
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in part.logprobs)
