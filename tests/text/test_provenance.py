"""`Text` does what `str` does, and every character keeps its origin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.text.provenance import (
    MAX_CHARACTERS,
    TEMPLATE,
    Text,
    concatenated,
    converted,
    from_request,
    from_template,
    is_templates,
    origin,
    public,
    runs,
)

# The template writes Latin, the request Cyrillic; the rest may come from either.
LATIN, CYRILLIC, SHARED = "abXßﬁ", "вгДи", " \n\t|<>-"
PARTS = st.lists(
    st.one_of(
        st.text(alphabet=LATIN + SHARED, max_size=4).map(from_template),
        st.text(alphabet=CYRILLIC + SHARED, max_size=4).map(from_request),
    ),
    max_size=5,
)
TEXT = PARTS.map(concatenated)
SHORT = st.one_of(
    st.sampled_from([" ", "a", "в", "|", "\n", "<|", "ab"]),
    st.text(alphabet=LATIN + CYRILLIC + SHARED, min_size=1, max_size=2),
)
NUMBER = st.integers(-3, 14)

ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "S": SHORT,
    "N": NUMBER,
    "B": st.booleans(),
    "none": st.none(),
    "empty": st.just(""),
    "fill": st.sampled_from("*в"),
    "slice": st.slices(9),
    "parts": PARTS,
    "table": st.dictionaries(
        st.sampled_from([ord(character) for character in "aXв|"]),
        st.one_of(st.none(), st.text("xг", max_size=2)),
        max_size=2,
    ),
}
METHODS: list[tuple[str, list[st.SearchStrategy[Any]]]] = [
    (call.split()[0], [ARGUMENTS[argument] for argument in call.split()[1:]])
    for call in """
lower, upper, casefold, swapcase, title, capitalize, strip, strip S, lstrip, lstrip S, rstrip, rstrip S, split,
split S, split S N, split none N, rsplit, rsplit S, rsplit S N, rsplit none N, splitlines, splitlines B, partition S,
rpartition S, removeprefix S, removesuffix S, expandtabs, expandtabs N, center N, center N fill, ljust N, rjust N,
zfill N, replace S S, replace S S N, replace empty S, translate table, __getitem__ slice, __add__ S, __mul__ N,
__rmul__ N, join parts, find S, count S, startswith S, __contains__ S, __eq__ S, isspace
""".replace("\n", " ")
    .strip()
    .split(", ")
]


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


def assert_true_origins(made: str) -> None:
    """A Cyrillic character is never the template's: it came from the request, whatever was done to it."""
    assert len(origin(made)) == len(made)
    for character, source in zip(str.__iter__(made), origin(made), strict=True):
        if "\u0400" <= character <= "\u04ff":
            assert source != TEMPLATE[0], made


@settings(max_examples=800, deadline=None)
@given(value=TEXT, data=st.data())
def test_methods_give_what_str_gives_and_keep_origins(value: Text, data: st.DataObject) -> None:
    name, strategies = data.draw(st.sampled_from(METHODS))
    arguments = [data.draw(strategy) for strategy in strategies]
    plain = [
        [str.__str__(part) for part in argument] if isinstance(argument, list) else argument for argument in arguments
    ]
    want = getattr(str.__add__("", value), name)(*plain)
    made = getattr(value, name)(*arguments)
    assert made == want
    assert [str.__str__(part) for part in strings(made)] == strings(want)
    for part in strings(made):
        assert isinstance(part, Text)
        assert_true_origins(part)


@settings(max_examples=300, deadline=None)
@given(value=st.text(alphabet=LATIN + SHARED, max_size=9).map(from_template), data=st.data())
def test_what_the_template_made_of_its_own_text_stays_its_own(value: Text, data: st.DataObject) -> None:
    name, strategies = data.draw(
        st.sampled_from([entry for entry in METHODS if entry[0] not in ("translate", "expandtabs")])
    )
    arguments = [data.draw(strategy) for strategy in strategies]
    arguments = [from_template(argument) if isinstance(argument, str) else argument for argument in arguments]
    if name == "join":
        arguments = [[from_template("a"), value]]
    if name in ("center", "ljust", "rjust") and len(arguments) == 1:
        arguments.append(from_template(" "))
    for part in strings(getattr(value, name)(*arguments)):
        assert is_templates(part)


def marked(value: str) -> str:
    """Characters of the request in square brackets."""
    return "".join(f"[{run}]" if requested else run for run, requested in runs(concatenated([value])))


def test_origins_follow_cuts_and_joins() -> None:
    mixed = from_template("<a> ") + from_request("дом \t") + from_template(" b")
    assert marked(mixed) == "<a> [дом \t] b"
    assert marked(mixed.upper()) == "<A> [ДОМ \t] B"
    assert [marked(part) for part in mixed.split()] == ["<a>", "[дом]", "b"]
    assert marked(mixed[2:6]) == "> [до]"
    assert marked(mixed[-1]) == "b"
    assert marked(mixed[::-1]) == "b [\t мод] >a<"
    assert marked(from_template("/").join(mixed.split())) == "<a>/[дом]/b"
    assert marked(from_request("/").join(mixed.split())) == "<a>[/дом/]b"
    assert marked("/".join(["plain"])) == "[plain]"
    assert marked("plain" + mixed[:1]) == "[plain]<"
    assert marked(from_template("straße") + from_request("ß")) == "straße[ß]"
    assert marked((from_template("aß") + from_request("ß")).upper()) == "ASS[SS]"
    assert [marked(part) for part in from_template("a").__add__(from_request("ж"))] == ["a", "[ж]"]


def test_new_text_counts_as_the_templates_only_where_it_replaces_the_templates() -> None:
    mixed = from_template("-x-") + from_request("x") + from_template("x")
    assert marked(mixed.replace("x", from_template("<end>"))) == "-<end>-[<end>]<end>"
    assert marked(mixed.replace("x", "y")) == "-[y]-[yy]"
    assert marked(mixed.replace("-x", from_template("+"), 1)) == "+-[x]x"


@pytest.mark.parametrize(
    ("pattern", "values", "want"),
    [
        ("<%s>", ("ж",), "<[ж]>"),
        ("<%s|%s> 100%%", ("ж", "и"), "<[ж]|[и]> 100%"),
        ("<%(k)s>", {"k": "ж"}, "<[ж]>"),
        ("%d %5s %.1f", (7, "ж", 1.25), "[7] [    ж] [1.2]"),
        ("%*d", (5, 7), "[    7]"),
        ("none", (), "none"),
    ],
)
def test_percent_formatting_keeps_the_arguments_origin(pattern: str, values: Any, want: str) -> None:
    assert marked(from_template(pattern) % converted_values(values)) == want
    assert marked(from_request(pattern) % converted_values(values)).count("[") == 1


def converted_values(values: Any) -> Any:
    if isinstance(values, dict):
        return converted(values)
    return tuple(from_request(value) if isinstance(value, str) else value for value in values)


def test_what_is_longer_than_a_template_may_build_is_refused_before_it_is_built() -> None:
    big = from_template("x") * (MAX_CHARACTERS // 2 + 1)
    for build in (
        lambda: big * 2,
        lambda: big + big,
        lambda: big.join([big, big]),
        lambda: big.replace("x", "yyy"),
        lambda: big.center(MAX_CHARACTERS + 1),
        lambda: big.zfill(1 << 60),
        lambda: from_template("\t").expandtabs(1 << 60),
        lambda: from_template("%99999999999d") % 1,
        lambda: concatenated([big, big]),
    ):
        with pytest.raises(OverflowError):
            build()


def test_plain_operands_behave_as_with_str() -> None:
    for broken in (None, 1, ["a"]):
        with pytest.raises(TypeError):
            from_template("a") + broken
        with pytest.raises(TypeError):
            broken + from_template("a")
    assert {from_template("k"): 1}["k"] == 1
    assert str(from_template("k")).__class__ is Text
    with pytest.raises(TypeError):
        converted({"a": object()})


def test_error_messages_keep_the_templates_words_only() -> None:
    assert public(from_template("bad role ") + from_request("секрет") + from_template("!")) == "bad role …!"
    assert public("секрет") == "…"
