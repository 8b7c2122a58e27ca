"""Stop strings: found wherever tokens are cut, never shown in part, counted to the token that completes them."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenspeed.request import SamplingParams
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.load import TextSide
from tokenspeed.text.stopping import OutputText, TextDelta
from tokenspeed.text.tokenizer import Match, Tokenizer

END, STOP_ID = 256, 257


class Bytes(Tokenizer):
    """One token a byte; 256 ends a turn, 257 is a control token that shows as `<tool>`."""

    vocab_size = 258
    bos_token_id = None
    eos_token_id = END
    special_ids = frozenset((END,))
    control = {"<end>": END, "<tool>": STOP_ID}  # noqa: RUF012

    def _encode(self, text: str, matches: list[Match]) -> list[int]:
        return list(text.encode())

    def _token_bytes(self, token_id: int) -> bytes:
        return {END: b"<end>", STOP_ID: b"<tool>"}.get(token_id) or bytes((token_id,))


TOY = Bytes()


def first_match(texts: list[str], stop: tuple[str, ...], min_tokens: int) -> tuple[str, str | None, int]:
    """The oracle: text before the stop, the stop, tokens counted; by looking at everything after each character."""
    seen = ""
    for index, text in enumerate(texts):
        for character in text:
            seen += character
            matches = [candidate for candidate in stop if seen.endswith(candidate)]
            if matches and index + 1 > min_tokens:
                longest = max(matches, key=len)
                return seen[: -len(longest)], longest, index + 1
    return seen, None, len(texts)


def deltas_of(tokenizer: Tokenizer, params: SamplingParams, parts: list[list[int]]) -> list[TextDelta]:
    output = OutputText(tokenizer, params)
    return [output.feed(part, index == len(parts) - 1) for index, part in enumerate(parts)]


@settings(max_examples=600, deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=4).map(tuple),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    data=st.data(),
)
def test_any_cut_gives_the_first_match_and_never_a_part_of_it(
    text: str, stop: tuple[str, ...], min_tokens: int, include: bool, data: st.DataObject
) -> None:
    ids = list(text.encode())
    detokenizer = Detokenizer(TOY)
    want, match, counted = first_match([detokenizer.feed([token_id]) for token_id in ids], stop, min_tokens)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    params = SamplingParams(stop=stop, min_tokens=min_tokens, include_stop_str_in_output=include)
    deltas = deltas_of(TOY, params, parts)
    shown = ""
    final = want + (match if include and match else "")
    for delta in deltas:
        shown += delta.text
        assert final.startswith(shown)
    assert shown == final
    assert deltas[-1].stop == match
    assert deltas[-1].num_tokens == counted
    counts = [delta.num_tokens for delta in deltas]
    assert counts == sorted(counts)


def test_text_that_may_begin_a_stop_string_is_held_back_and_let_go() -> None:
    output = OutputText(TOY, SamplingParams(stop=("STOP", "TOE")))
    assert output.feed(b"abS") == TextDelta("ab", 3, None)
    assert output.feed(b"T") == TextDelta("", 4, None)
    assert output.feed(b"O") == TextDelta("", 5, None)
    assert output.feed(b"x") == TextDelta("STOx", 6, None)
    assert output.feed(b"STO") == TextDelta("", 9, None)
    assert output.feed(b"E!") == TextDelta("S", 10, "TOE")
    assert output.feed(b"more", True) == TextDelta("", 10, "TOE")


def test_the_end_lets_held_text_and_half_characters_go() -> None:
    output = OutputText(TOY, SamplingParams(stop=("STOP",)))
    assert output.feed(b"aST\xf0\x9f"[:3]) == TextDelta("a", 3, None)
    assert output.feed(b"\xf0\x9f", True) == TextDelta("ST\ufffd", 5, None)
    output = OutputText(TOY, SamplingParams(stop=("STOP",)))
    assert output.feed(b"aST", True) == TextDelta("aST", 3, None)
    assert OutputText(TOY, SamplingParams()).feed([], True) == TextDelta("", 0, None)


def test_min_tokens_lets_early_matches_pass_as_text() -> None:
    output = OutputText(TOY, SamplingParams(stop=("b",), min_tokens=3))
    assert [output.feed(part) for part in (b"x", b"bb")] == [TextDelta("x", 1, None), TextDelta("bb", 3, None)]
    assert output.feed(b"b") == TextDelta("", 4, "b")


@pytest.mark.parametrize("skip", [True, False])
def test_the_text_of_the_token_that_ended_the_turn_is_dropped(skip: bool) -> None:
    params = SamplingParams(skip_special_tokens=skip, stop_token_ids=(STOP_ID,))
    assert OutputText(TOY, params).feed([*b"hi", END], True) == TextDelta("hi", 3, None)
    assert OutputText(TOY, params).feed([*b"hi", STOP_ID], True) == TextDelta("hi", 3, None)
    # Not the last token, or not one that ends: it is text, as far as it shows.
    assert OutputText(TOY, params).feed([STOP_ID, *b"x"], True) == TextDelta("<tool>x", 2, None)
    shown = "" if skip else "<end>"
    unended = SamplingParams(skip_special_tokens=skip, ignore_eos=True)
    assert OutputText(TOY, unended).feed([*b"hi", END], True) == TextDelta("hi" + shown, 3, None)
    asked = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=True)
    assert OutputText(TOY, asked).feed([*b"hi", END], True) == TextDelta("hi" + shown, 3, None)
    others = OutputText(TOY, SamplingParams(skip_special_tokens=skip), eos_token_ids=(ord("!"),))
    assert others.feed(b"hi!", True) == TextDelta("hi", 3, None)


def test_chosen_special_tokens_are_shown_while_the_others_stay_hidden() -> None:
    ids = [*b"hi", END, *b"x"]
    assert OutputText(TOY, SamplingParams()).feed(ids, True).text == "hix"
    assert OutputText(TOY, SamplingParams(shown_special_ids=(END,))).feed(ids, True).text == "hi<end>x"
    assert OutputText(TOY, SamplingParams(shown_special_ids=(STOP_ID,))).feed(ids, True).text == "hix"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30), data=st.data())
def test_stop_strings_inside_tokens_of_a_real_vocabulary(demo: TextSide, text: str, data: st.DataObject) -> None:
    tokenizer = demo.tokenizer
    text = tokenizer.decode(tokenizer.encode(text)) + " The quick brown fox"
    start = data.draw(st.integers(0, len(text) - 1))
    stop = (text[start : start + data.draw(st.integers(1, 5))],)
    ids = tokenizer.encode(text)
    deltas = deltas_of(tokenizer, SamplingParams(stop=stop), [[token_id] for token_id in ids])
    assert "".join(delta.text for delta in deltas) == text[: text.index(stop[0])]
    assert deltas[-1].stop == stop[0]
    counted = deltas[-1].num_tokens
    assert stop[0] in tokenizer.decode(ids[:counted])
    assert stop[0] not in tokenizer.decode(ids[: counted - 1])


def test_the_cost_of_a_token_does_not_grow_with_the_text_or_the_stop_strings() -> None:
    stop = tuple("a" * 1000 + chr(98 + index) for index in range(16))
    output = OutputText(TOY, SamplingParams(stop=stop))
    start = time.perf_counter()
    for _ in range(40):
        output.feed(b"a" * 1000)
    assert time.perf_counter() - start < 5
