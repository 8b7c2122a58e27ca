"""tokenizer.model through the sentencepiece library.

The library gives control symbols only by id, never from text: that suits us. It does match user-defined
symbols in text, so their type is changed to control before the model is loaded, and control spellings are
found by our own finder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from tokenspeed.errors import CheckpointError
from tokenspeed.text.files import read_bytes, token_text
from tokenspeed.text.hf import SPACE, piece_bytes
from tokenspeed.text.tokenizer import ControlFinder, Match, Tokenizer, pieces_between

# Field numbers and piece types of sentencepiece_model.proto.
PIECES, PIECE_TEXT, PIECE_TYPE = 1, 1, 3
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5

NO_DUMMY_PREFIX = bytes((3 << 3 | LENGTH, 2, 3 << 3 | VARINT, 0))
"""Appended to a model: normalizer_spec { add_dummy_prefix: false }. A repeated message field is merged."""


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer from the bytes of a tokenizer.model and the content of tokenizer_config.json.

    Text after a control token gets no leading space: that belongs to the start of a prompt, unless the
    configuration says `legacy`.
    """

    def __init__(self, model: bytes, config: Mapping[str, Any], name: str) -> None:
        types = _piece_types(model, name)
        closed = _without_user_defined(model, types, name)
        self._start = self._middle = _load(closed, name)
        if config.get("legacy") is not True:
            self._middle = _load(closed + NO_DUMMY_PREFIX, name)
        size = self._start.get_piece_size()
        pieces = [str(self._start.id_to_piece(index)) for index in range(size)]
        added = _added(config, name)

        self.control = {
            **{pieces[index]: index for index, kind in types.items() if not _is_blank(kind, pieces[index])},
            **{content: token_id for token_id, (content, _) in added.items()},
        }
        self.cut_ids = frozenset(self.control.values()) - {index for index, kind in types.items() if kind == UNKNOWN}
        shown = {token_id for token_id, (_, special) in added.items() if not special}
        defined = {index for index, kind in types.items() if kind == USER_DEFINED and index not in added}
        self.special_ids = frozenset(self.control.values()) - shown - defined
        self.vocab_size = max([size, *(token_id + 1 for token_id in added)])
        self._finder = ControlFinder(self.control)
        self._bytes = [piece_bytes(piece, "spaces") for piece in pieces] + [b""] * (self.vocab_size - size)
        for content, token_id in self.control.items():
            self._bytes[token_id] = content.encode("utf-8")
        self.strips_leading_space = self._start.encode("a", out_type=str)[0].startswith(SPACE)

        bos, eos = self._start.bos_id(), self._start.eos_id()
        self.bos_token_id = self.control.get(token_text(config.get("bos_token")) or "", bos if bos >= 0 else None)
        self.eos_token_id = self.control.get(token_text(config.get("eos_token")) or "", eos if eos >= 0 else None)
        if config.get("add_bos_token", True) is True and self.bos_token_id is not None:
            self.prefix_ids = (self.bos_token_id,)
        if config.get("add_eos_token") is True and self.eos_token_id is not None:
            self.suffix_ids = (self.eos_token_id,)

    @classmethod
    def from_file(cls, path: Path, config: Mapping[str, Any]) -> SentencePieceTokenizer:
        """Read a tokenizer.model. Raises `CheckpointError` naming the file."""
        return cls(read_bytes(path), config, str(path))

    def _encode(self, text: str, matches: list[Match]) -> list[int]:
        ids: list[int] = []
        processor = self._start
        for piece in pieces_between(text, matches):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += processor.encode(piece)
            processor = self._middle
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


def _load(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{name}: not a sentencepiece model: {' '.join(str(error).split())[:200]}") from error
    return processor


def _added(config: Mapping[str, Any], name: str) -> dict[int, tuple[str, bool]]:
    try:
        decoder = config.get("added_tokens_decoder") or {}
        return {int(token_id): (entry["content"], bool(entry.get("special"))) for token_id, entry in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: added_tokens_decoder of its tokenizer_config.json is malformed") from error


def _is_blank(kind: int, piece: str) -> bool:
    return kind == USER_DEFINED and not piece.strip(f" \t\r\n{SPACE}")


def _piece_types(model: bytes, name: str) -> dict[int, int]:
    """The ids of the pieces that are unknown, control or user-defined, with their type."""
    types: dict[int, int] = {}
    index = 0
    for field, _, start, end in _fields(model, 0, len(model), name):
        if field != PIECES:
            continue
        for inner, wire, at, _ in _fields(model, start, end, name):
            if inner == PIECE_TYPE and wire == VARINT and model[at] in (UNKNOWN, CONTROL, USER_DEFINED):
                types[index] = model[at]
        index += 1
    return types


def _without_user_defined(model: bytes, types: Mapping[int, int], name: str) -> bytes:
    """The model with every user-defined symbol that is not blank turned into a control symbol."""
    if USER_DEFINED not in types.values():
        return model
    changed = bytearray(model)
    for field, _, start, end in _fields(model, 0, len(model), name):
        if field != PIECES:
            continue
        text, place = "", None
        for inner, _, at, until in _fields(model, start, end, name):
            if inner == PIECE_TEXT:
                text = model[at:until].decode("utf-8", "replace")
            elif inner == PIECE_TYPE:
                place = at
        if place is not None and model[place] == USER_DEFINED and not _is_blank(USER_DEFINED, text):
            changed[place] = CONTROL
    return bytes(changed)


def _fields(data: bytes, at: int, end: int, name: str) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a protobuf message: (number, wire type, start of the value, end of the value)."""
    while at < end:
        key, at = _varint(data, at, end, name)
        wire = key & 7
        if wire == VARINT:
            start = at
            _, at = _varint(data, at, end, name)
        elif wire == LENGTH:
            length, start = _varint(data, at, end, name)
            at = start + length
        elif wire in (FIXED32, FIXED64):
            start, at = at, at + (4 if wire == FIXED32 else 8)
        else:
            raise CheckpointError(f"{name}: not a sentencepiece model (wire type {wire} at byte {at})")
        if at > end:
            raise CheckpointError(f"{name}: truncated at byte {end}")
        yield key >> 3, wire, start, at


def _varint(data: bytes, at: int, end: int, name: str) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise CheckpointError(f"{name}: truncated at byte {at}")
