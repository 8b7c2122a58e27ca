"""What a client keeps of a thinking whose text it drops."""

from __future__ import annotations

import base64
import random
import zlib

import pytest

from tokenspeed.entrypoints.thought_signature import MAX_BYTES, PREFIX, signature_of, thinking_of


@pytest.mark.parametrize("thinking", ["", "Look outside.", "Größe 👋\n\x00", "x" * MAX_BYTES])
def test_a_signature_gives_its_thinking_back(thinking: str) -> None:
    signature = signature_of(thinking)
    assert thinking_of(signature) == thinking
    assert signature.isascii() and signature.isprintable()


def test_a_longer_thinking_is_signed_without_its_text() -> None:
    assert thinking_of(signature_of("x" * (MAX_BYTES + 1))) == ""


def packed(raw: bytes) -> str:
    return PREFIX + base64.b64encode(raw).decode()


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "s",
        PREFIX,
        PREFIX + "ä",
        PREFIX + "no base64!",
        packed(b"not packed"),
        packed(zlib.compress(b"cut off in the midst of it")[:-5]),
        packed(zlib.compress(b"\xff\xfe")),
        packed(zlib.compress(b"x" * (MAX_BYTES + 1))),
        packed(zlib.compress(bytes(1 << 28), 9)),
    ],
    ids=range(10),
)
def test_what_is_not_ours_holds_nothing(signature: str) -> None:
    assert thinking_of(signature) == ""


def test_flipped_letters_hold_text_or_nothing() -> None:
    draw = random.Random(0)
    whole = signature_of("A thought of some length, in which letters may flip.")
    for _ in range(300):
        at = draw.randrange(len(whole))
        assert isinstance(thinking_of(whole[:at] + chr(draw.randrange(32, 127)) + whole[at + 1 :]), str)
