"""The incremental detokenizer: whole characters only, and in sum the text of all tokens."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.conftest import TEXTS, loaded
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.load import TextSide
from tokenspeed.text.tokenizer import Tokenizer

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parts(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@FEW
@given(data=st.data(), skip=st.booleans())
def test_deltas_join_to_the_whole_text_however_tokens_are_cut(
    any_tokenizer: Tokenizer, data: st.DataObject, skip: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=24))
    detokenizer = Detokenizer(any_tokenizer, skip_special_tokens=skip)
    deltas = [detokenizer.feed(part) for part in parts(data, ids)]
    assert "".join(deltas) + detokenizer.flush() == any_tokenizer.decode(ids, skip_special_tokens=skip)


@FEW
@given(text=st.text(max_size=20), data=st.data())
def test_no_delta_holds_half_a_character(any_tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = any_tokenizer.encode(text)
    whole = any_tokenizer.decode(ids, skip_special_tokens=False)
    detokenizer = Detokenizer(any_tokenizer, skip_special_tokens=False)
    shown = ""
    for part in parts(data, ids):
        shown += detokenizer.feed(part)
        assert whole.startswith(shown)
    assert shown + detokenizer.flush() == whole


def test_an_emoji_comes_whole_and_a_broken_one_is_replaced(demo: TextSide) -> None:
    tokenizer = demo.tokenizer
    ids = tokenizer.encode("👍🏽")
    assert len(ids) > 2
    detokenizer = Detokenizer(tokenizer)
    deltas = [detokenizer.feed([token_id]) for token_id in ids]
    assert "".join(deltas) == "👍🏽"
    assert all(delta in ("", "👍", "🏽") for delta in deltas)
    # The first bytes of a character, then a letter: replaced as soon as it cannot be completed.
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(ids[:1]) == ""
    assert detokenizer.feed(tokenizer.encode("a")) == "\ufffda"
    assert detokenizer.feed(ids[:1]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.feed(tokenizer.encode("b")) == "b"


def test_the_space_that_sentencepiece_puts_first_is_not_shown(sentencepiece_folder: Path, spaced: Path) -> None:
    for folder in (sentencepiece_folder, spaced):
        tokenizer = loaded(folder)
        ids = tokenizer.encode("hello there")
        for cut in range(len(ids) + 1):
            detokenizer = Detokenizer(tokenizer)
            assert detokenizer.feed(ids[:cut]) + detokenizer.feed(ids[cut:]) + detokenizer.flush() == "hello there"
        continued = Detokenizer(tokenizer, continues=True)
        assert continued.feed(ids) + continued.flush() == " hello there"


def test_special_tokens_are_left_out_or_shown(demo: TextSide) -> None:
    ids = demo.tokenizer.encode("<|im_start|>hi<|im_end|>", parse_special=True)
    assert Detokenizer(demo.tokenizer).feed(ids) == "hi"
    assert Detokenizer(demo.tokenizer, skip_special_tokens=False).feed(ids) == "<|im_start|>hi<|im_end|>"


def test_all_texts_survive_token_by_token(any_tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        detokenizer = Detokenizer(any_tokenizer, skip_special_tokens=False)
        ids = any_tokenizer.encode(text)
        assert "".join(
            [detokenizer.feed([token_id]) for token_id in ids]
        ) + detokenizer.flush() == any_tokenizer.decode(ids, skip_special_tokens=False)
