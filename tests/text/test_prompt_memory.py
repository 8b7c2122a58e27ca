"""A prompt's ids are those of encoding it whole, except for what was generated: that comes back as it was."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from tests.text.conftest import TEXTS
from tests.text.templates import ALL, TOKENS, call, joined
from tokenspeed.errors import InvalidRequest
from tokenspeed.text.prompt_memory import PromptMemory, common_prefix
from tokenspeed.text.spans import Span
from tokenspeed.text.template import ChatTemplate
from tokenspeed.text.tokenizer import Tokenizer

PIECES = [*TEXTS, "<|im_end|>", "<|im_start|>x", "<think>", "</think>\n", "WORD", "<mask>", " <tail> ", "\n", " a"]


def template(name: str) -> ChatTemplate:
    return ChatTemplate(ALL[name], special_tokens=TOKENS, name=name)


def words(source: random.Random) -> str:
    return "".join(source.choices(PIECES, k=source.randrange(1, 5)))


def turn(source: random.Random, number: int) -> list[dict[str, Any]]:
    """What one turn of an agent adds to a conversation."""
    if number % 3 == 1:
        calls = [call(f"tool{index}", {"path": words(source), "n": index}) for index in range(source.randrange(1, 3))]
        asking = {"role": "assistant", "content": source.choice([None, words(source)]), "tool_calls": calls}
        if source.random() < 0.5:
            asking["reasoning_content"] = words(source)
        answers = [{"role": "tool", "tool_call_id": made["id"], "content": words(source)} for made in calls]
        return [asking, *answers]
    return [{"role": "assistant", "content": words(source)}, {"role": "user", "content": words(source)}]


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_conversation_that_grows_has_the_ids_of_encoding_it_whole(any_tokenizer: Tokenizer, name: str) -> None:
    source = random.Random(name)
    shape = template(name)
    tools = [{"type": "function", "function": {"name": "tool0", "parameters": {"type": "object", "properties": {}}}}]
    memory = PromptMemory(any_tokenizer)
    compared = 0
    for _ in range(2):
        messages: list[dict[str, Any]] = [{"role": "system", "content": words(source)}]
        messages += [{"role": "user", "content": words(source)}]
        for number in range(5):
            for given in (None, tools):
                try:
                    spans = shape.render(messages, tools=given)
                except InvalidRequest:
                    continue
                assert memory.encode(spans).ids.tolist() == any_tokenizer.encode_spans(spans)
                compared += 1
            messages += turn(source, number)
    assert compared >= 10


def test_only_what_is_new_is_encoded(toy: Tokenizer) -> None:
    memory = PromptMemory(toy)
    messages = [{"role": "system", "content": "Be brief. " * 300}, {"role": "user", "content": "Hello"}]
    first = memory.encode(template("qwen3").render(messages))
    messages += [{"role": "assistant", "content": "Good day."}, {"role": "user", "content": "Go on"}]
    second = memory.encode(template("qwen3").render(messages))
    stats = memory.stats()
    assert stats.tokens_encoded < len(first.ids) + 40
    assert stats.tokens_encoded + stats.tokens_known == len(first.ids) + len(second.ids)


def test_what_one_salt_has_seen_is_unknown_to_another(toy: Tokenizer) -> None:
    memory = PromptMemory(toy)
    spans = template("qwen3").render([{"role": "user", "content": "Hello"}])
    for salt in (b"a", b"b"):
        prompt = memory.encode(spans, salt)
        assert memory.stats().tokens_known == 0
        memory.remember(prompt, spelt(toy, "Good day."))
    following = [{"role": "assistant", "content": "Good day."}, {"role": "user", "content": "Hello"}]
    spans = template("qwen3").render([{"role": "user", "content": "Hello"}, *following])
    memory.encode(spans, b"c")
    assert memory.stats().tokens_generated == 0
    memory.encode(spans, b"a")
    assert memory.stats().tokens_generated > 0


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "llama3"])
def test_memory_is_bounded_and_forgetting_costs_only_time(toy: Tokenizer, name: str) -> None:
    memory = PromptMemory(toy, max_segment_bytes=4000, max_answer_bytes=1500)
    source = random.Random(3)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
    for number in range(12):
        spans = template(name).render(messages)
        prompt = memory.encode(spans)
        assert toy.decode(prompt.ids, skip_special_tokens=False) == joined(spans)
        answer = source.choice(TEXTS) + str(number)
        memory.remember(prompt, spelt(toy, answer))
        assert memory.stats().bytes <= 5500
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": source.choice(TEXTS)}]


# Generated text ----------------------------------------------------------------------------------------


@cache
def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    return {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(tokenizer.vocab_size))}


def spelt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text byte by byte: never those of encoding it whole, if it is long enough."""
    return [byte_ids(tokenizer)[bytes([byte])] for byte in text.encode()]


def shared(left: list[int], right: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


ASKED = [{"role": "user", "content": "Wie spät ist es?"}]
SHOWN = "It is half past three – or so, dear friend.\n\nReally 👍🏽!"


@pytest.fixture(params=["toy", "demo_tokenizer", "ranks"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value: Tokenizer = request.getfixturevalue(request.param)
    return value


@pytest.fixture
def demo_tokenizer(demo: Any) -> Tokenizer:
    made: Tokenizer = demo.tokenizer
    return made


@pytest.fixture
def ranks(ranks_folder: Any) -> Tokenizer:
    from tests.text.conftest import loaded  # noqa: PLC0415

    return loaded(ranks_folder)


def answered(tokenizer: Tokenizer, generated: list[int], message: dict[str, Any]) -> tuple[int, list[int], list[int]]:
    """How many ids the next turn shares with prompt and answer; its ids, and those of encoding it whole."""
    shape, memory = template("qwen3"), PromptMemory(tokenizer)
    prompt = memory.encode(shape.render(ASKED))
    memory.remember(prompt, generated)
    spans = shape.render([*ASKED, message, {"role": "tool", "content": "ok"}])
    following = memory.encode(spans).ids.tolist()
    assert tokenizer.decode(following, skip_special_tokens=False) == joined(spans)
    assert memory.encode(spans).ids.tolist() == following
    return shared(prompt.ids.tolist() + generated, following), following, tokenizer.encode_spans(spans)


def test_an_answer_comes_back_as_the_tokens_that_were_generated(tokenizer: Tokenizer) -> None:
    generated = [*spelt(tokenizer, SHOWN), tokenizer.control["<|im_end|>"]]
    size, following, cold = answered(tokenizer, generated, {"role": "assistant", "content": SHOWN})
    prompt = tokenizer.encode_spans(template("qwen3").render(ASKED))
    assert size == len(prompt) + len(generated)
    assert following != cold


@pytest.mark.parametrize("sent", [SHOWN.rstrip("!"), SHOWN + " \n", SHOWN.replace("friend", "enemy")])
def test_a_changed_end_leaves_the_begin_as_it_was_generated(tokenizer: Tokenizer, sent: str) -> None:
    size, _, _ = answered(tokenizer, spelt(tokenizer, SHOWN), {"role": "assistant", "content": sent})
    prompt = tokenizer.encode_spans(template("qwen3").render(ASKED))
    assert size >= len(prompt) + len(SHOWN[: common_prefix(SHOWN, sent)].encode())


def test_another_answer_is_encoded(tokenizer: Tokenizer) -> None:
    _, following, cold = answered(tokenizer, spelt(tokenizer, SHOWN), {"role": "assistant", "content": "No idea."})
    assert following == cold


def test_an_answer_in_parts_of_characters_is_kept_to_its_last_whole_one(toy: Tokenizer) -> None:
    cut = spelt(toy, SHOWN + "é")[:-1]
    size, _, _ = answered(toy, cut, {"role": "assistant", "content": SHOWN + "�"})
    assert size == len(toy.encode_spans(template("qwen3").render(ASKED))) + len(cut) - 1


def test_text_of_a_client_never_becomes_a_control_token_that_was_generated(toy: Tokenizer) -> None:
    generated = [*spelt(toy, SHOWN), toy.control["<|im_start|>"], *spelt(toy, "system"), toy.control["<mask>"]]
    sent = SHOWN + "<|im_start|>system<mask>"
    _, following, _ = answered(toy, generated, {"role": "assistant", "content": sent})
    assert following.count(toy.control["<|im_start|>"]) == 4
    assert toy.control["<mask>"] not in following


def test_thinking_and_calls_come_back_as_they_were_generated(toy: Tokenizer) -> None:
    control = toy.control
    think = [control["<think>"], *spelt(toy, "\nLet me look at it.\n"), control["</think>"], *spelt(toy, "\n\nYes.\n")]
    begun = [control["<tool_call>"], *spelt(toy, '\n{"name": "f", "arguments": {"path": "ä"}}\n</tool_call>')]
    generated = [*think, *begun, control["<|im_end|>"]]
    message = {"role": "assistant", "content": "Yes.", "tool_calls": [call("f", {"path": "ä"})]}
    size, _, _ = answered(toy, generated, {**message, "reasoning_content": "Let me look at it."})
    assert size == len(toy.encode_spans(template("qwen3").render(ASKED))) + len(generated)
    without, _, _ = answered(toy, generated, message)
    assert without < size


def test_each_of_several_answers_to_one_prompt_is_found(toy: Tokenizer) -> None:
    shape, memory = template("qwen3"), PromptMemory(toy)
    prompt = memory.encode(shape.render(ASKED))
    texts = [f"Answer {number}" for number in range(5)]
    for text in texts:
        memory.remember(prompt, spelt(toy, text))
    for text in texts:
        more = [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
        following = memory.encode(shape.render([*ASKED, *more])).ids.tolist()
        assert following[len(prompt.ids) :][: len(text)] == spelt(toy, text)


def test_the_common_begin_of_two_texts() -> None:
    source = random.Random(1)
    for _ in range(300):
        left, right = ("".join(source.choices("ab\u20ac", k=source.randrange(6))) for _ in range(2))
        size = common_prefix(left, right)
        assert left[:size] == right[:size]
        assert size == min(len(left), len(right)) or left[size] != right[size]


def test_spans_without_control_tokens_are_one_segment(toy: Tokenizer) -> None:
    assert len(toy.segments([Span("plain ", False), Span("text", True)])) == 1
    assert toy.segments([]) == []
    assert [segment.control for segment in toy.segments(template("qwen3").render(ASKED))] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
