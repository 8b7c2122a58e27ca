"""The `openai` client against the server: chat and completions, whole and streamed."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.entrypoints.served import Served

MESSAGES = [{"role": "user", "content": "grüße 👋 an alle"}]
EXPECTED = "user:grüße 👋 an alleassistant:"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def test_chat_gives_the_same_text_whole_and_streamed(client: openai.OpenAI) -> None:
    length = len(EXPECTED.encode()) + 2
    whole = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=length, temperature=0)
    assert whole.choices[0].message.content == EXPECTED
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == length
    chunks = list(
        client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=length, temperature=0, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == EXPECTED
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_completions_give_the_same_text_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="ab 👋 c", max_tokens=9)
    assert whole.choices[0].text == "ab 👋 c"
    streamed = client.completions.create(model="echo", prompt="ab 👋 c", max_tokens=9, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "ab 👋 c"


def test_the_role_comes_with_the_first_text_and_only_once(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=20, stream=True))
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "u")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


def test_one_chunk_a_token_and_none_for_half_a_character(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="echo", prompt="a👋b", max_tokens=6, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["a", "👋", "b"]


def test_usage_is_the_last_chunk_and_only_when_asked_for(served: Served, client: openai.OpenAI) -> None:
    served.call(lambda: setattr(served.engine, "cached", 7))
    try:
        plain = list(client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=5, stream=True))
        assert all(chunk.usage is None and chunk.choices for chunk in plain)
        chunks = list(
            client.chat.completions.create(
                model="echo", messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
            )
        )
    finally:
        served.call(lambda: setattr(served.engine, "cached", 0))
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.completion_tokens, usage.total_tokens) == (5, usage.prompt_tokens + 5)
    assert usage.prompt_tokens_details.cached_tokens == 7
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_cached_tokens_are_told_even_when_there_are_none(client: openai.OpenAI) -> None:
    usage = client.completions.create(model="echo", prompt="x", max_tokens=1).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


def test_n_choices_are_numbered(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=6, n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [(i, "user:") for i in range(3)]
    assert whole.usage is not None and whole.usage.completion_tokens == 18
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=6, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["user:"] * 3


def test_chat_logprobs(client: openai.OpenAI) -> None:
    arguments = {"model": "echo", "messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**arguments)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert [item.token for item in content] == ["<|turn|>", *"user"]
    assert (content[1].logprob, content[1].bytes) == (-0.5, [ord("u")])
    assert [item.token for item in content[1].top_logprobs] == ["u", "v"]
    streamed = [
        item.token
        for chunk in client.chat.completions.create(**arguments, stream=True)
        for item in (chunk.choices[0].logprobs.content or [])
    ]
    assert streamed == ["<|turn|>", *"user"]


def test_chat_logprobs_without_top_ones(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=1, logprobs=True)
    assert whole.choices[0].logprobs is not None and whole.choices[0].logprobs.content
    assert whole.choices[0].logprobs.content[0].top_logprobs == []


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    arguments = {"model": "echo", "prompt": "abc", "max_tokens": 2, "logprobs": 1, "echo": True}
    whole = client.completions.create(**arguments)
    assert whole.choices[0].text == "abcab"
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list("abcab")
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[1] == {"b": -0.5}
    text, tokens, offsets = "", [], []
    for chunk in client.completions.create(**arguments, stream=True):
        text += chunk.choices[0].text
        part = chunk.choices[0].logprobs
        assert part is not None
        tokens += part.tokens or []
        offsets += part.text_offset or []
    assert (text, tokens, offsets) == ("abcab", list("abcab"), [0, 1, 2, 3, 4])


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_0_with_echo_scores_the_prompt_and_generates_nothing(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="echo", prompt=[97, 98], max_tokens=0, logprobs=0, echo=True, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    if stream:
        chunks = list(answer)
        choice, usage = chunks[0].choices[0], chunks[-1].usage
        assert len(chunks) == 2
    else:
        choice, usage = answer.choices[0], answer.usage
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (2, 0)


def test_a_prompt_of_one_token_is_echoed_with_its_one_entry(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="a", max_tokens=1, logprobs=0, echo=True)
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens == ["a", "a"]
    assert whole.choices[0].logprobs.token_logprobs == [None, -0.5]


@pytest.mark.parametrize("prompts", [["ab", "xyz"], [[97, 98], [120, 121, 122]]])
def test_batched_prompts_are_numbered_prompt_by_prompt(
    client: openai.OpenAI, prompts: list[str] | list[list[int]]
) -> None:
    whole = client.completions.create(model="echo", prompt=prompts, n=2, max_tokens=3, echo=True)
    assert [(c.index, c.text) for c in whole.choices] == [(0, "ababa"), (1, "ababa"), (2, "xyzxyz"), (3, "xyzxyz")]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 12)
    texts = [""] * 4
    for chunk in client.completions.create(model="echo", prompt=prompts, n=2, max_tokens=3, echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["ababa", "ababa", "xyzxyz", "xyzxyz"]


def test_a_stop_string_ends_a_choice(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="abcd", max_tokens=9, stop="c")
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("ab", "stop")
    assert whole.choices[0].model_extra is not None and whole.choices[0].model_extra["stop_reason"] == "c"


def test_token_ids_come_back_when_asked_for(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = client.completions.create(model="echo", prompt="ab", max_tokens=3, extra_body=extra)
    assert whole.choices[0].model_extra is not None
    assert whole.choices[0].model_extra["token_ids"] == [97, 98, 97]
    assert whole.choices[0].model_extra["prompt_token_ids"] == [97, 98]
    talk = client.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=2, extra_body=extra, stream=True)
    chunks = list(talk)
    assert [chunk.choices[0].model_extra["token_ids"] for chunk in chunks if chunk.choices[0].model_extra] == [
        [258],
        [117],
    ]
    assert chunks[0].model_extra is not None and chunks[0].model_extra["prompt_token_ids"][0] == 258


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 1})
    assert whole.choices[0].model_extra is not None
    assert whole.choices[0].model_extra["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]


def test_models_are_listed_with_their_context(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["echo"]
    assert listed[0].model_extra is not None and listed[0].model_extra["max_model_len"] == 512
    assert client.models.retrieve("echo").id == "echo"


def test_errors_arrive_as_the_clients_own_types(served: Served, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="echo", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    served.call(lambda: setattr(served.engine, "queue_limit", 0))
    try:
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="echo", messages=MESSAGES)
    finally:
        served.call(lambda: setattr(served.engine, "queue_limit", 1000))
    assert full.value.response.headers["retry-after"] == "2"
