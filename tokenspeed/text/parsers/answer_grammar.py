"""The grammar of a chat's answer: what the request asks for, in the way in which its model writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import structs

from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.formats import Format, as_format, either
from tokenspeed.text.parsers.call_grammars import CALL_FORMATS, Callable, CallFormat
from tokenspeed.text.parsers.choose import REASONING_PARSERS, AnswerFormat
from tokenspeed.text.parsers.reasoning import MARKERS, opened_by


@dataclass(frozen=True, slots=True)
class Calls:
    """The tools that may be called, with their schemas; those that are `strict`; and those of which one must be called.

    Without `parallel` there is one call at most, and so there is of a function that is `named`. `limited`: the model
    sees others besides, which must not be called.
    """

    schemas: Mapping[str, Mapping[str, Any]]
    strict: frozenset[str]
    demanded: bool
    named: str | None
    parallel: bool
    limited: bool = False


def answer_grammar(
    answers: AnswerFormat, asked: Grammar | None, calls: Calls | None, prompt_end: str
) -> Grammar | None:
    """None where any text will do. `prompt_end` is what the template wrote after the last message.

    Raises `InvalidRequest` for what cannot be joined.
    """
    thinking = _thinking(answers, prompt_end)
    marks = MARKERS if answers.reasoning is None else REASONING_PARSERS[answers.reasoning].marks
    if calls is None or answers.tools is None:
        return None if asked is None else structs.replace(asked, thinking=thinking, marks=marks)
    written = CALL_FORMATS[answers.tools]
    if calls.demanded:
        if asked is not None:
            raise InvalidRequest(f"{asked.field} has no effect where a call is demanded", param=asked.field)
        format = _demanded(written, calls)
    elif asked is not None:
        format = either([_calls(written, calls), _format(asked)])
    elif calls.strict or calls.limited:
        format = written.free(_tools(calls), parallel=calls.parallel)
    else:
        return None
    text = json.dumps(format, ensure_ascii=False)
    field = "tools" if asked is None else asked.field
    return Grammar("structural_tag", text, field, thinking=thinking, marks=marks)


def _thinking(answers: AnswerFormat, prompt_end: str) -> Literal["none", "opened", "allowed"]:
    """What thinking may come before the answer, as `ReasoningParser` reads it."""
    if answers.reasoning is None:
        return "none"
    family = REASONING_PARSERS[answers.reasoning]
    opened = opened_by(prompt_end, family.marks)
    if opened is None:
        return "opened" if family.assumed else "allowed"
    return "opened" if opened else "none"


def _demanded(written: CallFormat, calls: Calls) -> Format:
    tools = [tool for tool in _tools(calls) if calls.named in (None, tool.name)]
    return written.calls(tools, most=-1 if calls.parallel and calls.named is None else 1)


def _calls(written: CallFormat, calls: Calls) -> Format:
    return written.calls(_tools(calls), most=-1 if calls.parallel else 1)


def _tools(calls: Calls) -> list[Callable]:
    return [Callable(name, schema, name in calls.strict) for name, schema in calls.schemas.items()]


def _format(asked: Grammar) -> Format:
    try:
        return as_format(asked)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"{asked.field} is not valid JSON", param=asked.field) from None
