"""The formats of tool calls as grammars: what the parsers read, as the templates would have written it.

One entry a parser. A grammar of calls is made where a request demands them (tool_choice required, or a function by
name), and where a tool is strict: then text is free until a call begins, which must be one of the tools' as described.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed.text.grammars import formats
from tokenspeed.text.grammars.formats import (
    Format,
    either,
    json_schema,
    optional,
    separated,
    sequence,
    some,
    tag,
    text,
    whole,
)
from tokenspeed.text.parsers.llama3_json import PYTHON_TAG
from tokenspeed.text.parsers.mistral import ARGS, CALL_ID, CALLS, ID_CHARS
from tokenspeed.text.parsers.pythonic import TOKENS
from tokenspeed.text.parsers.schema_types import properties, types
from tokenspeed.text.parsers.sectioned import DEEPSEEK, KIMI_K2

_LINE_END = optional(text("\n"))
_MISTRAL_ID = formats.regex(f"[a-zA-Z0-9]{{{ID_CHARS}}}")


@dataclass(frozen=True, slots=True)
class Callable:
    """A tool that may be called. `strict`: what of its schema cannot be enforced is an error, else left out."""

    name: str
    schema: Mapping[str, Any]
    strict: bool

    @property
    def properties(self) -> dict[str, Any]:
        """The parameters' schemas by name; those that are required and not described are any."""
        return {**dict.fromkeys(self.required, True), **properties(self.schema)}

    @property
    def required(self) -> list[str]:
        """The names of the parameters that must be given."""
        listed = self.schema.get("required")
        return list(dict.fromkeys(name for name in listed if isinstance(name, str))) if isinstance(listed, list) else []

    def arguments(self) -> Format:
        """The arguments as JSON."""
        return json_schema({**self.schema, "type": "object"}, strict=self.strict, about=self.about)

    def value(self, name: str) -> Format:
        """One argument as JSON."""
        schema = self.properties[name]
        if isinstance(schema, dict):
            schema = {**{key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema}, **schema}
        return json_schema(schema, strict=self.strict, about=self.about)

    @property
    def about(self) -> str:
        """What an error message calls its schema."""
        return f"the parameters of {self.name}"


class CallFormat(ABC):
    """How a model writes calls: a run of them, `opening` and `closing` around it, a `separator` between."""

    opening = ""
    closing = ""
    separator = ""
    leads: tuple[str, ...] = ("\n", "\n\n")
    """What may stand before a run that is demanded, as models write it between the prompt or a thinking and a call."""
    stray: tuple[str, ...] = ()
    """Other spellings of the format that its parser reads too: no part of free text."""

    @abstractmethod
    def call(self, tool: Callable) -> tuple[str, Format, str]:
        """One call of a tool: its begin up to the arguments, the arguments, and its end."""

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        """What in free text begins calls."""
        return [self.opening] if self.opening else sorted({self.call(tool)[0] for tool in tools})

    def calls(self, tools: Sequence[Callable], *, most: int = -1) -> Format:
        """A run of at least one call; `most` is 1, or −1 for no limit."""
        lead = optional(either([text(each) for each in self.leads]))
        run = self._run(tools, most)
        return sequence(lead, text(self.opening), run, text(self.closing)) if self.opening else sequence(lead, run)

    def free(self, tools: Sequence[Callable], *, parallel: bool) -> Format:
        """Any text, in which a run of calls is as `calls` says; without `parallel` nothing follows the first call."""
        most = -1 if parallel else 1
        return {
            "type": "triggered_tags",
            "triggers": self.triggers(tools),
            "tags": self._tags(tools, most),
            "stop_after_first": not parallel,
            "excludes": list(self.stray),
        }

    def _run(self, tools: Sequence[Callable], most: int) -> Format:
        calls = [tag(*self.call(tool)) for tool in tools]
        if most == 1 or not self.separator:
            return either(calls) if most == 1 else some(either(calls), least=1)
        return separated(calls, self.separator)

    def _tags(self, tools: Sequence[Callable], most: int) -> list[Format]:
        if not self.opening:
            return [tag(*self.call(tool)) for tool in tools]
        return [tag(self.opening, self._run(tools, most), self.closing)]


class Hermes(CallFormat):
    """<tool_call>, an object with name and arguments, </tool_call>."""

    separator = "\n"

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        begin = f'<tool_call>\n{{"name": {_quoted(tool.name)}, "arguments": '
        return begin, tool.arguments(), "}\n</tool_call>"

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return ["<tool_call>"]


class Qwen3Coder(CallFormat):
    """Tags around bare values."""

    separator = "\n"
    stray = ("<function=",)

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        begin = f"<tool_call>\n<function={tool.name}>\n"
        parameters = [
            (optional if name not in tool.required else _as_it_is)(self._parameter(tool, name, schema))
            for name, schema in tool.properties.items()
        ]
        return begin, sequence(*parameters) if parameters else text(""), "</function>\n</tool_call>"

    @staticmethod
    def _parameter(tool: Callable, name: str, schema: Any) -> Format:
        return tag(f"<parameter={name}>\n", _bare(tool, name, schema), "\n</parameter>\n")

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return ["<tool_call>"]


class Glm45(CallFormat):
    """Tags around bare values, with line ends between in GLM 4.5 and without in later ones."""

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        arguments = [
            (optional if name not in tool.required else _as_it_is)(self._argument(tool, name, schema))
            for name, schema in tool.properties.items()
        ]
        return f"<tool_call>{tool.name}", sequence(_LINE_END, *arguments), "</tool_call>"

    @staticmethod
    def _argument(tool: Callable, name: str, schema: Any) -> Format:
        value = tag("<arg_value>", _bare(tool, name, schema), "</arg_value>")
        return sequence(text(f"<arg_key>{name}</arg_key>"), _LINE_END, value, _LINE_END)

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return ["<tool_call>"]

    def _run(self, tools: Sequence[Callable], most: int) -> Format:
        call = either([tag(*self.call(tool)) for tool in tools])
        return call if most == 1 else sequence(call, some(sequence(_LINE_END, call), least=0))


class Mistral(CallFormat):
    """A token before each call, one between name and arguments, and the id that some versions give."""

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        id = optional(sequence(text(CALL_ID), _MISTRAL_ID))
        return f"{CALLS}{tool.name}", sequence(id, text(ARGS), tool.arguments()), ""

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return [CALLS]


class MistralV3(CallFormat):
    """A token before a list of objects."""

    opening, closing = CALLS, "]"

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        id = optional(sequence(text(', "id": "'), _MISTRAL_ID, text('"')))
        return f'{{"name": {_quoted(tool.name)}, "arguments": ', sequence(tool.arguments(), id), "}"

    def _run(self, tools: Sequence[Callable], most: int) -> Format:
        calls = [tag(*self.call(tool)) for tool in tools]
        run = either(calls) if most == 1 else separated(calls, ", ")
        return sequence(optional(text(" ")), text("["), run)


class KimiK2(CallFormat):
    """A section of calls whose headers number them."""

    opening, closing = KIMI_K2.opening[0], KIMI_K2.closing[0]
    stray = (*KIMI_K2.opening[1:], KIMI_K2.begin)

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        header = sequence(formats.regex("[0-9]{1,3}"), text(KIMI_K2.inner[0]), tool.arguments())
        return f"{KIMI_K2.begin}functions.{tool.name}:", header, KIMI_K2.end


class DeepSeekV31(CallFormat):
    """A section of calls, name and bare arguments in each."""

    opening, closing = DEEPSEEK.opening[0], DEEPSEEK.closing[0]
    stray = (DEEPSEEK.begin,)

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        return f"{DEEPSEEK.begin}{tool.name}{DEEPSEEK.inner[0]}", tool.arguments(), DEEPSEEK.end


class DeepSeekV3(CallFormat):
    """A section of calls, name and arguments in a fenced block in each."""

    opening, closing, separator = DEEPSEEK.opening[0], DEEPSEEK.closing[0], "\n"
    stray = (DEEPSEEK.begin,)

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        begin = f"{DEEPSEEK.begin}function{DEEPSEEK.inner[0]}{tool.name}\n```json\n"
        return begin, tool.arguments(), f"\n```{DEEPSEEK.end}"


class Llama3Json(CallFormat):
    """Bare objects."""

    separator = "; "
    leads = (PYTHON_TAG, "\n", "\n\n")

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        return f'{{"name": {_quoted(tool.name)}, "parameters": ', tool.arguments(), "}"

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return [PYTHON_TAG, '{"name": ']

    def _tags(self, tools: Sequence[Callable], most: int) -> list[Format]:
        """Each call also behind the token that Llama writes before calls of its built-in tools."""
        calls = [self.call(tool) for tool in tools]
        return [tag(lead + begin, arguments, end) for lead in ("", PYTHON_TAG) for begin, arguments, end in calls]


class Pythonic(CallFormat):
    """A list of calls with keyword arguments, whose values are JSON: the parser reads both languages' words."""

    opening, closing, separator = "[", "]", ", "
    stray = TOKENS

    def call(self, tool: Callable) -> tuple[str, Format, str]:
        return f"{tool.name}(", _keywords(tool), ")"

    def triggers(self, tools: Sequence[Callable]) -> list[str]:
        return [f"[{tool.name}(" for tool in tools]

    def _tags(self, tools: Sequence[Callable], most: int) -> list[Format]:
        """A bracket alone begins no call, so the first one's name stands in the tag's begin."""
        more = []
        if most != 1:
            call = either([tag(*self.call(tool)) for tool in tools])
            more.append(some(sequence(text(self.separator), call), least=0))
        made = []
        for tool in tools:
            begin, keywords, end = self.call(tool)
            made.append(tag(f"[{begin}", sequence(keywords, text(end), *more), "]"))
        return made


CALL_FORMATS: Mapping[str, CallFormat] = {
    "deepseek_v3": DeepSeekV3(),
    "deepseek_v31": DeepSeekV31(),
    "glm45": Glm45(),
    "hermes": Hermes(),
    "kimi_k2": KimiK2(),
    "llama3_json": Llama3Json(),
    "mistral": Mistral(),
    "mistral_v3": MistralV3(),
    "pythonic": Pythonic(),
    "qwen3_coder": Qwen3Coder(),
}
"""By the names of the parsers."""


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _bare(tool: Callable, name: str, schema: Any) -> Format:
    """One value: bare text where it may be a string, as the parsers read it, JSON otherwise."""
    values = _values(schema)
    if values:
        return either([text(value) for value in values])
    kinds = types(schema)
    if kinds == {"string"} and isinstance(schema.get("pattern"), str):
        return formats.regex(whole(schema["pattern"]))
    if not kinds or "string" in kinds:
        return {"type": "any_text"}
    return tool.value(name)


def _keywords(tool: Callable) -> Format:
    """The arguments as NAME=VALUE, the required ones first, each in the order of the schema."""
    required = tool.required
    first = [sequence(text(f"{name}="), tool.value(name)) for name in required]
    others = [sequence(text(f"{name}="), tool.value(name)) for name in tool.properties if name not in required]
    if first:
        joined = [first[0], *(sequence(text(", "), each) for each in first[1:])]
        return sequence(*joined, *(optional(sequence(text(", "), each)) for each in others))
    starts = [
        sequence(each, *(optional(sequence(text(", "), later)) for later in others[at + 1 :]))
        for at, each in enumerate(others)
    ]
    return optional(either(starts)) if starts else text("")


def _values(schema: Any) -> list[str]:
    """The texts of an enum or a const, none where the schema has neither."""
    if not isinstance(schema, Mapping):
        return []
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]


def _as_it_is(format: Format) -> Format:
    return format
