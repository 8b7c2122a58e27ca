"""tokenizer.json through the `tokenizers` library.

The library recognises every added token wherever its spelling appears. Here the spelling of each is
replaced, in the library's copy only, by a random one that nobody can type: ordinary text then never
becomes a control token, and a prompt whose template wrote `<|im_end|>` is encoded in one call, with the
random spelling put in its place. The rest of the pipeline (normaliser, splitting, whitespace that a
token swallows) sees exactly what it would have seen.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from tokenspeed.errors import CheckpointError
from tokenspeed.text.files import read_json, token_text
from tokenspeed.text.tokenizer import ControlFinder, Match, Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SPACE = "▁"


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched whole: `special` ones are left out by `skip_special_tokens`."""

    content: str
    token_id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def typed(self) -> bool:
        """Runs of blanks that some vocabularies list as added tokens are ordinary text, not control."""
        return not self.special and not self.content.strip(f" \t\r\n{SPACE}")


class LibraryTokenizer(Tokenizer):
    """A tokenizer from the parsed content of a tokenizer.json (`spec`) and of tokenizer_config.json (`config`).

    `name` is what errors call it. Raises `CheckpointError` if the library cannot build it, or if its
    decoder is none of byte-level, sentencepiece-like or plain concatenation.
    """

    def __init__(self, spec: Mapping[str, Any], config: Mapping[str, Any], name: str) -> None:
        model = _dict(spec, "model", name)
        vocab = _vocab_ids(model, name)
        added = _added_tokens(spec, config, vocab, name)
        control = [token for token in added if not token.typed]

        self.control = {token.content: token.token_id for token in control}
        self.special_ids = frozenset(token.token_id for token in added if token.special)
        unknown = model.get("unk_token")
        self.cut_ids = frozenset(
            token.token_id for token in control if not token.lstrip and token.content != unknown
        )
        self.vocab_size = 1 + max([*vocab.values(), *(token.token_id for token in added)])
        self._finder = ControlFinder(self.control, {token.content for token in control if token.single_word})

        nonce = secrets.token_hex(8)
        self._spelling = {token.token_id: f"\ue000{nonce}{token.token_id:x}\ue001" for token in control}
        self._library = _build({**spec, **_renamed(spec, added, self._spelling)}, name)
        for token in added:
            spelling = self._spelling.get(token.token_id, token.content)
            if self._library.token_to_id(spelling) != token.token_id:
                raise CheckpointError(f"{name}: added token {token.content!r} cannot have id {token.token_id}")

        self._decoder = _decoder_kind(spec, name)
        self.strips_leading_space = self._decoder == "spaces" and _strips_leading_space(spec)
        self._pieces: list[str | None] = [None] * self.vocab_size
        for piece, token_id in vocab.items():
            self._pieces[token_id] = piece
        self._added = {token.token_id: token.content for token in added}

        ids = {**vocab, **{token.content: token.token_id for token in added}}
        self.bos_token_id = ids.get(token_text(config.get("bos_token")) or "")
        self.eos_token_id = ids.get(token_text(config.get("eos_token")) or "")
        self._set_surroundings(config)

    @classmethod
    def from_file(cls, path: Path, config: Mapping[str, Any]) -> LibraryTokenizer:
        """Read a tokenizer.json. Raises `CheckpointError` naming the file."""
        return cls(read_json(path), config, str(path))

    def _set_surroundings(self, config: Mapping[str, Any]) -> None:
        """What goes around a prompt: by the post-processor, or by the flags where that adds nothing."""
        bare = self._library.encode("a", add_special_tokens=False).ids
        full = self._library.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                self.prefix_ids, self.suffix_ids = tuple(full[:start]), tuple(full[start + len(bare) :])
                break
        if not self.prefix_ids and config.get("add_bos_token") is True and self.bos_token_id is not None:
            self.prefix_ids = (self.bos_token_id,)
        if not self.suffix_ids and config.get("add_eos_token") is True and self.eos_token_id is not None:
            self.suffix_ids = (self.eos_token_id,)

    def _encode(self, text: str, matches: list[Match]) -> list[int]:
        return self._encode_each([(text, matches)])[0]

    def _encode_each(self, parts: list[tuple[str, list[Match]]]) -> list[list[int]]:
        texts = [self._respelt(text, matches) for text, matches in parts]
        # The "fast" batch call leaves out character offsets, which nobody reads, and uses every core.
        return [made.ids for made in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _respelt(self, text: str, matches: list[Match]) -> str:
        if not matches:
            return text
        parts: list[str] = []
        at = 0
        for match in matches:
            parts += (text[at : match.start], self._spelling[match.token_id])
            at = match.end
        return "".join([*parts, text[at:]])

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode("utf-8")
        piece = self._pieces[token_id]
        return b"" if piece is None else piece_bytes(piece, self._decoder)


def piece_bytes(piece: str, decoder: str) -> bytes:
    """The bytes that one vocabulary entry stands for, under a "bytes", "spaces" or "plain" decoder."""
    if decoder == "bytes":
        try:
            return bytes([BYTE_OF_CHARACTER[character] for character in piece])
        except KeyError:
            return piece.encode("utf-8")
    if decoder == "spaces":
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                return piece.encode("utf-8")
        return piece.replace(SPACE, " ").encode("utf-8")
    return piece.encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def _dict(spec: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = spec.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: has no {key}")
    return value


def _vocab_ids(model: Mapping[str, Any], name: str) -> dict[str, int]:
    vocab = model.get("vocab")
    try:
        if isinstance(vocab, list):
            return {str(piece): index for index, (piece, _) in enumerate(vocab)}
        if isinstance(vocab, dict) and all(isinstance(index, int) and 0 <= index < 1 << 24 for index in vocab.values()):
            return vocab
    except (TypeError, ValueError):
        pass
    raise CheckpointError(f"{name}: model.vocab is not a vocabulary")


def _added_tokens(
    spec: Mapping[str, Any], config: Mapping[str, Any], vocab: Mapping[str, int], name: str
) -> list[AddedToken]:
    """The added tokens of both files by id. What tokenizer_config.json names as special is special."""
    listed = spec.get("added_tokens") or []
    decoder = config.get("added_tokens_decoder") or {}
    try:
        entries = [*listed, *({**entry, "id": int(token_id)} for token_id, entry in decoder.items())]
        found = {int(entry["id"]): _added_token(entry) for entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: added_tokens is malformed") from error
    ids = {**vocab, **{token.content: token.token_id for token in found.values()}}
    for content in _special_contents(config):
        token_id = ids.get(content)
        if token_id is not None and (token_id not in found or not found[token_id].special):
            found[token_id] = AddedToken(content, token_id, special=True)
    if any(not 0 <= token_id < 1 << 24 for token_id in found):
        raise CheckpointError(f"{name}: added_tokens has an id out of range")
    return [found[token_id] for token_id in sorted(found)]


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {flag: bool(entry.get(flag, False)) for flag in ("special", "lstrip", "rstrip", "single_word")}
    content = entry["content"]
    if not isinstance(content, str):
        raise TypeError("content is no string")
    return AddedToken(content, int(entry["id"]), **flags)


def _special_contents(config: Mapping[str, Any]) -> Iterable[str]:
    for key in NAMED_TOKENS:
        if text := token_text(config.get(key)):
            yield text
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        for token in extra.values() if isinstance(extra, dict) else extra:
            if text := token_text(token):
                yield text


def _renamed(spec: Mapping[str, Any], added: list[AddedToken], spelling: Mapping[int, str]) -> dict[str, Any]:
    """The parts of a tokenizer.json in which control tokens are spelt, with their random spellings."""
    new = {token.content: spelling[token.token_id] for token in added if token.token_id in spelling}
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, list):
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {new.get(piece, piece): index for piece, index in vocab.items()}
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if merges := model.get("merges"):
        # No merge may lead to a control token, or through one.
        model["merges"] = [merge for merge in merges if not _touches(merge, new)]
    tokens = [
        {
            "id": token.token_id,
            "content": new.get(token.content, token.content),
            "single_word": False,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": False,
            "special": token.special,
        }
        for token in added
    ]
    # A limit saved with the file would cut prompts silently.
    return {"model": model, "added_tokens": tokens, "truncation": None, "padding": None}


def _touches(merge: str | list[str], control: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in control or right in control or left + right in control


def _build(spec: Mapping[str, Any], name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise CheckpointError(f"{name}: {' '.join(str(error).split())[:300]}") from error


def _components(part: Any) -> list[dict[str, Any]]:
    """The steps of a pipeline part, sequences unrolled."""
    if not isinstance(part, dict):
        return []
    for key in ("decoders", "pretokenizers", "normalizers"):
        if isinstance(part.get(key), list):
            return [step for child in part[key] for step in _components(child)]
    return [part]


def _decoder_kind(spec: Mapping[str, Any], name: str) -> str:
    kinds = {step.get("type") for step in _components(spec.get("decoder"))}
    if "ByteLevel" in kinds:
        return "bytes"
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return "spaces"
    if kinds == {"Fuse"}:
        return "plain"
    raise CheckpointError(f"{name}: decoder {sorted(map(str, kinds)) or 'missing'} is not supported")


def _strips_leading_space(spec: Mapping[str, Any]) -> bool:
    for step in _components(spec.get("decoder")):
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start"):
            return True
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return bool(scheme != "never")
    return False
