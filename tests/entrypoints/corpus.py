"""Bad requests as data: what is sent, what must come back.

`BAD_FIELDS` are changes to a valid body, tried on every route they name, streamed and not; `BAD_BODIES` are bytes;
`FINE` must be served. A case is (name, routes, changes, status, the param that the error names).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from tests.entrypoints.fake_engine import VOCAB_SIZE

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BOTH = (CHAT, COMPLETION)
ONLY_CHAT, ONLY_COMPLETION = (CHAT,), (COMPLETION,)


class Case(NamedTuple):
    name: str
    routes: tuple[str, ...]
    changes: dict[str, Any]
    param: str | None
    status: int = 400


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def called(calls: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


IMAGE = {"type": "image_url", "image_url": {"url": "http://192.0.2.1/secret.png"}}

MODEL_AND_PROMPT = [
    Case("model missing", BOTH, {"model": ...}, "model"),
    Case("model null", BOTH, {"model": None}, "model"),
    Case("model an integer", BOTH, {"model": 3}, "model"),
    Case("model unknown", BOTH, {"model": "gpt-unknown"}, "model", 404),
    Case("model a path", BOTH, {"model": "/etc/passwd"}, "model", 404),
    Case("model a url", BOTH, {"model": "http://192.0.2.1/model"}, "model", 404),
    Case("model long", BOTH, {"model": "m" * 100_000}, "model", 404),
    Case("messages missing", ONLY_CHAT, {"messages": ...}, "messages"),
    Case("messages null", ONLY_CHAT, {"messages": None}, "messages"),
    Case("messages empty", ONLY_CHAT, {"messages": []}, "messages"),
    Case("messages a string", ONLY_CHAT, {"messages": "hello"}, "messages"),
    Case("messages an object", ONLY_CHAT, {"messages": {"role": "user"}}, "messages"),
    Case("messages of strings", ONLY_CHAT, {"messages": ["hello"]}, "messages[0]"),
    Case("messages of null", ONLY_CHAT, {"messages": [None]}, "messages[0]"),
    Case("messages too many", ONLY_CHAT, {"messages": [{}] * 10_000}, "messages"),
    Case("messages far too many", ONLY_CHAT, {"messages": [{"role": "user", "content": "x"}] * 100_000}, "messages"),
    Case("role missing", ONLY_CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
    Case("role unknown", ONLY_CHAT, {"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
    Case("role an integer", ONLY_CHAT, {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    Case("role with control text", ONLY_CHAT, {"messages": [{"role": "<|turn|>", "content": "x"}]}, "messages[0].role"),
    Case("role function", ONLY_CHAT, {"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    Case("content missing", ONLY_CHAT, {"messages": [{"role": "assistant"}]}, "messages[0].content"),
    Case("content null", ONLY_CHAT, user(None), "messages[0].content"),
    Case("content a number", ONLY_CHAT, user(5), "messages[0].content"),
    Case("content an object", ONLY_CHAT, user({"type": "text", "text": "x"}), "messages[0].content"),
    Case("content without parts", ONLY_CHAT, user([]), "messages[0].content"),
    Case("part unknown", ONLY_CHAT, user([{"type": "hologram"}]), "messages[0].content[0].type"),
    Case("part without type", ONLY_CHAT, user([{"text": "x"}]), "messages[0].content[0].type"),
    Case("part without text", ONLY_CHAT, user([{"type": "text"}]), "messages[0].content[0].text"),
    Case("part text a number", ONLY_CHAT, user([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    Case("part a string", ONLY_CHAT, user(["x"]), "messages[0].content[0]"),
    Case("part null", ONLY_CHAT, user([None]), "messages[0].content[0]"),
    Case("parts too many", ONLY_CHAT, user([{"type": "text", "text": ""}] * 1100), "messages[0].content"),
    Case("image part", ONLY_CHAT, user([{"type": "text", "text": "x"}, IMAGE]), "messages[0].content[1].type"),
    Case("tool calls of a user", ONLY_CHAT, user("x", tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
    Case("tool calls not a list", ONLY_CHAT, called({"id": "1"}), "messages[0].tool_calls"),
    Case("tool call null", ONLY_CHAT, called([None]), "messages[0].tool_calls[0]"),
    Case("tool call without function", ONLY_CHAT, called([{"id": "1"}]), "messages[0].tool_calls[0].function"),
    Case("tool call of another type", ONLY_CHAT, called([{"type": "custom"}]), "messages[0].tool_calls[0].function"),
    Case(
        "tool call without name", ONLY_CHAT, called([{"function": {}}]), "messages[0].tool_calls[0].function.name"
    ),
    Case("tool calls too many", ONLY_CHAT, called([{"function": {"name": "f"}}] * 300), "messages[0].tool_calls"),
    Case(
        "tool_call_id a number",
        ONLY_CHAT,
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]},
        "messages[0].tool_call_id",
    ),
    Case("name a number", ONLY_CHAT, user("x", name=1), "messages[0].name"),
    Case(
        "second message bad", ONLY_CHAT, {"messages": [*user("x")["messages"], {"role": "user"}]}, "messages[1].content"
    ),
    Case("chat over the context", ONLY_CHAT, user("x" * 600), "messages"),
    Case("chat far over the context", ONLY_CHAT, user("x " * 1_000_000), "messages"),
    Case("prompt missing", ONLY_COMPLETION, {"prompt": ...}, "prompt"),
    Case("prompt null", ONLY_COMPLETION, {"prompt": None}, "prompt"),
    Case("prompt empty", ONLY_COMPLETION, {"prompt": ""}, "prompt"),
    Case("prompt empty list", ONLY_COMPLETION, {"prompt": []}, "prompt"),
    Case("prompt list of empty", ONLY_COMPLETION, {"prompt": [[]]}, "prompt"),
    Case("prompt list of empty text", ONLY_COMPLETION, {"prompt": ["x", ""]}, "prompt"),
    Case("prompt mixed", ONLY_COMPLETION, {"prompt": ["x", 1]}, "prompt"),
    Case("prompt mixed lists", ONLY_COMPLETION, {"prompt": [[1], 1]}, "prompt"),
    Case("prompt mixed text and lists", ONLY_COMPLETION, {"prompt": [[1], "x"]}, "prompt"),
    Case("prompt a number", ONLY_COMPLETION, {"prompt": 5}, "prompt"),
    Case("prompt an object", ONLY_COMPLETION, {"prompt": {}}, "prompt"),
    Case("prompt id -1", ONLY_COMPLETION, {"prompt": [1, -1]}, "prompt"),
    Case("prompt id vocabulary size", ONLY_COMPLETION, {"prompt": [VOCAB_SIZE]}, "prompt"),
    Case("prompt id 2^63", ONLY_COMPLETION, {"prompt": [2**63]}, "prompt"),
    Case("prompt id 2^70", ONLY_COMPLETION, {"prompt": [2**70]}, "prompt"),
    Case("prompt id 1.5", ONLY_COMPLETION, {"prompt": [1.5]}, "prompt"),
    Case("prompt id true", ONLY_COMPLETION, {"prompt": [True]}, "prompt"),
    Case("second prompt id bad", ONLY_COMPLETION, {"prompt": [[1], [2, VOCAB_SIZE]]}, "prompt"),
    Case("prompts too many", ONLY_COMPLETION, {"prompt": ["x"] * 200}, "prompt"),
    Case("ids over the context", ONLY_COMPLETION, {"prompt": [1] * 600}, "prompt"),
    Case("ids far over the context", ONLY_COMPLETION, {"prompt": [1] * 300_000}, "prompt"),
    Case("prompt over the context", ONLY_COMPLETION, {"prompt": "x" * 600}, "prompt"),
    Case("10 MB of spaces", ONLY_COMPLETION, {"prompt": " " * 10_000_000}, "prompt"),
    Case("second prompt over the context", ONLY_COMPLETION, {"prompt": ["x", "x" * 600]}, "prompt"),
]

SAMPLING = [
    Case("temperature -1", BOTH, {"temperature": -1}, "temperature"),
    Case("temperature hot", BOTH, {"temperature": "hot"}, "temperature"),
    Case("temperature true", BOTH, {"temperature": True}, "temperature"),
    Case("temperature a numeral", BOTH, {"temperature": "0.5"}, "temperature"),
    Case("temperature a list", BOTH, {"temperature": [1]}, "temperature"),
    Case("temperature 1e9", BOTH, {"temperature": 1e9}, "temperature"),
    Case("top_p 0", BOTH, {"top_p": 0}, "top_p"),
    Case("top_p 1.1", BOTH, {"top_p": 1.1}, "top_p"),
    Case("top_k -2", BOTH, {"top_k": -2}, "top_k"),
    Case("top_k 1.5", BOTH, {"top_k": 1.5}, "top_k"),
    Case("top_k false", BOTH, {"top_k": False}, "top_k"),
    Case("min_p 2", BOTH, {"min_p": 2}, "min_p"),
    Case("repetition_penalty 0", BOTH, {"repetition_penalty": 0}, "repetition_penalty"),
    Case("presence_penalty 3", BOTH, {"presence_penalty": 3}, "presence_penalty"),
    Case("frequency_penalty -3", BOTH, {"frequency_penalty": -3}, "frequency_penalty"),
    Case("max_tokens 0", BOTH, {"max_tokens": 0}, "max_tokens"),
    Case("max_tokens -1", BOTH, {"max_tokens": -1}, "max_tokens"),
    Case("max_tokens 2^40", BOTH, {"max_tokens": 2**40}, "max_tokens"),
    Case("max_tokens 1.5", BOTH, {"max_tokens": 1.5}, "max_tokens"),
    Case("max_tokens a numeral", BOTH, {"max_tokens": "8"}, "max_tokens"),
    Case("max_tokens over the context", ONLY_CHAT, {"max_tokens": 5000}, "messages"),
    Case("max_tokens over the context", ONLY_COMPLETION, {"max_tokens": 5000}, "prompt"),
    Case(
        "max_completion_tokens 0", ONLY_CHAT, {"max_completion_tokens": 0, "max_tokens": ...}, "max_completion_tokens"
    ),
    Case("two limits", ONLY_CHAT, {"max_completion_tokens": 5, "max_tokens": 6}, "max_tokens"),
    Case("min_tokens over max_tokens", BOTH, {"min_tokens": 9}, "min_tokens"),
    Case("min_tokens -1", BOTH, {"min_tokens": -1}, "min_tokens"),
    Case("n 0", BOTH, {"n": 0}, "n"),
    Case("n 10^9", BOTH, {"n": 10**9}, "n"),
    Case("n true", BOTH, {"n": True}, "n"),
    Case("too many choices", ONLY_COMPLETION, {"prompt": ["x"] * 100, "n": 100}, "n"),
    Case("logprobs -1", ONLY_COMPLETION, {"logprobs": -1}, "logprobs"),
    Case("logprobs 10^6", ONLY_COMPLETION, {"logprobs": 10**6}, "logprobs"),
    Case("logprobs true", ONLY_COMPLETION, {"logprobs": True}, "logprobs"),
    Case("logprobs 1", ONLY_CHAT, {"logprobs": 1}, "logprobs"),
    Case("top_logprobs without logprobs", ONLY_CHAT, {"top_logprobs": 2}, "top_logprobs"),
    Case("top_logprobs 100", ONLY_CHAT, {"logprobs": True, "top_logprobs": 100}, "top_logprobs"),
    Case("top_logprobs -1", ONLY_CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    Case("prompt_logprobs -1", BOTH, {"prompt_logprobs": -1}, "prompt_logprobs"),
    Case("prompt_logprobs 1000", BOTH, {"prompt_logprobs": 1000}, "prompt_logprobs"),
    Case("logit_bias outside", BOTH, {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    Case("logit_bias negative id", BOTH, {"logit_bias": {"-1": 1}}, "logit_bias"),
    Case("logit_bias huge id", BOTH, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
    Case("logit_bias abc", BOTH, {"logit_bias": {"abc": 1}}, "logit_bias"),
    Case("logit_bias 101", BOTH, {"logit_bias": {"1": 101}}, "logit_bias"),
    Case("logit_bias -101", BOTH, {"logit_bias": {"1": -101}}, "logit_bias"),
    Case("logit_bias true", BOTH, {"logit_bias": {"1": True}}, "logit_bias"),
    Case("logit_bias a list", BOTH, {"logit_bias": [1]}, "logit_bias"),
    Case("logit_bias too many", BOTH, {"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
    Case("seed 2^64", BOTH, {"seed": 2**64}, "seed"),
    Case("seed 0.5", BOTH, {"seed": 0.5}, "seed"),
    Case("stop of 1,000", BOTH, {"stop": ["x"] * 1000}, "stop"),
    Case("stop empty", BOTH, {"stop": ""}, "stop"),
    Case("stop with an empty one", BOTH, {"stop": ["x", ""]}, "stop"),
    Case("stop 1 MB", BOTH, {"stop": "x" * 1_000_000}, "stop"),
    Case("stop a number", BOTH, {"stop": 5}, "stop"),
    Case("stop of null", BOTH, {"stop": [None]}, "stop"),
    Case("stop_token_ids outside", BOTH, {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    Case("stop_token_ids of text", BOTH, {"stop_token_ids": ["x"]}, "stop_token_ids"),
    Case("stop_token_ids too many", BOTH, {"stop_token_ids": [1] * 5000}, "stop_token_ids"),
    Case("allowed_token_ids empty", BOTH, {"allowed_token_ids": []}, "allowed_token_ids"),
    Case("allowed_token_ids outside", BOTH, {"allowed_token_ids": [-1]}, "allowed_token_ids"),
    Case("all allowed banned", BOTH, {"allowed_token_ids": [1, 2], "logit_bias": {"1": -100, "2": -100}}, "logit_bias"),
    Case("bad_words of one string", BOTH, {"bad_words": "x"}, "bad_words"),
    Case("bad_words empty", BOTH, {"bad_words": [""]}, "bad_words"),
    Case("bad_words too many", BOTH, {"bad_words": ["x"] * 1000}, "bad_words"),
    Case("ignore_eos 1", BOTH, {"ignore_eos": 1}, "ignore_eos"),
    Case("skip_special_tokens text", BOTH, {"skip_special_tokens": "no"}, "skip_special_tokens"),
    Case("include_stop 0", BOTH, {"include_stop_str_in_output": 0}, "include_stop_str_in_output"),
    Case("echo a number", ONLY_COMPLETION, {"echo": 1}, "echo"),
    Case("echo in chat", ONLY_CHAT, {"echo": True}, "echo"),
]

DELIVERY = [
    Case("priority text", BOTH, {"priority": "high"}, "priority"),
    Case("priority 2^40", BOTH, {"priority": 2**40}, "priority"),
    Case("cache_salt a number", BOTH, {"cache_salt": 1}, "cache_salt"),
    Case("cache_salt long", BOTH, {"cache_salt": "x" * 1000}, "cache_salt"),
    Case("prompt_cache_key a number", BOTH, {"prompt_cache_key": 1}, "prompt_cache_key"),
    Case("prompt_cache_key long", BOTH, {"prompt_cache_key": "x" * 1000}, "prompt_cache_key"),
    Case("tps_floor negative", BOTH, {"tps_floor": -1}, "tps_floor"),
    Case("tps_floor text", BOTH, {"tps_floor": "70"}, "tps_floor"),
    Case("tps_floor true", BOTH, {"tps_floor": True}, "tps_floor"),
    Case("tps_floor a list", BOTH, {"tps_floor": [70]}, "tps_floor"),
    Case("request_id with CRLF", BOTH, {"request_id": "a\r\nSet-Cookie: b"}, "request_id"),
    Case("request_id empty", BOTH, {"request_id": ""}, "request_id"),
    Case("request_id long", BOTH, {"request_id": "x" * 1000}, "request_id"),
    Case("request_id not ASCII", BOTH, {"request_id": "ä"}, "request_id"),
    Case("return_token_ids 1", BOTH, {"return_token_ids": 1}, "return_token_ids"),
    Case("chat_template_kwargs a list", ONLY_CHAT, {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    Case("chat_template_kwargs deep", ONLY_CHAT, {"chat_template_kwargs": deep(100)}, "chat_template_kwargs"),
    Case(
        "chat_template_kwargs long", ONLY_CHAT, {"chat_template_kwargs": {"a": "x" * 100_000}}, "chat_template_kwargs"
    ),
    Case(
        "chat_template_kwargs with messages",
        ONLY_CHAT,
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
    ),
    Case("template refuses", ONLY_CHAT, {"chat_template_kwargs": {"fail": 1}}, "messages"),
    Case("continue without assistant", ONLY_CHAT, {"continue_final_message": True}, "continue_final_message"),
    Case(
        "continue and prompt",
        ONLY_CHAT,
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    Case("stream_options a list", BOTH, {"stream": True, "stream_options": []}, "stream_options"),
    Case(
        "include_usage 1",
        BOTH,
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
    ),
]

NOT_STREAMED = [
    Case("stream_options without stream", BOTH, {"stream_options": {"include_usage": True}}, "stream_options"),
    Case("stream text", BOTH, {"stream": "yes"}, "stream"),
    Case("stream 1", BOTH, {"stream": 1}, "stream"),
    Case("streamed prompt_logprobs", BOTH, {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
]

UNSUPPORTED = [
    Case("tools without a place", BOTH, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    Case("tools not a list", BOTH, {"tools": {"name": "f"}}, "tools"),
    Case("tool_choice named", BOTH, {"tool_choice": {"type": "function"}}, "tool_choice"),
    Case("functions", BOTH, {"functions": [{"name": "f"}]}, "functions"),
    Case("function_call", BOTH, {"function_call": "auto"}, "function_call"),
    Case("best_of", BOTH, {"best_of": 2}, "best_of"),
    Case("suffix", BOTH, {"suffix": "end"}, "suffix"),
    Case("modalities", BOTH, {"modalities": ["text", "audio"]}, "modalities"),
    Case("chat_template", BOTH, {"chat_template": "{{ x }}"}, "chat_template"),
    Case("store", BOTH, {"store": True}, "store"),
    Case("use_beam_search", BOTH, {"use_beam_search": True}, "use_beam_search"),
    Case(
        "continuous_usage_stats",
        BOTH,
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
]

SCHEMA = {"json_schema": {"name": "n", "schema": {"type": "object"}}}

GRAMMARS = [
    Case("response_format text", BOTH, {"response_format": "text"}, "response_format"),
    Case("response_format empty", BOTH, {"response_format": {}}, "response_format.type"),
    Case("response_format of no kind", BOTH, {"response_format": {"type": "xml"}}, "response_format.type"),
    Case(
        "response_format without a schema",
        BOTH,
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
    ),
    Case(
        "response_format with a list for a schema",
        BOTH,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
    ),
    Case(
        "response_format strict 1",
        BOTH,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}},
        "response_format.json_schema.strict",
    ),
    Case("structured_outputs empty", BOTH, {"structured_outputs": {}}, "structured_outputs"),
    Case("structured_outputs of two", BOTH, {"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    Case(
        "structured_outputs tag",
        BOTH,
        {"structured_outputs": {"structural_tag": {}}},
        "structured_outputs.structural_tag",
    ),
    Case("structured_outputs regex 1", BOTH, {"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
    Case("structured_outputs no regex", BOTH, {"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    Case("structured_outputs choice", BOTH, {"structured_outputs": {"choice": "a"}}, "structured_outputs.choice"),
    Case("guided_json a number", BOTH, {"guided_json": 5}, "guided_json"),
    Case("two grammars", BOTH, {"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
]

BAD_FIELDS = [*MODEL_AND_PROMPT, *SAMPLING, *DELIVERY, *UNSUPPORTED, *GRAMMARS]

FINE = [
    Case("nulls", BOTH, {"temperature": None, "stop": None, "n": None, "tools": None, "logit_bias": None}, None, 200),
    Case("no tools", BOTH, {"tools": [], "tool_choice": "none"}, None, 200),
    Case("tool_choice auto without tools", BOTH, {"tool_choice": "auto"}, None, 200),
    Case("text format", BOTH, {"response_format": {"type": "text"}}, None, 200),
    Case("object format", BOTH, {"response_format": {"type": "json_object"}}, None, 200),
    Case("schema format", BOTH, {"response_format": {"type": "json_schema", **SCHEMA}}, None, 200),
    Case("a choice", BOTH, {"structured_outputs": {"choice": ["a", "b"], "json_object": False}}, None, 200),
    Case("a schema as text", BOTH, {"guided_json": '{"type": "object"}'}, None, 200),
    Case("hints", BOTH, {"user": "u", "metadata": {}, "store": False, "prompt_cache_key": "k", "nvext": {}}, None, 200),
    Case("floor and session", BOTH, {"tps_floor": 70, "prompt_cache_key": "k" * 256}, None, 200),
    Case("no floor, no session", BOTH, {"tps_floor": 0, "prompt_cache_key": ""}, None, 200),
    Case("unknown fields", BOTH, {"flux": 1, "warp": deep(50)}, None, 200),
    Case("edges", BOTH, {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -(2**63)}, None, 200),
    Case("stop list", BOTH, {"stop": ["zz", "yy"]}, None, 200),
    Case("bias", BOTH, {"logit_bias": {"1": -100, "2": 100.0}}, None, 200),
    Case("extras", BOTH, {"min_tokens": 1, "ignore_eos": True, "bad_words": ["x"], "priority": -1}, None, 200),
    Case("NUL in text", ONLY_CHAT, user("a\0b"), None, 200),
    Case("NUL in text", ONLY_COMPLETION, {"prompt": "a\0b"}, None, 200),
    Case(
        "parts",
        ONLY_CHAT,
        user([{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "b"}]),
        None,
        200,
    ),
    Case("developer", ONLY_CHAT, {"messages": [{"role": "developer", "content": "x"}]}, None, 200),
    Case("tool result", ONLY_CHAT, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, None, 200),
    Case("orphan tool result", ONLY_CHAT, {"messages": [{"role": "tool"}]}, None, 200),
    Case("a call and nothing said", ONLY_CHAT, called([{"function": {"name": "f", "arguments": "{"}}]), None, 200),
    Case("no calls", ONLY_CHAT, user("x", tool_calls=[], audio=None), None, 200),
    Case("control text in content", ONLY_CHAT, user("<|turn|>system:"), None, 200),
    Case("max_completion_tokens", ONLY_CHAT, {"max_completion_tokens": 8, "max_tokens": ...}, None, 200),
    Case("no limit", ONLY_CHAT, {"max_tokens": ...}, None, 200),
    Case("lists of ids", ONLY_COMPLETION, {"prompt": [[1, 2], [3]]}, None, 200),
]

_CHAT_TEXT = json.dumps(
    {"model": "echo", "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}], "prompt": "hello"}
)
_OPEN = _CHAT_TEXT[:-1].encode()

BAD_BODIES: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("spaces", b"   "),
    ("truncated", _CHAT_TEXT[:-10].encode()),
    ("array", b"[]"),
    ("string", b'"hello"'),
    ("null", b"null"),
    ("number", b"5"),
    ("deep", _OPEN + b', "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep objects", _OPEN + b', "a": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
    ("NaN", _OPEN + b', "temperature": NaN}'),
    ("Infinity", _OPEN + b', "temperature": Infinity}'),
    ("-Infinity", _OPEN + b', "unknown": -Infinity}'),
    ("10^5 digits", _OPEN + b', "seed": ' + b"1" * 100_000 + b"}"),
    ("1e400", _OPEN + b', "temperature": 1e400}'),
    ("invalid UTF-8", _OPEN + b', "user": "\xff\xfe"}'),
    (
        "invalid UTF-8 in text",
        b'{"model": "echo", "prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}',
    ),
    ("overlong UTF-8", _OPEN + b', "user": "\xc0\x80"}'),
    (
        "lone surrogate",
        b'{"model": "echo", "prompt": "\\ud800 x", "messages": [{"role": "user", "content": "\\ud800 x"}]}',
    ),
    ("low surrogate", b'{"model": "echo", "prompt": "\\udc00", "messages": [{"role": "user", "content": "\\udc00"}]}'),
    ("garbage after", _CHAT_TEXT.encode() + b" x"),
    ("two objects", _CHAT_TEXT.encode() * 2),
    ("comment", _OPEN + b", /* */ }"),
    ("single quotes", b"{'model': 'echo'}"),
    ("trailing comma", _OPEN + b",}"),
    ("byte order mark", b"\xef\xbb\xbf" + _CHAT_TEXT.encode()),
    ("UTF-16", _CHAT_TEXT.encode("utf-16")),
]
