"""Chat templates: jinja2 in its immutable sandbox, with provenance for every character.

The rendered text equals what transformers renders; what comes back is a list of spans that say whether the
template wrote a stretch or the request did (see `provenance`). The template's literals are `Text` of the
template, the messages go in as `Text` of the request, and everything else that shows up in the output
(numbers, results of filters that lose the trail) counts as request text.

Bounded here: `range` (100,000 items), the length of any string that a template builds (16M characters),
multiplied lists, powers, recursion. Not bounded: the number of steps. Nested loops over `range` can run for
hours, and a thread cannot be stopped; whoever serves templates that he does not trust renders them in a
process that can be killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes

from tokenspeed.errors import CheckpointError, InvalidRequest
from tokenspeed.text.provenance import MARK, Text, concatenated, converted, from_template, origin, runs, text
from tokenspeed.text.sandbox import Sandbox, TemplateRefusal
from tokenspeed.text.spans import Span
from tokenspeed.text.written import json_text

DEFAULT, TOOL_USE = "default", "tool_use"
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
MAX_ERROR = 300

@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template takes a message that only calls tools: its content, and the arguments as text or as an object."""

    empty: str | None
    text_arguments: bool


CALL_STYLES = tuple(CallStyle(empty, text_arguments) for text_arguments in (False, True) for empty in (None, ""))
"""In the order in which they are tried. Null is OpenAI's, and the only one with which DeepSeek R1's template shows
calls; Llama 4's fails with it. DeepSeek V3.1's joins the arguments to text."""

PROBE_NAME = "probe_of_the_call_style"
PROBE: Sequence[Mapping[str, Any]] = (
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00000", "type": "function", "function": {"name": PROBE_NAME, "arguments": {"x": 1}}}
        ],
    },
)

END_OF_MESSAGE = "CONTINUE_FINAL_MESSAGE_TAG "
"""Put after a message that is to be continued, and found again by its origin: no request can write it.

transformers writes the same words, so a template that strips or measures the message sees the same.
"""

RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own operations can raise. Their messages may repeat the request, so only the type is told."""


class ChatTemplate:
    """A compiled chat template, or several by name: "tool_use" renders requests with tools, if there is one.

    `special_tokens` are the variables that hold tokens (`bos_token`, `eos_token` …): the template's text.
    `name` is what errors call the template's file. `knows_tools`: it looks at the tools of a request. Raises
    `CheckpointError` if it does not compile. Safe to use from several threads at once.
    """

    def __init__(
        self, source: str | Mapping[str, str], *, special_tokens: Mapping[str, str] | None = None, name: str
    ) -> None:
        sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        if not sources:
            raise CheckpointError(f"{name}: has no chat template")
        self.sources = sources
        self._templates = {key: _compiled(text_, name) for key, text_ in sources.items()}
        if DEFAULT not in self._templates and len(self._templates) > 1:
            raise CheckpointError(f"{name}: none of the chat templates {', '.join(sources)} is called {DEFAULT}")
        self._special_tokens = {key: from_template(value) for key, value in (special_tokens or {}).items()}
        self.knows_tools = TOOL_USE in sources or any(_reads_tools(text_) for text_ in sources.values())
        self._call_styles: dict[jinja2.Template, CallStyle] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[Span]:
        """The prompt of a conversation, as spans that join to the rendered text.

        All arguments are JSON-like and not changed; `kwargs` are further variables for the template. Arguments
        of tool calls may be objects; the template gets them as it takes them.
        `continue_final_message` ends the prompt inside the last message, so that the model goes on with it.
        Raises `InvalidRequest` naming the field: the template refuses the messages (`raise_exception`), does
        not fit them, or builds too much. The message repeats nothing that the request brought.
        """
        template = self._choose(tools)
        for key in kwargs:
            if key in ("messages", "self") or key in self._special_tokens or key in template.environment.globals:
                raise InvalidRequest(f"chat_template_kwargs must not set {key}", param="chat_template_kwargs")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        try:
            calls = any(message.get("tool_calls") for message in messages)
            style = self._call_style(template) if calls else CALL_STYLES[0]
            chat = [_message(message, style) for message in messages]
            if continue_final_message:
                _mark_end(chat)
            rendered = template.render(
                **self._special_tokens,
                **converted(kwargs),
                messages=chat,
                tools=None if tools is None else converted(tools),
                documents=None if documents is None else converted(documents),
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateRefusal as error:
            raise InvalidRequest(_short(error.message), param="messages") from error
        except jinja2.exceptions.SecurityError as error:
            raise InvalidRequest("the chat template does what the sandbox does not allow", param="messages") from error
        except jinja2.UndefinedError as error:
            raise InvalidRequest(f"the chat template fails: {_short(error.message)}", param="messages") from error
        except OverflowError as error:
            raise InvalidRequest("the chat template builds too much from these messages", param="messages") from error
        except RENDER_ERRORS as error:
            raise InvalidRequest(
                f"the chat template does not fit these messages ({type(error).__name__})", param="messages"
            ) from error
        prompt = rendered if isinstance(rendered, Text) else concatenated([rendered])
        if continue_final_message:
            prompt = _cut_at_end(prompt)
        return [Span(run, requested) for run, requested in runs(prompt)]

    def _call_style(self, template: jinja2.Template) -> CallStyle:
        """The first style in which a call is shown, or at least the message is; found by trying, once a template."""
        if template not in self._call_styles:
            tried = {style: self._probed(template, style) for style in CALL_STYLES}
            shown = [style for style, text_ in tried.items() if text_ is not None and PROBE_NAME in text_]
            rendered = [style for style, text_ in tried.items() if text_ is not None]
            self._call_styles[template] = [*shown, *rendered, *CALL_STYLES][0]
        return self._call_styles[template]

    def _probed(self, template: jinja2.Template, style: CallStyle) -> str | None:
        chat = [_message(message, style) for message in PROBE]
        try:
            return template.render(**self._special_tokens, messages=chat, tools=None, documents=None)
        except RENDER_ERRORS:
            return None

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        if tools is not None and TOOL_USE in self._templates:
            return self._templates[TOOL_USE]
        return self._templates.get(DEFAULT) or next(iter(self._templates.values()))


def _compiled(source: str, name: str) -> jinja2.Template:
    try:
        return Sandbox().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"{name}: chat template, line {error.lineno}: {error.message}") from error
    except (RecursionError, SyntaxError, ValueError) as error:
        raise CheckpointError(f"{name}: chat template does not compile ({type(error).__name__})") from error


def _reads_tools(source: str) -> bool:
    return any(name.name == "tools" and name.ctx == "load" for name in Sandbox().parse(source).find_all(nodes.Name))


def _message(message: Mapping[str, Any], style: CallStyle) -> dict[str, Any]:
    """One message as templates expect it: absent rather than null fields, reasoning under each of its names."""
    present = {key: value for key, value in message.items() if value is not None}
    if calls := message.get("tool_calls"):
        present["content"] = message.get("content") or style.empty
        if style.text_arguments:
            present["tool_calls"] = [_text_call(call) for call in calls]
    made: dict[str, Any] = converted(present)
    for field in REASONING_FIELDS:
        if field in made:
            return {"thinking": made[field], **made, "reasoning_content": made[field]}
    return made


def _text_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    if isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": json_text(function["arguments"])}}


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Put the mark after the text of the last message (the last text part, if it has parts)."""
    content = chat[-1].get("content") if chat else None
    mark = text(END_OF_MESSAGE, MARK * len(END_OF_MESSAGE))
    if isinstance(content, Text):
        chat[-1]["content"] = content + mark
        return
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), Text):
            part["text"] = part["text"] + mark
            return
    raise InvalidRequest(
        "continue_final_message needs a last message with text content", param="continue_final_message"
    )


def _cut_at_end(prompt: Text) -> Text:
    """The prompt up to the mark; without the blanks before it if the template stripped those after it."""
    source = origin(prompt)
    end = source.rfind(MARK) + 1
    start = len(source[:end].rstrip(MARK))
    found = str(prompt[start:end])
    if found == END_OF_MESSAGE:
        return prompt[:start]
    if found == END_OF_MESSAGE.strip():
        return prompt[:start].rstrip()
    raise InvalidRequest(
        "continue_final_message: the chat template does not keep the last message's text",
        param="continue_final_message",
    )


def _short(message: str | None) -> str:
    line = " ".join((message or "").split())
    return line if len(line) <= MAX_ERROR else line[:MAX_ERROR] + "…"
