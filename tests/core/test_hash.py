"""Block hashes are made of SipHash-2-4 with 128 bits of output."""

import numpy as np
import pytest

from tokenspeed._core import Misuse
from tokenspeed._core.scheduler import block_hashes, siphash

KEY = bytes(range(16))

# Message = 00 01 02 … of the given length: the vectors of the function's reference code, which
# `openssl mac -macopt hexkey:000102…0f -macopt size:16 SIPHASH` gives too.
VECTORS = {
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
    3: "9c70b60c5267a94e5f33b6b02985ed51",
    7: "a1f1ebbed8dbc153c0b84aa61ff08239",
    8: "3b62a9ba6258f5610f83e264f31497b4",
    9: "264499060ad9baabc47f8b02bb6d71ed",
    15: "5493e99933b0a8117e08ec0f97cfc3d9",
    16: "6ee2a4ca67b054bbfd3315bf85230577",
    17: "473d06e8738db89854c066c47ae47740",
    31: "2939b0183223fafc1723de4f52c43d35",
    32: "7c3956ca5eeafc3e363e9d556546eb68",
    63: "5150d1772f50834a503e069a973fbd7c",
}


@pytest.mark.parametrize("length", VECTORS)
def test_a_published_vector_is_met(length: int) -> None:
    assert siphash(KEY, bytes(range(length))).hex() == VECTORS[length]


def test_the_key_and_every_byte_matter() -> None:
    message = bytes(range(40))
    digests = {siphash(KEY, message), siphash(KEY[::-1], message)}
    for i in range(len(message)):
        changed = bytearray(message)
        changed[i] ^= 1
        digests.add(siphash(KEY, bytes(changed)))
    assert len(digests) == len(message) + 2


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(Misuse, match="16 bytes"):
        siphash(KEY[:15], b"")


def test_a_block_hash_covers_the_salt_and_all_tokens_before() -> None:
    tokens = np.arange(11, dtype=np.int32)
    inverted = KEY[:8] + bytes(byte ^ 0xFF for byte in KEY[8:])
    expected, chain = [], siphash(inverted, b"tenant")
    for start in (0, 4):
        chain = siphash(KEY, chain + tokens[start : start + 4].tobytes())
        expected.append(chain)
    assert block_hashes(KEY, b"tenant", tokens, 4) == expected
    assert block_hashes(KEY, b"another", tokens, 4)[0] != expected[0]
