"""Bad requests of POST /v1/responses as data, in the manner of `corpus`: its own fields, and those shared with chat."""

from __future__ import annotations

from typing import Any

from tests.entrypoints.corpus import BAD_FIELDS, CHAT, IMAGE, Case

ROUTE = "/v1/responses"
HERE = (ROUTE,)


def items(*given: Any) -> dict[str, Any]:
    return {"input": list(given)}


def part(**fields: Any) -> dict[str, Any]:
    return items({"role": "user", "content": [fields]})


def reasoning(**fields: Any) -> dict[str, Any]:
    return items({"type": "reasoning", "id": "rs_1", **fields})


def tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "name": "f", **fields}]}


FINE_PART = {"type": "input_text", "text": "x"}

INPUT = [
    Case("input missing", HERE, {"input": ...}, "input"),
    Case("input null", HERE, {"input": None}, "input"),
    Case("input a number", HERE, {"input": 5}, "input"),
    Case("input an object", HERE, {"input": {"role": "user", "content": "x"}}, "input"),
    Case("input empty", HERE, {"input": []}, "input"),
    Case("input of strings", HERE, items("x"), "input[0]"),
    Case("input of null", HERE, items(None), "input[0]"),
    Case("too many items", HERE, items(*[{"role": "user", "content": "x"}] * 5000), "input"),
    Case("only items that are left out", HERE, items({"type": "web_search_call", "id": "ws_1"}), "input"),
    Case("input over the context", HERE, {"input": "x" * 600}, "input"),
    Case("input far over the context", HERE, {"input": "x " * 1_000_000}, "input"),
    Case("item of no type", HERE, items({}), "input[0].type"),
    Case("item unknown", HERE, items({"type": "hologram"}), "input[0].type"),
    Case("item type a number", HERE, items({"type": 5}), "input[0].type"),
    Case("second item bad", HERE, items({"role": "user", "content": "x"}, {"role": "user"}), "input[1].content"),
    Case("item id a number", HERE, items({"role": "user", "content": "x", "id": 5}), "input[0].id"),
    Case("role missing", HERE, items({"type": "message", "content": "x"}), "input[0].role"),
    Case("role unknown", HERE, items({"role": "root", "content": "x"}), "input[0].role"),
    Case("role tool", HERE, items({"role": "tool", "content": "x"}), "input[0].role"),
    Case("role with control text", HERE, items({"role": "<|turn|>", "content": "x"}), "input[0].role"),
    Case("content null", HERE, items({"role": "user", "content": None}), "input[0].content"),
    Case("content a number", HERE, items({"role": "user", "content": 5}), "input[0].content"),
    Case("content without parts", HERE, items({"role": "user", "content": []}), "input[0].content"),
    Case("parts too many", HERE, items({"role": "user", "content": [FINE_PART] * 1100}), "input[0].content"),
    Case("part a string", HERE, items({"role": "user", "content": ["x"]}), "input[0].content[0]"),
    Case("part unknown", HERE, part(type="hologram"), "input[0].content[0].type"),
    Case("part without text", HERE, part(type="input_text"), "input[0].content[0].text"),
    Case("part text a number", HERE, part(type="input_text", text=5), "input[0].content[0].text"),
    Case("image", HERE, part(type="input_image", image_url=IMAGE["image_url"]["url"]), "input[0].content[0].type"),
    Case("file", HERE, part(type="input_file", file_id="file_1"), "input[0].content[0].type"),
    Case("call without name", HERE, items({"type": "function_call", "arguments": "{}"}), "input[0].name"),
    Case("call name with spaces", HERE, items({"type": "function_call", "name": "a b"}), "input[0].name"),
    Case("call id a number", HERE, items({"type": "function_call", "name": "f", "call_id": 5}), "input[0].call_id"),
    Case("output id a number", HERE, items({"type": "function_call_output", "call_id": 5}), "input[0].call_id"),
    Case("output a number", HERE, items({"type": "function_call_output", "output": 5}), "input[0].output"),
    Case(
        "output an image",
        HERE,
        items({"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image"}]}),
        "input[0].output[0].type",
    ),
    Case("reasoning content a string", HERE, reasoning(content="x"), "input[0].content"),
    Case("reasoning part unknown", HERE, reasoning(content=[{"type": "x", "text": "y"}]), "input[0].content[0]"),
    Case("reasoning part null", HERE, reasoning(content=[None]), "input[0].content[0]"),
    Case("summary without text", HERE, reasoning(summary=[{"type": "summary_text"}]), "input[0].summary[0]"),
    Case("reference to nothing", HERE, items({"type": "item_reference", "id": "msg_1"}), "input[0].id"),
    Case("reference by a number", HERE, items({"type": "item_reference", "id": 5}), "input[0].id"),
    Case("previous response unknown", HERE, {"previous_response_id": "resp_1"}, "previous_response_id"),
    Case("previous response a number", HERE, {"previous_response_id": 5}, "previous_response_id"),
    Case("instructions a list", HERE, {"instructions": ["x"]}, "instructions"),
]

FIELDS = [
    Case("max_output_tokens 0", HERE, {"max_output_tokens": 0}, "max_output_tokens"),
    Case("max_output_tokens -1", HERE, {"max_output_tokens": -1}, "max_output_tokens"),
    Case("max_output_tokens 2^40", HERE, {"max_output_tokens": 2**40}, "max_output_tokens"),
    Case("max_output_tokens true", HERE, {"max_output_tokens": True}, "max_output_tokens"),
    Case("max_output_tokens a numeral", HERE, {"max_output_tokens": "8"}, "max_output_tokens"),
    Case("max_output_tokens over the context", HERE, {"max_output_tokens": 5000}, "input"),
    Case("min_tokens over the limit", HERE, {"min_tokens": 9}, "min_tokens"),
    Case("two choices", HERE, {"n": 2}, "n"),
    Case("n 0", HERE, {"n": 0}, "n"),
    Case("prompt_logprobs", HERE, {"prompt_logprobs": 1}, "prompt_logprobs"),
    Case("max_tokens", HERE, {"max_tokens": 5}, "max_tokens"),
    Case("max_completion_tokens", HERE, {"max_completion_tokens": 5}, "max_completion_tokens"),
    Case("logprobs", HERE, {"logprobs": True}, "logprobs"),
    Case("messages", HERE, {"messages": [{"role": "user", "content": "x"}]}, "messages"),
    Case("echo", HERE, {"echo": True}, "echo"),
    Case("instructions far over the context", HERE, {"instructions": " " * 1_000_000}, "instructions"),
    Case("return_token_ids", HERE, {"return_token_ids": True}, "return_token_ids"),
    Case("top_logprobs alone", HERE, {"top_logprobs": 2}, "top_logprobs"),
    Case("top_logprobs 100", HERE, {"top_logprobs": 100, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    Case("top_logprobs true", HERE, {"top_logprobs": True}, "top_logprobs"),
    Case("include a string", HERE, {"include": "message.output_text.logprobs"}, "include"),
    Case("include unknown", HERE, {"include": ["message.output_text.logprobs", "more"]}, "include[1]"),
    Case("include_reasoning 1", HERE, {"include_reasoning": 1}, "include_reasoning"),
    Case("store 1", HERE, {"store": 1}, "store"),
    Case("background", HERE, {"background": True}, "background"),
    Case("conversation", HERE, {"conversation": "conv_1"}, "conversation"),
    Case("prompt", HERE, {"prompt": {"id": "pmpt_1"}}, "prompt"),
    Case("moderation", HERE, {"moderation": {}}, "moderation"),
    Case("context_management", HERE, {"context_management": [{"type": "compaction"}]}, "context_management"),
    Case("truncation auto", HERE, {"truncation": "auto"}, "truncation"),
    Case("truncation true", HERE, {"truncation": True}, "truncation"),
    Case("metadata a list", HERE, {"metadata": []}, "metadata"),
    Case("metadata of numbers", HERE, {"metadata": {"a": 1}}, "metadata"),
    Case("metadata too much", HERE, {"metadata": {str(key): "x" for key in range(17)}}, "metadata"),
    Case("metadata long", HERE, {"metadata": {"a": "x" * 600}}, "metadata"),
    Case("reasoning a string", HERE, {"reasoning": "high"}, "reasoning"),
    Case("reasoning effort a number", HERE, {"reasoning": {"effort": 1}}, "reasoning.effort"),
    Case("text a string", HERE, {"text": "json"}, "text"),
    Case("text.format a string", HERE, {"text": {"format": "json"}}, "text.format"),
    Case("text.format unknown", HERE, {"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    Case("text.format type a number", HERE, {"text": {"format": {"type": 1}}}, "text.format.type"),
    Case("text.format without schema", HERE, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    Case(
        "text.format nested as in chat",
        HERE,
        {"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}},
        "text.format.schema",
    ),
    Case(
        "text.format beside guided_regex",
        HERE,
        {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
        "guided_regex",
    ),
    Case("text.verbosity a number", HERE, {"text": {"verbosity": 1}}, "text.verbosity"),
    Case("user a number", HERE, {"user": 5}, "user"),
    Case("max_tool_calls a string", HERE, {"max_tool_calls": "x"}, "max_tool_calls"),
    Case("tools without a place", HERE, tool(), "tools"),
    Case("tools an object", HERE, {"tools": {}}, "tools"),
    Case("tool of null", HERE, {"tools": [None]}, "tools[0]"),
    Case("tool of no type", HERE, {"tools": [{}]}, "tools[0].type"),
    Case("tool nested as in chat", HERE, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name"),
    Case("tool nameless", HERE, {"tools": [{"type": "function"}]}, "tools[0].name"),
    Case("tool parameters a list", HERE, tool(parameters=[]), "tools[0].parameters"),
    Case("tool parameters of type foo", HERE, tool(parameters={"type": "foo"}), "tools[0].parameters"),
    Case("tool_choice a number", HERE, {**tool(), "tool_choice": 1}, "tool_choice"),
    Case("tool_choice absent", HERE, {**tool(), "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
]

NOT_SHARED = {
    "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "n", "echo", "prompt_logprobs",
    "tools", "tool_choice", "store", "min_tokens", "continue_final_message", "response_format",
}  # fmt: skip
SHARED = [
    Case(case.name, HERE, case.changes, "input" if case.param == "messages" else case.param, case.status)
    for case in BAD_FIELDS
    if CHAT in case.routes and not NOT_SHARED & set(case.changes)
]

BAD_FIELDS_HERE = [*INPUT, *FIELDS, *SHARED]

FINE = [
    Case("nulls", HERE, {"temperature": None, "instructions": None, "tools": None, "text": None, "store": None}, None),
    Case("no tools", HERE, {"tools": [], "tool_choice": "none"}, None),
    Case("text format", HERE, {"text": {"format": {"type": "text"}, "verbosity": "low"}}, None),
    Case("schema", HERE, {"text": {"format": {"type": "json_schema", "name": "n", "schema": {}}}}, None),
    Case("hints", HERE, {"user": "u", "metadata": {"a": "b"}, "service_tier": "flex", "client_metadata": {}}, None),
    Case("not in the background", HERE, {"background": False, "truncation": "disabled", "conversation": None}, None),
    Case("unknown fields", HERE, {"flux": 1}, None),
    Case("edges", HERE, {"temperature": 0, "top_p": 1, "top_k": -1, "max_output_tokens": 1, "n": 1}, None),
    Case("empty text", HERE, {"input": ""}, None),
    Case("NUL in text", HERE, {"input": "a\0b"}, None),
    Case("control text in content", HERE, {"input": "<|turn|>system:"}, None),
    Case("developer", HERE, items({"role": "developer", "content": "x"}), None),
    Case("a refusal", HERE, items({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}), None),
    Case("assistant without parts", HERE, items({"role": "assistant", "content": []}), None),
    Case("orphan result", HERE, items({"type": "function_call_output", "output": "x"}), None),
    Case("a call and nothing more", HERE, items({"type": "function_call", "name": "f", "arguments": "{"}), None),
    Case("a result of parts", HERE, items({"type": "function_call_output", "output": [FINE_PART]}), None),
    Case("a result of nothing", HERE, items({"type": "function_call_output", "call_id": "1", "output": ""}), None),
]
