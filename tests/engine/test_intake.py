"""Token ids of a prompt as an array are taken as they are, and checked all the same."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from tests.toy import VOCAB_SIZE, write_tokenizer
from tokenspeed.checkpoint.source import Source
from tokenspeed.engine.intake import EngineFacts, Intake, Taken
from tokenspeed.errors import ContextLengthExceeded, InvalidRequest
from tokenspeed.request import SamplingParams
from tokenspeed.text.load import load_text
from tokenspeed.text.prompt_memory import PromptMemory

LAST = VOCAB_SIZE - 1


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Intake:
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder)
    tokenizer = load_text(Source("hf", folder, "toy")).tokenizer
    facts = EngineFacts("toy", "Toy", "toy", 32, VOCAB_SIZE, (2,), {}, 10, 16, "")
    return Intake(tokenizer, PromptMemory(tokenizer), facts, max_choices=4)


def take(intake: Intake, prompt: Sequence[int]) -> Taken:
    return asyncio.run(intake.take(prompt, SamplingParams(), b""))


def test_an_array_of_ids_is_taken_as_it_is(intake: Intake) -> None:
    prompt = array("i", [0, 7, LAST])
    taken = take(intake, prompt)
    assert taken.ids is prompt
    assert np.frombuffer(taken.raw, "<i4").tolist() == [0, 7, LAST]
    assert taken.params.max_tokens == 29


@pytest.mark.parametrize("kind", "bBhHIlqQ")
def test_an_array_of_other_integers_is_no_less_a_prompt(intake: Intake, kind: str) -> None:
    taken = take(intake, array(kind, [0, 7, 100]))
    assert np.frombuffer(taken.raw, "<i4").tolist() == [0, 7, 100]


@pytest.mark.parametrize(
    "prompt",
    [
        array("i", []),
        array("q", []),
        array("i", [1, -1]),
        array("i", [1, VOCAB_SIZE]),
        array("i", [-(2**31)]),
        array("q", [1 << 32]),
        array("q", [(5 << 32) + 5]),
        array("q", [-1]),
        array("Q", [2**64 - 1]),
        array("d", [1.0]),
        array("f", [0.0]),
    ],
)
def test_an_array_that_is_no_prompt_is_refused(intake: Intake, prompt: Sequence[int]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        take(intake, prompt)
    assert refused.value.param == "prompt"


def test_an_array_has_no_more_room_than_a_list(intake: Intake) -> None:
    assert take(intake, array("i", [1] * 31)).params.max_tokens == 1
    with pytest.raises(ContextLengthExceeded):
        take(intake, array("i", [1] * 32))


def test_arrays_and_lists_of_the_same_ids_are_sent_alike(intake: Intake) -> None:
    ids = [5, 0, LAST, 5]
    assert take(intake, array("i", ids)).raw == take(intake, ids).raw
