"""The signature of a thinking block. It holds the thinking, for clients that keep the signature and drop the text.

It is not a proof of anything: a client may send any thinking back, with or without one.
"""

from __future__ import annotations

import base64
import binascii
import zlib

PREFIX = "ts1."
MAX_BYTES = 1 << 20
"""Of the thinking in UTF-8: a longer one is signed without its text, and one that unpacks to more is none of ours."""


def signature_of(thinking: str) -> str:
    """Printable ASCII."""
    raw = thinking.encode("utf-8", "replace")
    return PREFIX + base64.b64encode(zlib.compress(raw if len(raw) <= MAX_BYTES else b"", 1)).decode()


def thinking_of(signature: str) -> str:
    """The thinking that a signature holds; empty for one that is not from here."""
    if not signature.startswith(PREFIX):
        return ""
    unpacking = zlib.decompressobj()
    try:
        packed = base64.b64decode(signature[len(PREFIX) :], validate=True)
        raw = unpacking.decompress(packed, MAX_BYTES)
        return raw.decode() if unpacking.eof else ""
    except (binascii.Error, ValueError, zlib.error):
        return ""
