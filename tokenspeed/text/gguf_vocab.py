"""A tokenizer rebuilt from the metadata of a GGUF file.

Two kinds of vocabulary: `gpt2`, byte-level BPE whose merges are in the file and whose way of splitting
text is known by a name (`tokenizer.ggml.pre`); and `llama`, sentencepiece's BPE, where a pair merges in
the order of the scores and unknown characters fall back to bytes. Both are written down as the content of
a tokenizer.json and built from that.

The expressions follow llama.cpp's table (src/llama-vocab.cpp) and the tokenizer.json files of the models
it was made from. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenspeed.errors import CheckpointError
from tokenspeed.text.hf import SPACE, LibraryTokenizer
from tokenspeed.text.tokenizer import Tokenizer

PLAIN_TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD = r"[^\r\n\p{L}\p{N}]?"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}|{TAIL}"
GPT4O = rf"{WORD}{UPPER}*{LOWER}+{CONTRACTION}?|{WORD}{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}|{TAIL}"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Splitting:
    """How text is cut into words before merging: each expression in turn cuts what the one before left.

    `whole_words`: a word that is in the vocabulary is one token even if no merges lead to it.
    `adds_bos`: prompts begin with the beginning-of-sequence token unless the file says otherwise.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


DIGITS_ALONE = Splitting((r"\p{N}", GPT2))
PLAIN = Splitting((GPT2,))
DEFAULT = Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
THREE_DIGITS = Splitting((LLAMA3,), whole_words=True, adds_bos=True)
ONE_DIGIT = Splitting((QWEN2,))

SPLITTINGS: dict[str, Splitting] = {
    "default": DEFAULT,
    "gpt-2": PLAIN,
    "phi-2": PLAIN,
    "mpt": PLAIN,
    "olmo": PLAIN,
    "jais": PLAIN,
    "smollm": DIGITS_ALONE,
    "starcoder": DIGITS_ALONE,
    "refact": DIGITS_ALONE,
    "command-r": DIGITS_ALONE,
    "codeshell": DIGITS_ALONE,
    "exaone": DIGITS_ALONE,
    "llama-bpe": THREE_DIGITS,
    "llama3": THREE_DIGITS,
    "llama-v3": THREE_DIGITS,
    "dbrx": Splitting((LLAMA3,)),
    "smaug-bpe": Splitting((LLAMA3,)),
    "glm4": Splitting((LLAMA3,)),
    "chatglm-bpe": Splitting((LLAMA3,)),
    "qwen2": ONE_DIGIT,
    "deepseek-r1-qwen": ONE_DIGIT,
    "stablelm2": ONE_DIGIT,
    "tekken": Splitting((TEKKEN,), whole_words=True, adds_bos=True),
    "gpt-4o": Splitting((GPT4O,)),
    "deepseek-v3": Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3)),
    "falcon": Splitting((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
}


Description = tuple[dict[str, Any], dict[str, Any]]


def gguf_tokenizer(metadata: Mapping[str, Any], name: str) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes; raises what `gguf_description` does."""
    return LibraryTokenizer(*gguf_description(metadata, name), name)


def gguf_description(metadata: Mapping[str, Any], name: str) -> Description:
    """The content of a tokenizer.json and of a tokenizer_config.json. `name` is what errors call the file.

    Raises `CheckpointError` naming file and key, for an unknown kind of vocabulary or splitting too.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(metadata, name)
    if kind == "llama":
        return _sentencepiece(metadata, name)
    raise CheckpointError(f"{name}: tokenizer.ggml.model {kind!r} is not supported (gpt2, llama are)")


def _byte_level(metadata: Mapping[str, Any], name: str) -> Description:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    splitting = SPLITTINGS.get(pre) if isinstance(pre, str) else None
    if splitting is None:
        raise CheckpointError(f"{name}: tokenizer.ggml.pre {pre!r} is not supported ({', '.join(SPLITTINGS)} are)")
    tokens, types = _tokens(metadata, name)
    steps = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in splitting.expressions
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": splitting.whole_words,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": _list(metadata, "tokenizer.ggml.merges", str, name),
    }
    spec = {
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, byte_level]},
        "decoder": byte_level,
        "model": model,
    }
    return spec, _config(metadata, tokens, splitting.adds_bos, name)


def _sentencepiece(metadata: Mapping[str, Any], name: str) -> Description:
    tokens, types = _tokens(metadata, name)
    scores = _list(metadata, "tokenizer.ggml.scores", float, name)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{name}: tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    # llama.cpp puts the space at the start and after each control token; so did the tokenizers these models
    # were trained with.
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges_of_scores(
            {token: score for token, kind, score in zip(tokens, types, scores, strict=True) if kind == NORMAL}
        ),
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    shown = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    spec = {
        "added_tokens": _added(tokens, types),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": model,
    }
    return spec, _config(metadata, tokens, True, name)


def merges_of_scores(scores: Mapping[str, float]) -> list[list[str]]:
    """The merges that a vocabulary with scores implies: every cut of a piece into two pieces, best first.

    Pieces of one score merge in the order of the vocabulary.
    """
    order = {piece: index for index, piece in enumerate(scores)}
    found: list[tuple[float, int, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in order and right in order:
                found.append((-score, order[piece], order[left], order[right], left, right))
    found.sort()
    return [[left, right] for *_, left, right in found]


def _tokens(metadata: Mapping[str, Any], name: str) -> tuple[list[str], list[int]]:
    tokens = _list(metadata, "tokenizer.ggml.tokens", str, name)
    types = _list(metadata, "tokenizer.ggml.token_type", int, name)
    if not tokens or len(types) != len(tokens):
        raise CheckpointError(f"{name}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise CheckpointError(f"{name}: tokenizer.ggml.tokens lists {twice!r} twice")
    return tokens, types


def _list(metadata: Mapping[str, Any], key: str, kind: type, name: str) -> list[Any]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"{name}: {key} is {'missing' if values is None else 'malformed'}")
    return values


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"id": index, "content": token, "special": kind != USER_DEFINED, **PLAIN_TOKEN}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if token and kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _config(metadata: Mapping[str, Any], tokens: Sequence[str], adds_bos: bool, name: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": metadata.get("tokenizer.ggml.add_bos_token", adds_bos) is True,
        "add_eos_token": metadata.get("tokenizer.ggml.add_eos_token", False) is True,
    }
    for token, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id")):
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is None:
            continue
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise CheckpointError(f"{name}: tokenizer.ggml.{key} is {token_id!r}, of {len(tokens)} tokens")
        config[token] = tokens[token_id]
    return config
