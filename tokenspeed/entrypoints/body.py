"""From bytes to checked fields: receiving a JSON body within limits, and reading typed fields out of it.

A body is scanned once into `{name: raw bytes}`; each field is decoded only when somebody asks for it, with
the type it must have. What nobody asked for is never built, so a hostile field costs no memory.
"""

from __future__ import annotations

import asyncio
from codecs import getincrementaldecoder
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web

from tokenspeed.entrypoints.errors import HttpError
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.errors import InvalidRequest, Unavailable

T = TypeVar("T")

_SHOWN_BYTES = 32
CHECKED_BYTES = 1 << 16
_KINDS = {'"': "a string", "{": "an object", "[": "an array", "t": "a boolean", "f": "a boolean", "n": "null"}


class BodyReader:
    """Receives request bodies: one body is bounded in size and time, all of them together in size."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._in_flight = 0

    async def read(self, request: web.Request) -> bytes:
        """The body of a JSON request, or `HttpError` 408, 413, 415, or `Unavailable` when too many arrive."""
        self._check_headers(request)
        limit = self._limits.max_body_bytes
        received = 0
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.content.iter_any():
                    received += len(chunk)
                    self._in_flight += len(chunk)
                    if received > limit:
                        raise self._too_large()
                    if self._in_flight > self._limits.total_body_bytes:
                        raise Unavailable("The server is receiving too many large bodies", retry_after=1)
                    chunks.append(chunk)
        except TimeoutError:
            raise HttpError(
                408,
                f"The request body did not arrive within {self._limits.body_seconds:g} seconds",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        finally:
            self._in_flight -= received
        return b"".join(chunks)

    def _check_headers(self, request: web.Request) -> None:
        encoding = request.headers.get("Content-Encoding")
        if encoding is not None:
            raise HttpError(415, "Content-Encoding is not supported; send the body as it is", param="Content-Encoding")
        if "Content-Type" in request.headers and request.content_type != "application/json":
            raise HttpError(415, "Content-Type must be application/json", param="Content-Type")
        charset = request.charset
        if charset is not None and charset.lower() not in ("utf-8", "utf8", "us-ascii"):
            raise HttpError(415, "the charset of a JSON body must be utf-8", param="Content-Type")
        if request.content_length is not None and request.content_length > self._limits.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> HttpError:
        return HttpError(413, f"The request body is larger than {self._limits.max_body_bytes} bytes", code="too_large")


class Kind(Generic[T]):
    """What a field may be: a type for the decoder and the words that tell it to a client.

    `shows` says that a wrong scalar may be quoted back; False for fields that hold text of a conversation.
    """

    def __init__(self, type: Any, allowed: str, *, shows: bool = True) -> None:
        self.type = type
        self.decoder: msgspec.json.Decoder[T | None] = msgspec.json.Decoder(type | None)
        self.allowed = allowed
        self.shows = shows


BOOLEAN = Kind[bool](bool, "a boolean")
INTEGER = Kind[int](int, "an integer")
NUMBER = Kind[float](float, "a number")
STRING = Kind[str](str, "a string")
STRING_OR_STRINGS = Kind[str | list[str]](str | list[str], "a string or a list of strings", shows=False)
STRINGS = Kind[list[str]](list[str], "a list of strings", shows=False)
INTEGERS = Kind[list[int]](list[int], "a list of integers")
BIASES = Kind[dict[str, float]](dict[str, float], "an object of token ids (as strings) and numbers")
OBJECT = Kind[dict[str, msgspec.Raw]](dict[str, msgspec.Raw], "an object", shows=False)
ARRAY = Kind[list[msgspec.Raw]](list[msgspec.Raw], "an array", shows=False)


@dataclass(frozen=True, slots=True)
class Field(Generic[T]):
    """One field of a body, as `fields.py` declares it: what the routes read and what the documents are made of.

    `about` says what it does, in a line of Markdown. A number must be from `least` to `most`, and greater than `above`.
    `inner` are the fields of an object.
    """

    name: str
    kind: Kind[T]
    about: str
    default: T | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    inner: tuple[Field[Any], ...] = ()
    required: bool = False

    def check(self, value: T, name: str) -> None:
        """Raise `InvalidRequest` unless a number is in its range."""
        if isinstance(value, (int, float)) and not (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        ):
            raise InvalidRequest(f"{name} must be {self.range}, got {value}", param=name)

    @property
    def range(self) -> str:
        """The numbers that are allowed, in words; empty if all are."""
        low, high = _number(self.least if self.above is None else self.above), _number(self.most)
        if not high or not low:
            return f"at least {low}" if low else f"at most {high}" if high else ""
        return f"between {low} and {high}" if self.above is None else f"in ({low}, {high}]"


def _number(value: float | None) -> str:
    return "" if value is None else str(int(value) if value == int(value) else value)


_TOP: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])


class Fields:
    """The fields of one JSON object. `take` decodes one and remembers that it is known; null is absent."""

    def __init__(self, fields: Mapping[str, msgspec.Raw], prefix: str = "") -> None:
        self._fields = fields
        self._prefix = prefix
        self._taken: set[str] = set()

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """The fields of a whole body, or `InvalidRequest`: not UTF-8, not JSON, not an object, too deep."""
        try:
            _check_utf8(body)
            return cls(_TOP.decode(body))
        except UnicodeDecodeError:
            raise InvalidRequest("the body is not valid UTF-8") from None
        except msgspec.ValidationError:
            raise InvalidRequest(f"the body must be a JSON object, got {describe(body, shows=False)}") from None
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from None
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply") from None

    def without(self, names: Collection[str]) -> Fields:
        """The same fields less those of these names, none of them taken."""
        return Fields({key: raw for key, raw in self._fields.items() if key not in names}, self._prefix)

    def name(self, key: str) -> str:
        """The full name of a field, for error messages."""
        return self._prefix + key

    def raw(self, key: str) -> bytes | None:
        """The JSON text of a field, None when absent or null."""
        self._taken.add(key)
        raw = self._fields.get(key)
        if raw is None:
            return None
        text = bytes(raw)
        return None if text == b"null" else text

    def take(self, key: str, kind: Kind[T]) -> T | None:
        """The value of a field, None when absent or null; `InvalidRequest` names the field otherwise."""
        raw = self.raw(key)
        return None if raw is None else decode(raw, kind, self.name(key))

    def take_or(self, key: str, kind: Kind[T], default: T) -> T:
        """`take` with a default."""
        value = self.take(key, kind)
        return default if value is None else value

    def read(self, field: Field[T]) -> T | None:
        """`take` of a declared field, which must be in its range."""
        value = self.take(field.name, field.kind)
        if value is not None:
            field.check(value, self.name(field.name))
        return value

    def value(self, field: Field[T]) -> T:
        """`read` of a field that is declared with a default."""
        value = self.read(field)
        if value is None:
            value = field.default
            assert value is not None, field.name
        return value

    def inside(self, key: str) -> Fields:
        """The fields of a field that is an object, none where it is absent or null."""
        inner = self.take(key, OBJECT)
        return Fields({} if inner is None else inner, f"{self.name(key)}.")

    def untaken(self) -> list[str]:
        """Fields that the request has and nobody asked for."""
        return [key for key in self._fields if key not in self._taken]


def _check_utf8(body: bytes) -> None:
    """Raise `UnicodeDecodeError` unless it is UTF-8. By parts: at once, a megabyte holds the interpreter 1 to 3 ms."""
    decoder = getincrementaldecoder("utf-8")()
    for start in range(0, len(body), CHECKED_BYTES):
        decoder.decode(body[start : start + CHECKED_BYTES])
    decoder.decode(b"", True)


def decode(raw: bytes, kind: Kind[T], name: str) -> T | None:
    """Decode JSON text as `kind`; `InvalidRequest` says what `name` must be and what came."""
    try:
        return kind.decoder.decode(raw)
    except msgspec.ValidationError as error:
        detail = str(error)
        if "out of range" in detail:
            raise InvalidRequest(f"{name} has a number that is out of range", param=name) from None
        where = detail.rpartition(" - at `$")[2].rstrip("`") if " - at `$" in detail else ""
        what = f"; the element at {where} is wrong" if where and "..." not in where else ""
        got = describe(raw, shows=kind.shows)
        raise InvalidRequest(f"{name} must be {kind.allowed}, got {got}{what}", param=name) from None
    except msgspec.DecodeError:
        raise InvalidRequest(f"{name} has text that is not valid Unicode", param=name) from None
    except RecursionError:
        raise InvalidRequest(f"{name} is nested too deeply", param=name) from None


def describe(raw: bytes, *, shows: bool) -> str:
    """What a piece of JSON is, for an error message; a short scalar is quoted when it holds no conversation."""
    text = raw.lstrip(b" \t\r\n")
    head = chr(text[0]) if text else ""
    kind = _KINDS.get(head, "a number")
    if shows and head not in ("{", "[", "n") and len(text) <= _SHOWN_BYTES:
        return text.decode("utf-8", "replace")
    return kind
