"""What the official Python clients can do against the real server: `python -m tests.scripted.features [FORMAT]`.

Prints a table of features × verdict, whole and streamed. The model is a scripted one that writes its calls in FORMAT
(hermes unless named). Exit status 1 if a feature does not work.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai

from tests.e2e.server import Server, serving

LONG = "one two three four five six seven eight nine ten"
ARGUMENTS = {"city": "Paris", "days": 3}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CALL = {"name": "get_weather", "arguments": ARGUMENTS}
SCENES: list[dict[str, Any]] = [
    {"when": "Greet", "turns": [{"text": "Hello, 你好 👋!"}]},
    {"when": "Think", "turns": [{"thinking": "Hm, what now?", "text": "Yes."}]},
    {"when": "Count", "turns": [{"text": LONG}]},
    {"when": "Demand", "turns": [{"calls": [CALL]}, {"text": "It rains."}]},
    {"when": "Two calls", "turns": [{"thinking": "2.", "text": "I look.", "calls": [CALL, CALL]}, {"text": "Rain."}]},
    {"when": "JSON", "turns": [{"text": json.dumps(ARGUMENTS)}]},
]
MODEL = "scripted"
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": SCHEMA}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS = [{"type": "function", **FUNCTION, "strict": False}]
TOOLS = [{"name": "get_weather", "description": "The weather of a city.", "input_schema": SCHEMA}]


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Clients:
    """Both clients, and whether they are to stream. Each method gives the whole answer, summed by the client itself."""

    openai: openai.OpenAI
    anthropic: anthropic.Anthropic
    streamed: bool

    def chat(self, messages: list[Any], **fields: Any) -> Any:
        if not self.streamed:
            return self.openai.chat.completions.create(model=MODEL, messages=messages, **fields)
        options = {"stream_options": {"include_usage": True}}
        with self.openai.chat.completions.stream(model=MODEL, messages=messages, **options, **fields) as stream:
            for _ in stream:
                pass
            return stream.get_final_completion()

    def completion(self, prompt: str, **fields: Any) -> Any:
        body: Any = self.openai.post("/../tokenize", cast_to=dict, body={"model": MODEL, "messages": user(prompt)})
        asked = {"model": MODEL, "prompt": body["tokens"], "stream": self.streamed, **fields}
        answer: Any = self.openai.completions.create(**asked)
        if not self.streamed:
            return answer.choices[0].text
        return "".join(chunk.choices[0].text for chunk in answer if chunk.choices)

    def response(self, input: Any, **fields: Any) -> Any:
        if not self.streamed:
            return self.openai.responses.create(model=MODEL, input=input, **fields)
        with self.openai.responses.stream(model=MODEL, input=input, **fields) as stream:
            for _ in stream:
                pass
            return stream.get_final_response()

    def message(self, messages: list[Any], **fields: Any) -> Any:
        asked = {"model": MODEL, "max_tokens": 400, "messages": messages, **fields}
        if not self.streamed:
            return self.anthropic.messages.create(**asked)
        with self.anthropic.messages.stream(**asked) as stream:
            return stream.get_final_message()


def check(what: Any, expected: Any) -> None:
    if what != expected:
        raise AssertionError(f"{what!r} is not {expected!r}")


def raises(kind: type[Exception], work: Callable[[], Any], word: str) -> None:
    try:
        work()
    except kind as error:
        if word not in str(error):
            raise AssertionError(f"{word!r} is not in {error}") from None
        return
    raise AssertionError(f"no {kind.__name__}")


# Chat and completions ----------------------------------------------------------------------------------------------


def chat_text(clients: Clients) -> None:
    answer = clients.chat(user("Greet"))
    check((answer.choices[0].message.content, answer.choices[0].finish_reason), ("Hello, 你好 👋!", "stop"))
    check(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)


def chat_reasoning(clients: Clients) -> None:
    message = clients.chat(user("Think")).choices[0].message
    check((message.reasoning_content.strip(), message.content), ("Hm, what now?", "Yes."))


def chat_calls(clients: Clients) -> None:
    talk = user("Two calls")
    message = clients.chat(talk, tools=CHAT_TOOLS).choices[0].message
    check([json.loads(call.function.arguments) for call in message.tool_calls], [ARGUMENTS, ARGUMENTS])
    check((message.content, len({call.id for call in message.tool_calls})), ("I look.", 2))
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    sent_back = message.model_dump(exclude_none=True)
    for call in sent_back["tool_calls"]:
        call["function"].pop("parsed_arguments", None)
    answer = clients.chat([*talk, sent_back, *results], tools=CHAT_TOOLS)
    check(answer.choices[0].message.content, "Rain.")
    if answer.usage.prompt_tokens_details.cached_tokens < 64:
        raise AssertionError("the second turn found nothing in the cache")


def chat_one_call(clients: Clients) -> None:
    choice = clients.chat(user("Two calls"), tools=CHAT_TOOLS, parallel_tool_calls=False).choices[0]
    check((len(choice.message.tool_calls), choice.finish_reason), (1, "tool_calls"))


def chat_demanded(clients: Clients) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        message = clients.chat(user("Demand"), tools=CHAT_TOOLS, tool_choice=choice).choices[0].message
        check([json.loads(call.function.arguments) for call in message.tool_calls], [ARGUMENTS])


def chat_strict(clients: Clients) -> None:
    tools = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
    check(len(clients.chat(user("Demand"), tools=tools).choices[0].message.tool_calls), 1)


def chat_no_call(clients: Clients) -> None:
    message = clients.chat(user("Demand"), tools=CHAT_TOOLS, tool_choice="none").choices[0].message
    check(message.tool_calls or None, None)


def chat_schema(clients: Clients) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}
    check(json.loads(clients.chat(user("JSON"), response_format=wanted).choices[0].message.content), ARGUMENTS)


def chat_limits(clients: Clients) -> None:
    try:
        check(clients.chat(user("Count"), max_completion_tokens=3).choices[0].finish_reason, "length")
    except openai.LengthFinishReasonError:  # how the client's own sum of a stream says it
        check(clients.streamed, True)
    stopped = clients.chat(user("Count"), stop=["six"]).choices[0]
    check(stopped.finish_reason, "stop")
    check(stopped.message.content, LONG[: LONG.index("six")])


def chat_choices(clients: Clients) -> None:
    check([choice.message.content for choice in clients.chat(user("Count"), n=3).choices], [LONG] * 3)


def completion(clients: Clients) -> None:
    check(clients.completion("Count", max_tokens=100), LONG)
    check(clients.completion("JSON", max_tokens=100, extra_body={"guided_json": SCHEMA}), json.dumps(ARGUMENTS))


def openai_errors(clients: Clients) -> None:
    raises(openai.NotFoundError, lambda: clients.openai.models.retrieve("other"), "does not exist")
    raises(openai.BadRequestError, lambda: clients.chat([]), "messages")
    raises(openai.BadRequestError, lambda: clients.chat(user("x " * 300_000)), "maximum context length")


# Responses ---------------------------------------------------------------------------------------------------------


def response_text(clients: Clients) -> None:
    answer = clients.response("Greet", instructions="Be kind.")
    check((answer.output_text, answer.status), ("Hello, 你好 👋!", "completed"))


def response_reasoning(clients: Clients) -> None:
    answer = clients.response("Think")
    check([item.type for item in answer.output], ["reasoning", "message"])
    check(answer.output[0].content[0].text.strip(), "Hm, what now?")


def response_calls(clients: Clients) -> None:
    answer = clients.response(user("Two calls"), tools=FLAT_TOOLS)
    calls = [item for item in answer.output if item.type == "function_call"]
    check([json.loads(call.arguments) for call in calls], [ARGUMENTS, ARGUMENTS])
    done = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"} for call in calls]
    history = [item.model_dump(exclude_none=True) for item in answer.output]
    for item in history:
        item.pop("parsed_arguments", None)
    check(clients.response([*user("Two calls"), *history, *done], tools=FLAT_TOOLS).output_text, "Rain.")


def response_stored(clients: Clients) -> None:
    first = clients.response("Demand", tools=FLAT_TOOLS, tool_choice="required", store=True)
    done = [{"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rain"}]
    check(clients.response(done, tools=FLAT_TOOLS, previous_response_id=first.id).output_text, "It rains.")
    check(clients.openai.responses.retrieve(first.id).status, "completed")
    clients.openai.responses.delete(first.id)
    raises(openai.NotFoundError, lambda: clients.openai.responses.retrieve(first.id), "")


def response_schema(clients: Clients) -> None:
    wanted = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    check(json.loads(clients.response("JSON", text=wanted).output_text), ARGUMENTS)


def response_limit(clients: Clients) -> None:
    answer = clients.response("Count", max_output_tokens=1)
    check((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))


# Messages ----------------------------------------------------------------------------------------------------------


def message_text(clients: Clients) -> None:
    system = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    answer = clients.message(user("Greet"), system=system)
    check((answer.content[0].text, answer.stop_reason), ("Hello, 你好 👋!", "end_turn"))


def message_thinking(clients: Clients) -> None:
    answer = clients.message(user("Think"), thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    check([block.type for block in answer.content], ["thinking", "text"])
    check(answer.content[0].thinking.strip(), "Hm, what now?")


def message_calls(clients: Clients) -> None:
    talk = user("Two calls")
    answer = clients.message(talk, tools=TOOLS)
    calls = [block for block in answer.content if block.type == "tool_use"]
    check(([call.input for call in calls], answer.stop_reason), ([ARGUMENTS, ARGUMENTS], "tool_use"))
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"} for call in calls]
    history = [{"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}]
    last = clients.message([*talk, *history, {"role": "user", "content": results}], tools=TOOLS)
    check(last.content[0].text, "Rain.")
    if last.usage.cache_read_input_tokens < 64:
        raise AssertionError("the second turn found nothing in the cache")


def message_demanded(clients: Clients) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        check(clients.message(user("Demand"), tools=TOOLS, tool_choice=choice).content[0].input, ARGUMENTS)


def message_limits(clients: Clients) -> None:
    stopped, cut = clients.message(user("Count"), stop_sequences=["six"]), clients.message(user("Count"), max_tokens=2)
    check((stopped.stop_reason, stopped.stop_sequence, cut.stop_reason), ("stop_sequence", "six", "max_tokens"))


def message_counted(clients: Clients) -> None:
    usage = clients.message(user("Greet")).usage
    counted = clients.anthropic.messages.count_tokens(model=MODEL, messages=user("Greet")).input_tokens
    check(usage.input_tokens + usage.cache_read_input_tokens, counted)


def anthropic_errors(clients: Clients) -> None:
    raises(anthropic.BadRequestError, lambda: clients.message(user("x " * 300_000)), "prompt is too long")
    raises(anthropic.BadRequestError, lambda: clients.message([]), "messages")


FEATURES: dict[str, Callable[[Clients], None]] = {
    "chat: text, usage": chat_text,
    "chat: reasoning": chat_reasoning,
    "chat: two calls, their results, the cache": chat_calls,
    "chat: parallel_tool_calls false": chat_one_call,
    "chat: tool_choice required, by name": chat_demanded,
    "chat: strict tools": chat_strict,
    "chat: tool_choice none": chat_no_call,
    "chat: response_format json_schema": chat_schema,
    "chat: token limit, stop strings": chat_limits,
    "chat: n": chat_choices,
    "completions: text, guided_json": completion,
    "openai: errors": openai_errors,
    "responses: text, instructions": response_text,
    "responses: reasoning items": response_reasoning,
    "responses: two calls, their outputs": response_calls,
    "responses: store, previous_response_id, delete": response_stored,
    "responses: text.format json_schema": response_schema,
    "responses: token limit": response_limit,
    "messages: text, system blocks": message_text,
    "messages: thinking": message_thinking,
    "messages: two tool_use, their results, the cache": message_calls,
    "messages: tool_choice any, tool": message_demanded,
    "messages: stop_sequences, token limit": message_limits,
    "messages: count_tokens": message_counted,
    "anthropic: errors": anthropic_errors,
}


def verdict(feature: Callable[[Clients], None], clients: Clients) -> str:
    """`ok`, or what went wrong in one line."""
    try:
        feature(clients)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return "ok"


def serving_script(folder: Path, call_format: str) -> contextlib.AbstractContextManager[Server]:
    """A server whose model knows `SCENES`."""
    script = folder / "script.json"
    script.write_text(json.dumps({"name": "features", "scenes": SCENES}))
    return serving(folder / "log", program=("tests.scripted.serve", str(script), call_format))


def table(server: Server) -> dict[str, tuple[str, str]]:
    """Feature → verdicts, whole and streamed."""
    chat = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    whole, streamed = (Clients(chat, messages, each) for each in (False, True))
    return {name: (verdict(feature, whole), verdict(feature, streamed)) for name, feature in FEATURES.items()}


def main() -> int:
    """Print the table; the return value is the exit status."""
    call_format = sys.argv[1] if len(sys.argv) > 1 else "hermes"
    with tempfile.TemporaryDirectory() as name, serving_script(Path(name), call_format) as server:
        verdicts = table(server)
    print(f"openai {openai.__version__}, anthropic {anthropic.__version__}, calls in {call_format}")
    print("| feature | whole | streamed |", "|---|---|---|", sep="\n")
    for feature, (whole, streamed) in verdicts.items():
        print(f"| {feature} | {whole} | {streamed} |")
    return any(verdict != "ok" for both in verdicts.values() for verdict in both)


if __name__ == "__main__":
    sys.exit(main())
