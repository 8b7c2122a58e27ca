"""What was used last stays, as far as the bytes go."""

from __future__ import annotations

from tokenspeed.text.recent import Recent


def kept(max_bytes: int) -> Recent[str, str]:
    return Recent(max_bytes, lambda key, value: len(key) + len(value))


def test_the_least_recently_used_goes_first() -> None:
    texts = kept(12)
    for key in "abc":
        texts.put(key, "xxx")
    assert texts.get("a") == "xxx"
    texts.put("d", "xxx")
    assert [texts.get(key) for key in "abcd"] == ["xxx", None, "xxx", "xxx"]
    assert (texts.bytes, len(texts), "b" in texts) == (12, 3, False)


def test_a_new_value_takes_the_place_of_the_old_one() -> None:
    texts = kept(12)
    texts.put("a", "x")
    texts.put("a", "xxxxx")
    assert (texts.bytes, len(texts), texts.get("a")) == (6, 1, "xxxxx")


def test_what_is_larger_than_all_is_not_kept() -> None:
    texts = kept(4)
    texts.put("a", "xx")
    texts.put("b", "x" * 10)
    assert (texts.bytes, len(texts), texts.get("b")) == (0, 0, None)
