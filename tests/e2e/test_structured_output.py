"""Structured output over a real server: a random model writes what it must, hostile grammars hurt nobody."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, serving
from tests.text.templates import QWEN3
from tests.toy import toy_llama

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "Weather?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("structured")
    toy_llama(folder / "toy", seed=7, max_position_embeddings=4096)
    (folder / "toy" / "chat_template.jinja").write_text(QWEN3)
    flags = ["--model", str(folder / "toy"), "--dtype", "float32", "--num-threads", "1"]
    flags += ["--tool-call-parser", "hermes", "--reasoning-parser", "none"]
    with serving(folder / "log", *flags) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": "toy", "messages": MESSAGES, "max_tokens": 600, "seed": 3, "temperature": 0.8}
    return client.chat.completions.create(**(asked | fields))


def test_a_response_format_is_kept_streamed_or_not(client: openai.OpenAI) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    whole = chat(client, response_format=shape, n=2)
    for choice in whole.choices:
        value = json.loads(choice.message.content)
        assert value["city"] in ("Paris", "Bonn") and 1 <= value["days"] <= 9
        assert choice.finish_reason == "stop"
    streamed = chat(client, response_format=shape, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
    assert text == whole.choices[0].message.content


def test_completions_keep_a_regular_expression(client: openai.OpenAI) -> None:
    extra = {"structured_outputs": {"regex": "[0-9]{3}-[a-c]{2}"}}
    answer = client.completions.create(model="toy", prompt="x", max_tokens=50, extra_body=extra)
    number, _, letters = answer.choices[0].text.partition("-")
    assert number.isdigit() and len(number) == 3 and len(letters) == 2 and set(letters) <= set("abc")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_call_comes_whatever_the_model_is(client: openai.OpenAI, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    answer = chat(client, **fields).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (set(arguments) == {"city", "days"}) is (call.function.name == "get_weather")
    chunks = chat(client, stream=True, **fields)
    parts = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert parts[0].function.name == call.function.name
    assert json.loads("".join(part.function.arguments or "" for part in parts)) == arguments


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"oneOf": [{"type": "integer"}, {"type": "array", "items": schema}]}
    return schema


BAD: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": 'start ::= "a"'}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"$ref": "http://localhost/x"}}}, "structured_outputs.json"),
    ({"guided_json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "guided_json"),
    ({"structured_outputs": {"json": nested(40)}}, "structured_outputs.json"),
    ({"guided_json": {"enum": list(range(100_000))}}, "guided_json"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "foo"}}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_a_400_before_anything_is_sent_and_a_good_one_behind_it_is_served(
    client: openai.OpenAI, stream: bool
) -> None:
    canary = client.completions.create(model="toy", prompt="canary", max_tokens=8, temperature=0).choices[0].text
    for fields, param in BAD:
        for route in ("chat", "completions"):
            with pytest.raises(openai.BadRequestError) as refused:
                if route == "chat":
                    chat(client, stream=stream, extra_body=fields)
                else:
                    client.completions.create(model="toy", prompt="x", stream=stream, extra_body=fields)
            assert refused.value.param == param, (route, fields)
    assert chat(client, extra_body={"guided_choice": ["yes"]}).choices[0].message.content == "yes"
    after = client.completions.create(model="toy", prompt="canary", max_tokens=8, temperature=0).choices[0].text
    assert after == canary


def test_strict_tools_are_refused_where_their_schema_cannot_be_kept(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool: Any = {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match=r"parameters of f.*'not'") as refused:
        chat(client, tools=[tool])
    assert refused.value.param == "tools"


def test_the_process_that_compiles_may_die(server: Server, client: openai.OpenAI) -> None:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    workers = [pid for pid in children if "grammars.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert workers
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.2)
    for letter in "abc":
        wanted = letter * 2
        answer = client.completions.create(model="toy", prompt="x", max_tokens=5, extra_body={"guided_regex": wanted})
        assert answer.choices[0].text == wanted
