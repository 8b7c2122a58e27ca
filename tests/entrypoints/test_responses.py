"""POST /v1/responses: what the `openai` client sees, whole and event by event."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, get_args

import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.entrypoints.served import Served, events, serving
from tests.entrypoints.test_tool_calls import CALL, OFFERED, qwen3, saying
from tests.text.parsers.cases import ALL
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.text.parsers.choose import TOOL_PARSERS

ROUTE = "/v1/responses"
TOOLS: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in OFFERED]
EVENT = pydantic.TypeAdapter[Any](ResponseStreamEvent)
ALSO = {"bytes", "name", "store"}
"""Fields that OpenAI's responses and events have, but not the types of every release of its client."""
TEXT = "response.output_text"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(template=qwen3(), max_model_len=8192, limits=Limits(keepalive_seconds=0.1)) as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "echo", "input": "Weather?", "max_output_tokens": 1000, **fields}


def checked(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream: numbered, each named by its line, each of a type that the client knows."""
    text = served.post(ROUTE, body(stream=True, **fields)).text
    told = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = pydantic.TypeAdapter(dict[str, Any]).validate_json(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        surplus(EVENT.validate_json(data.removeprefix("data: ")))
        told.append(event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    return told


def surplus(value: Any) -> None:
    """Fail where a model has been given a field that its type does not have."""
    if isinstance(value, pydantic.BaseModel):
        assert set(value.model_extra or {}) <= ALSO, (type(value).__name__, value.model_extra)
        for name in type(value).model_fields:
            surplus(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            surplus(item)


def kinds(told: list[dict[str, Any]]) -> list[str]:
    """The types of the events, repeated ones once."""
    names = [event["type"] for event in told]
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


def message(text: str, status: str = "completed", logprobs: Any = ()) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
    return {"type": "message", "status": status, "role": "assistant", "content": [part]}


def reasoning(text: str, status: str = "completed") -> dict[str, Any]:
    return {"type": "reasoning", "status": status, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def call(name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    return {"type": "function_call", "status": status, "name": name, "arguments": arguments}


def test_the_clients_union_of_events_is_the_one_that_is_checked_against() -> None:
    members = get_args(get_args(ResponseStreamEvent)[0])
    names = {get_args(member.model_fields["type"].annotation)[0] for member in members}
    assert {"response.created", "response.output_text.delta", "response.completed", "error"} <= names
    with pytest.raises(pydantic.ValidationError):
        EVENT.validate_python({"type": "response.created", "sequence_number": 0, "response": {}})


def test_reasoning_message_and_calls_come_in_order_with_every_event_of_each(served: Served) -> None:
    said = f"<think>\nLook outside.\n</think>\n\nOne moment.\n{CALL}\n{CALL}"
    with saying(served, said):
        told = checked(served, tools=TOOLS)
        whole = served.post(ROUTE, body(tools=TOOLS)).json()
    filled, opened = ["response.content_part.added"], "response.output_item.added"
    closed = ["response.content_part.done", "response.output_item.done"]
    asked = [opened, *(f"response.function_call_arguments.{end}" for end in ("delta", "done")), closed[1]]
    assert kinds(told) == [
        "response.created", "response.in_progress",
        opened, *filled, "response.reasoning_text.delta", "response.reasoning_text.done", *closed,
        opened, *filled, f"{TEXT}.delta", f"{TEXT}.done", *closed,
        *asked, *asked, "response.completed",
    ]  # fmt: skip
    final = told[-1]["response"]
    weather = call("get_weather", '{"city": "Paris"}')
    assert without_ids(final["output"]) == [reasoning("Look outside."), message("One moment."), weather, weather]
    assert without_ids(whole["output"]) == without_ids(final["output"])
    assert set(whole) == set(final) and whole["status"] == final["status"] == "completed"
    assert whole["usage"] == final["usage"]
    surplus(Response.model_validate(whole))


def test_deltas_add_up_and_every_event_names_its_item(served: Served) -> None:
    with saying(served, f"<think>hm</think>Yes 👋\n{CALL}"):
        told = checked(served, tools=TOOLS)
    output = told[-1]["response"]["output"]
    assert [item["id"].partition("_")[0] for item in output] == ["rs", "msg", "fc"]
    begun = {event["item"]["id"]: event["item"] for event in told if event["type"] == "response.output_item.added"}
    done = {event["item"]["id"]: event["item"] for event in told if event["type"] == "response.output_item.done"}
    assert list(begun) == list(done) == [item["id"] for item in output]
    assert list(done.values()) == output
    assert begun[output[2]["id"]]["call_id"] == output[2]["call_id"]
    for event in told:
        if "item_id" in event:
            assert output[event["output_index"]]["id"] == event["item_id"]
    texts = [item["content"][0]["text"] if "content" in item else item["arguments"] for item in output]
    sums = ["".join(e["delta"] for e in told if e.get("delta") and e["output_index"] == index) for index in range(3)]
    assert sums == texts == ["hm", "Yes 👋", '{"city": "Paris"}']


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_every_format_gives_the_same_items_whole_and_streamed(name: str) -> None:
    with serving(template=qwen3(), tool_call_parser=name, max_model_len=8192) as served:
        for case in (case for case in ALL if case.parser == name):
            with saying(served, case.text):
                output = checked(served, tools=TOOLS)[-1]["response"]["output"]
                whole = served.post(ROUTE, body(tools=TOOLS)).json()["output"]
            assert without_ids(output) == without_ids(whole), case.name
            calls = [(item["name"], item["arguments"]) for item in output if item["type"] == "function_call"]
            spoken = [item["content"][0]["text"] for item in output if item["type"] == "message"]
            assert (calls, "".join(spoken)) == (case.calls, case.content), case.name


def test_the_clients_own_stream_reads_it(served: Served, client: openai.OpenAI) -> None:
    with saying(served, f"Hello 👋\n{CALL}"):
        with client.responses.stream(model="echo", input="Weather?", tools=TOOLS, max_output_tokens=500) as stream:
            snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        plain = client.responses.create(model="echo", input="Weather?", tools=TOOLS, max_output_tokens=500)
    assert snapshots[-1] == "Hello 👋"
    assert final.output_text == plain.output_text == "Hello 👋"
    assert final.output[1].type == "function_call" and final.output[1].arguments == '{"city": "Paris"}'


def test_a_limit_ends_a_stream_with_completed_and_says_incomplete(served: Served) -> None:
    with saying(served, CALL):
        told = checked(served, tools=TOOLS, max_output_tokens=CALL.index("Par") + 3)
    final = told[-1]["response"]
    assert told[-1]["type"] == "response.completed"
    assert (final["status"], final["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert final["completed_at"] is None
    assert without_ids(final["output"]) == [call("get_weather", '{"city": "Par', "incomplete")]


def test_a_probe_of_one_token_works(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Hi"):
        probe = client.responses.create(model="echo", input="Hi", max_output_tokens=1)
        assert (probe.status, probe.output_text) == ("incomplete", "H")
        assert [event["type"] for event in checked(served, max_output_tokens=1)][-1] == "response.completed"


def test_an_answer_without_text_has_no_items(served: Served) -> None:
    with saying(served, ""):
        told = checked(served)
        whole = served.post(ROUTE, body()).json()
    assert kinds(told) == ["response.created", "response.in_progress", "response.completed"]
    assert told[-1]["response"]["output"] == whole["output"] == []


def test_usage_counts_cached_and_reasoning_tokens(served: Served) -> None:
    thought, spoken = "<think>hm</think>\n\n", "Yes"
    served.call(lambda: setattr(served.engine, "cached", 7))
    try:
        with saying(served, f"{thought}{spoken}"):
            whole = served.post(ROUTE, body()).json()["usage"]
            streamed = checked(served)[-1]["response"]["usage"]
            hidden = served.post(ROUTE, body(include_reasoning=False)).json()
        with saying(served, spoken):
            plain = served.post(ROUTE, body()).json()["usage"]
    finally:
        served.call(lambda: setattr(served.engine, "cached", 0))
    assert whole == streamed
    assert whole["input_tokens_details"]["cached_tokens"] == 7
    assert whole["output_tokens"] == len(thought) + len(spoken) + 1
    assert whole["output_tokens_details"]["reasoning_tokens"] == len(thought)
    assert whole["total_tokens"] == whole["input_tokens"] + whole["output_tokens"]
    assert without_ids(hidden["output"]) == [message("Yes")] and hidden["usage"] == whole
    assert plain["output_tokens_details"]["reasoning_tokens"] == 0


def test_log_probabilities_are_those_of_the_message(served: Served) -> None:
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    with saying(served, f"<think>hm</think>Yes\n{CALL}"):
        told = checked(served, tools=TOOLS, **wanted)
        whole = served.post(ROUTE, body(tools=TOOLS, **wanted)).json()
    part = told[-1]["response"]["output"][1]["content"][0]
    assert [entry["token"] for entry in part["logprobs"]] == ["Y", "e", "s"]
    assert part["logprobs"][0]["bytes"] == [89] and len(part["logprobs"][0]["top_logprobs"]) == 2
    deltas = [entry for event in told if event["type"] == f"{TEXT}.delta" for entry in event["logprobs"]]
    assert deltas == part["logprobs"] == whole["output"][1]["content"][0]["logprobs"]
    assert whole["top_logprobs"] == 2


def test_the_response_repeats_its_request(served: Served, client: openai.OpenAI) -> None:
    with saying(served, "Yes"):
        response = client.responses.create(
            model="echo", input="x", instructions="Be brief.", temperature=0.5, top_p=0.9, max_output_tokens=9,
            metadata={"a": "b"}, parallel_tool_calls=False, tools=TOOLS, tool_choice="none", user="me",
            reasoning={"effort": "low", "summary": "auto"}, text={"verbosity": "low"}, prompt_cache_key="key",
            truncation="disabled", service_tier="auto", safety_identifier="id", store=False,
            extra_body={"client_metadata": {}, "top_k": 3, "min_p": 0.1, "seed": 5, "stop": ["zz"], "priority": 1},
        )  # fmt: skip
    assert (response.instructions, response.temperature, response.top_p) == ("Be brief.", 0.5, 0.9)
    assert (response.metadata, response.parallel_tool_calls, response.tool_choice) == ({"a": "b"}, False, "none")
    assert [tool.type == "function" and tool.name for tool in response.tools] == [tool["name"] for tool in TOOLS]
    assert response.reasoning is not None and response.reasoning.effort == "low"
    assert response.prompt_cache_key == "key" and response.user == "me" and response.safety_identifier == "id"
    assert response.max_output_tokens == 9 and response.truncation == "disabled"
    asked = served.engine.submitted[-1]
    params = asked["params"]
    assert (params.top_k, params.min_p, params.seed, params.stop, asked["priority"]) == (3, 0.1, 5, ("zz",), 1)
    assert asked["key"] == "key"


def test_the_first_events_come_at_once_and_silence_is_filled_with_events(served: Served) -> None:
    served.call(served.engine.gate.clear)
    with saying(served, "Yes"), served.socket() as raw:
        data = b'{"model": "echo", "input": "x", "stream": true}'
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        read = b""
        while read.count(b"event: response.in_progress") < 3:
            read += raw.recv(65536)
        assert read.count(b"event: response.created") == 1
        served.call(served.engine.gate.set)
        while part := raw.recv(65536):
            read += part
    assert b"event: response.completed" in read


@pytest.mark.parametrize("knob", ["fail_after", "die_after"])
def test_a_failure_in_mid_stream_is_told_as_failed_and_a_whole_one_by_its_status(served: Served, knob: str) -> None:
    served.call(lambda: setattr(served.engine, knob, 2))
    try:
        with saying(served, "Yes, of course"):
            told = checked(served, store=True)
            whole = served.post(ROUTE, body())
    finally:
        served.call(lambda: setattr(served.engine, knob, None))
    final = told[-1]["response"]
    assert told[-1]["type"] == "response.failed"
    assert (final["status"], final["error"]["code"], final["usage"]) == ("failed", "server_error", None)
    assert without_ids(final["output"]) == [message("Ye", "incomplete")]
    assert served.get(f"{ROUTE}/{final['id']}").json() == final
    assert (whole.status, bool(whole.error["message"])) == (500 if knob == "fail_after" else 503, True)


def test_without_parallel_calls_only_the_first_one_is_told(served: Served) -> None:
    with saying(served, f"{CALL}\n{CALL}"):
        final = checked(served, tools=TOOLS, parallel_tool_calls=False)[-1]["response"]
    assert without_ids(final["output"]) == [call("get_weather", '{"city": "Paris"}')]
    assert final["status"] == "completed"


def test_a_model_without_parsers_speaks_in_one_message() -> None:
    with serving() as served:
        told = checked(served, input="ab", max_output_tokens=9)
        assert without_ids(told[-1]["response"]["output"]) == [message("user:ab", "incomplete")]


def test_a_client_that_leaves_aborts_its_response_stored_or_not(served: Served) -> None:
    served.call(served.engine.gate.clear)
    try:
        with served.socket() as raw:
            data = b'{"model": "echo", "input": "x", "stream": true, "store": true}'
            head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            read = b""
            while b"response.in_progress" not in read:
                read += raw.recv(65536)
            id = events(read.decode().partition("data: ")[2].join(["data: ", ""]).split("\n\n")[0])[0]["response"]["id"]
            assert served.get(f"{ROUTE}/{id}").json()["status"] == "in_progress"
        served.wait_until(lambda: not served.engine.streams)
    finally:
        served.call(served.engine.gate.set)
    end = time.monotonic() + 3
    while (status := served.get(f"{ROUTE}/{id}").json()["status"]) == "in_progress" and time.monotonic() < end:
        time.sleep(0.01)
    assert status == "cancelled"
