"""Tokenizers made on the spot: small ones trained on the standard library's source, and the demo model's."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.text.load import TextSide, load_text
from tokenspeed.text.tokenizer import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHOWN = ["<think>", "</think>", "<tool_call>"]

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  lead and trail  ",
    "x = 1234567890 + 0x1F\n\tif x:\r\n\t\treturn [1, 2.5e-3]\n\n\n",
    "def f(a, *, b: int = 3) -> None:\n    '''don't, we'll, I'M'''\n    pass\n" * 3,
    "日本語のテキスト、中文字符。한국어",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 e\u0301 a\u0308\u0323 ﷽",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "nul \x00 bell \x07 \x7f \u200b \ufeff \u2028 \u00a0",
    " " * 300 + "x" + "\t" * 50 + "\n" * 40 + " ",
    "½ ² Ⅷ ٣ 一 １２３ 1٣2",
    "ß İ ǅ ﬁ Ω",
    "a" * 500,
]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:30]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return text[:400_000].splitlines(keepends=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def train(pre_tokenizer: Any, corpus: list[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A folder with a byte-level tokenizer.json that has every kind of added token."""
    folder = tmp_path_factory.mktemp("byte_level")
    made = train(pre_tokenizers.ByteLevel(add_prefix_space=False), corpus)
    made.add_tokens([tokenizers.AddedToken(content, normalized=False, special=False) for content in SHOWN])
    made.add_special_tokens(
        [
            tokenizers.AddedToken("<mask>", lstrip=True, normalized=False),
            tokenizers.AddedToken("<tail>", rstrip=True, normalized=False),
            tokenizers.AddedToken("WORD", single_word=True, normalized=False),
            tokenizers.AddedToken("<|im_start|>x", normalized=False),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(token, made.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")],
    )
    made.enable_truncation(8)
    made.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False, "normalized": False},
            "chat_template": "{{ messages[0]['content'] }}",
        },
    )
    return folder


@pytest.fixture(scope="session")
def spaced(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A folder with a tokenizer.json in the way of Llama 2: spaces as ▁, bytes for unknown characters."""
    folder = tmp_path_factory.mktemp("spaced")
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.train_from_iterator(
        [word for line in corpus[:3000] for word in line.split()],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    write_json(folder / "tokenizer.json", spec)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        },
    )
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A folder with a tokenizer.model: BPE, byte fallback, two user-defined symbols."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.rstrip("\n") for line in corpus[:4000] if line.strip()]),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    return folder


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A folder with a *.tiktoken file, its ranks trained here."""
    from tiktoken._educational import bpe_train  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("ranks")
    ranks = bpe_train("".join(corpus[:400]), 300, r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    lines = [base64.b64encode(data) + b" %d\n" % rank for data, rank in ranks.items()]
    (folder / "toy.tiktoken").write_bytes(b"".join(lines))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</think>"]
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "QWenTokenizer",
            "eos_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(300 + index): {"content": token, "special": token != "</think>"}
                for index, token in enumerate(tokens)
            },
        },
    )
    return folder


@pytest.fixture(scope="session")
def kimi_folder(tmp_path_factory: pytest.TempPathFactory, ranks_folder: Path) -> Path:
    """The same ranks as Kimi ships them: another file name, another tokenizer class, its own control tokens."""
    folder = tmp_path_factory.mktemp("kimi")
    (folder / "tiktoken.model").write_bytes((ranks_folder / "toy.tiktoken").read_bytes())
    tokens = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|tool_calls_section_begin|>"]
    decoder = {
        str(300 + index): {"content": token, "special": "tool" not in token} for index, token in enumerate(tokens)
    }
    config = {"tokenizer_class": "TikTokenTokenizer", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": decoder})
    return folder


def loaded(folder: Path) -> Tokenizer:
    return load_text(Source("hf", folder, "toy")).tokenizer


@pytest.fixture(scope="session")
def demo() -> TextSide:
    return load_text(resolve(None))


FOLDERS = ["byte_level", "spaced", "sentencepiece_folder", "ranks_folder", "kimi_folder"]


@pytest.fixture(scope="session", params=[*FOLDERS, "demo"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value = request.getfixturevalue(request.param)
    return value.tokenizer if isinstance(value, TextSide) else loaded(value)


@pytest.fixture(scope="session")
def oracle(byte_level: Path) -> Any:
    return AutoTokenizer.from_pretrained(byte_level)


@pytest.fixture(scope="session")
def toy(byte_level: Path) -> Tokenizer:
    return loaded(byte_level)
