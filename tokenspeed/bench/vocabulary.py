"""A checkpoint's text side made on the spot: a byte-level vocabulary of any size, a chat template, no weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenspeed.text.hf import BYTE_OF_CHARACTER

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHOWN = ("<tool_call>", "</tool_call>")
SYLLABLES = [head + tail for head in "bcdfghklmnprstvz" for tail in ("a", "e", "i", "o", "u", "an", "er", "is")]
SPACE = "Ġ"
TEMPLATE = """\
{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


def write_checkpoint(folder: Path, size: int, max_model_len: int) -> None:
    """The files of a model with `size` tokens, as far as a front end reads them."""
    vocab, merges = _pieces(size - len(SPECIAL) - len(SHOWN))
    added = [
        {"id": len(vocab) + index, "content": token, "special": token in SPECIAL, "normalized": False}
        for index, token in enumerate((*SPECIAL, *SHOWN))
    ]
    spec = {
        "added_tokens": [{"lstrip": False, "rstrip": False, "single_word": False, **token} for token in added],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    config = {**CONFIG, "vocab_size": size, "max_position_embeddings": max_model_len}
    for name, value in (("tokenizer.json", spec), ("tokenizer_config.json", settings), ("config.json", config)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def text(source: random.Random, words: int) -> str:
    """Random words; one in sixteen is of characters of three or four bytes."""
    return "".join([_foreign(source) if not source.randrange(16) else f" {_word(source)}" for _ in range(words)])


def _pieces(size: int) -> tuple[dict[str, int], list[list[str]]]:
    """Bytes, then words as they grow letter by letter: every begin of a word is a token, and so is the word."""
    vocab = {character: index for index, character in enumerate(BYTE_OF_CHARACTER)}
    merges: list[list[str]] = []
    source = random.Random(0)
    while len(vocab) < size:
        word = SPACE + _word(source)
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab and len(vocab) < size:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    return vocab, merges


def _word(source: random.Random) -> str:
    return "".join(source.choices(SYLLABLES, k=source.randrange(1, 4)))


def _foreign(source: random.Random) -> str:
    start = source.choice((0x4E00, 0x3042, 0x0430, 0x1F600))
    return "".join([chr(start + source.randrange(32)) for _ in range(2)])
