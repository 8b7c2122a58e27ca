"""From a checked conversation to what is asked of the engine: the same for every route that takes messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from msgspec import structs

from tokenspeed.engine.stream import Ending
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.schema_chat import ChatRequest, Conversation
from tokenspeed.entrypoints.schema_tools import ToolUse
from tokenspeed.entrypoints.turns import ChatTurn
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import SamplingParams
from tokenspeed.text.late_system import without_late_system
from tokenspeed.text.parsers import tool_prompt
from tokenspeed.text.parsers.answer_grammar import Calls, answer_grammar
from tokenspeed.text.parsers.choose import AnswerParser
from tokenspeed.text.spans import Span, template_end
from tokenspeed.text.written_calls import CallNotes, WrittenCalls


@dataclass(frozen=True, slots=True)
class Prepared:
    """`make_parser` makes what finds reasoning and tool calls in one answer, None if all of it is content.

    `make_ending` makes what ends an answer after its first call, None where further calls are wanted or none can come.
    """

    prompt: list[Span]
    turn: ChatTurn
    params: SamplingParams
    make_parser: Callable[[], AnswerParser] | None
    make_ending: Callable[[], Ending] | None


async def prepare(door: Door, chat: ChatRequest, size: int, tenant: str) -> Prepared:
    """Render a conversation that came in a body of `size` bytes. Raises `InvalidRequest` where that fails."""
    talk = chat.conversation
    prompt, turn = await door.off_loop(size, lambda: (render(door, talk, tenant), ChatTurn.of(talk)))
    use = chat.conversation.tool_use
    make_parser = door.answer_format.parser(use.schemas, template_end(prompt), parallel=use.parallel)
    params = chat.params
    if params.grammar is not None or use.demanded or use.strict or use.limited:
        end = template_end(prompt)
        grammar = await door.off_loop(size, answer_grammar, door.answer_format, params.grammar, _calls(use), end)
        params = structs.replace(params, grammar=grammar)
    if make_parser is not None:
        params = structs.replace(params, shown_special_ids=door.marker_ids(with_tools=use.schemas is not None))
    make_ending = None
    if make_parser is not None and use.schemas is not None and not use.parallel:
        make_ending = partial(_after_first_call, make_parser)
    if make_parser is not None and use.schemas is not None:
        make_parser = partial(_noted, make_parser, door.written_calls, tenant)
    return Prepared(prompt, turn, params, make_parser, make_ending)


def _calls(use: ToolUse) -> Calls | None:
    """The calls that an answer may have, None for none."""
    if use.schemas is None:
        return None
    return Calls(use.schemas, use.strict, use.demanded, use.named, use.parallel, limited=use.limited)


def _noted(make_parser: Callable[[], AnswerParser], calls: WrittenCalls, tenant: str) -> AnswerParser:
    parser = make_parser()
    parser.listen(CallNotes(calls, tenant))
    return parser


def _after_first_call(make_parser: Callable[[], AnswerParser]) -> Ending:
    parser = make_parser()

    def is_over(text: str) -> bool:
        parser.feed(text)
        return parser.over

    return is_over


def render(door: Door, talk: Conversation, tenant: str) -> list[Span]:
    """The prompt of a conversation by the model's chat template, calls as the model wrote them for this tenant."""
    template = door.engine.template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    messages, tools, answers = talk.messages, talk.tool_use.tools, door.answer_format
    if not door.takes_late_system:
        messages = without_late_system(messages)
    if tools is not None and answers.describes_tools and answers.tools is not None:
        messages = tool_prompt.describe(messages, tools, answers.tools)
    return template.render(
        door.written_calls.restored(messages, tenant),
        tools=tools,
        add_generation_prompt=talk.add_generation_prompt,
        continue_final_message=talk.continue_final_message,
        **talk.template_kwargs,
    )
