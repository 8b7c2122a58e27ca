"""The scripted model: it says what its script says, in every format, and the real engine serves it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.agents.run import SCRIPTS
from tests.agents.table import AGENTS, Agent, Model
from tests.e2e.server import serving
from tests.scripted.checkpoint import CALLS, write_checkpoint
from tests.scripted.executor import ScriptedModel
from tests.scripted.script import NO_SCENE, Reply, Scene, Script, ToolCall, Turn
from tests.text.parsers.reading import read
from tokenspeed.checkpoint.source import resolve
from tokenspeed.text.load import load_text
from tokenspeed.text.parsers.choose import AUTO, AnswerFormat
from tokenspeed.text.spans import Span

RUN = ToolCall("run", {"command": "ls"})
EDIT = ToolCall("edit", {"path": "$cwd/a.py", "old": "x = '1'", "new": 'x = "é"\n'})
SCRIPT = Script(
    "test",
    (
        Scene("title generator", (Reply("A title"),)),
        Scene("Fix it", (Reply("So:", (RUN, EDIT)), Reply("Done.")), {"cwd": r"in (\S+)"}),
    ),
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    for name, properties in {
        "run": {"command": {"type": "string"}},
        "edit": {"path": {"type": "string"}, "old": {"type": "string"}, "new": {"type": "string"}},
    }.items()
]
FILLED = {"path": "/work/a.py", "old": "x = '1'", "new": 'x = "é"\n'}


def test_a_scene_begins_where_it_matches_and_goes_on_with_each_answer() -> None:
    system, task = Turn("system", "You work in /work"), Turn("user", "Fix it.")
    example = [Turn("user", "An example"), Turn("assistant", "ok")]
    first, open_ = Turn("assistant", "So:"), Turn("assistant", "")
    assert SCRIPT.reply([system, *example, task, open_])[1].calls[1].arguments == FILLED
    assert SCRIPT.reply([system, task, first, Turn("tool", "out"), open_])[1].text == "Done."
    assert SCRIPT.reply([system, task, first, first, first, open_])[1].text == "Done.", "the last answer repeats"
    assert SCRIPT.reply([Turn("system", "You are a title generator"), task, open_])[1].text == "A title"
    assert SCRIPT.reply([system, open_])[1].text == NO_SCENE


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_every_agent_has_a_script_that_finds_what_its_answers_name_and_is_pointed_at_the_server(agent: Agent) -> None:
    for scene in Script.read(SCRIPTS / f"{agent.name}.json").scenes:
        known = dict.fromkeys(scene.finds, "found")
        assert scene.turns and "$" not in str([turn.filled(known) for turn in scene.turns])
    pointed = agent.pointed_at(Model("http://127.0.0.1:1", "its-name", 8192, 100))
    told = " ".join((*pointed.command, *pointed.env.values(), *pointed.files.values()))
    assert "http://127.0.0.1:1" in told and "its-name" in told
    assert not re.search(r"\{(url|model|context|output)\}", told)


@pytest.mark.parametrize("call_format", sorted(CALLS))
def test_what_it_writes_in_a_format_is_read_as_its_calls_and_rendered_again_the_same(
    tmp_path: Path, call_format: str
) -> None:
    (tmp_path / "script").write_text(json.dumps({"name": "x", "scenes": []}))
    write_checkpoint(tmp_path / "m", tmp_path / "script", call_format)
    text = load_text(resolve(str(tmp_path / "m"), "dummy"))
    assert text.template is not None
    chosen = AnswerFormat.of(text.template.sources.values(), text.template.knows_tools, AUTO, AUTO)
    assert chosen.tools == call_format
    asked = [{"role": "system", "content": "You work in /work"}, {"role": "user", "content": "Fix it."}]
    prompt = text.tokenizer.encode_spans(text.template.render(asked, add_generation_prompt=True))
    answer = ScriptedModel(SCRIPT, text).answer(prompt)
    written = text.tokenizer.decode(answer, skip_special_tokens=False).removesuffix("<|im_end|>")
    make = chosen.parser({tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}, "")
    assert make is not None
    seen = read(make(), [written])
    called = [(name, json.loads(arguments)) for name, arguments in seen.calls]
    assert called == [("run", {"command": "ls"}), ("edit", FILLED)]
    assert seen.content.strip() == "So:"
    calls = [
        {"id": f"functions.{name}:{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(called)
    ]
    history = [*asked, {"role": "assistant", "content": "So:", "tool_calls": calls}, {"role": "tool", "content": "out"}]
    spans: list[Span] = text.template.render(history, add_generation_prompt=True)
    assert text.tokenizer.encode_spans(spans)[: len(prompt + answer)] == prompt + answer


def test_an_agent_works_through_a_script_and_each_turn_finds_the_last_one_in_the_cache(tmp_path: Path) -> None:
    script = {
        "name": "loop",
        "scenes": [
            {
                "when": "Fix it",
                "turns": [
                    {
                        "thinking": "Look first.",
                        "text": "I look.",
                        "calls": [{"name": name, "arguments": FILLED} for name in ("edit", "edit")],
                    },
                    {"calls": [{"name": "run", "arguments": {"command": "python test.py"}}]},
                    {"text": "Fixed."},
                ],
            }
        ],
    }
    (tmp_path / "script.json").write_text(json.dumps(script))
    program = ("tests.scripted.serve", str(tmp_path / "script.json"), "kimi_k2")
    with serving(tmp_path / "log", "--block-size", "16", program=program) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages: list[Any] = [{"role": "user", "content": "Fix it. " + "And mind the style. " * 40}]
        before = 0
        for finish, thought, text, num_calls in (
            ("tool_calls", "Look first.", "I look.", 2),
            ("tool_calls", None, None, 1),
            ("stop", None, "Fixed.", 0),
        ):
            answer = client.chat.completions.create(model="scripted", messages=messages, tools=TOOLS)  # type: ignore[call-overload]
            message = answer.choices[0].message
            assert (answer.choices[0].finish_reason, message.content or None) == (finish, text)
            assert getattr(message, "reasoning_content", None) == thought
            calls = message.tool_calls or []
            assert len(calls) == num_calls
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert before - 16 <= cached <= before, "all whole blocks of the last prompt and its answer"
            before = answer.usage.prompt_tokens + answer.usage.completion_tokens
            messages.append(message.model_dump(exclude_none=True))
            messages += [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in calls]
