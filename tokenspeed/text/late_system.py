"""System messages in the midst of a conversation, for templates that take one at its begin only.

Agents put reminders there. Some templates refuse them; others move them to the begin, which changes the prompt from
there on with every reminder, so that nothing of it is found in the cache any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenspeed.errors import InvalidRequest
from tokenspeed.text.spans import Span

PARAGRAPH = "\n\n"

_FIRST, _QUESTION, _LATE = "probe of the first message", "probe of the question", "probe of a late message"
PROBE: Sequence[Mapping[str, Any]] = (
    {"role": "system", "content": _FIRST},
    {"role": "user", "content": _QUESTION},
    {"role": "system", "content": _LATE},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "y"},
)


class Template(Protocol):
    """The part of a chat template that is needed here."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> list[Span]:
        """The prompt of a conversation."""
        ...


def takes_late_system(template: Template) -> bool:
    """Whether the template writes a later system message where it stands; found by trying."""
    try:
        spans = template.render(PROBE, tools=None, add_generation_prompt=True, continue_final_message=False)
    except InvalidRequest:
        return False
    text = "".join(span.text for span in spans)
    return 0 <= text.find(_FIRST) < text.find(_QUESTION) < text.find(_LATE)


def without_late_system(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system messages at the begin as one, each later one as text of the user beside whom it stands."""
    made: list[dict[str, Any]] = []
    told = False  # the last message holds text of a system message
    for message in messages:
        role = message["role"]
        late = role == "system" and any(earlier["role"] != "system" for earlier in made)
        if late:
            role = "user"
        if made and made[-1]["role"] == role and (role == "system" or (role == "user" and (told or late))):
            content = PARAGRAPH.join(text for text in (made[-1]["content"], message["content"]) if text)
            made[-1] = {**made[-1], "content": content}
            told = True
        else:
            made.append({**message, "role": role} if late else message)
            told = late
    return made
