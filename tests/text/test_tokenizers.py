"""Each backend against its oracle: the same ids, the same text back, and control only where it belongs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import regex
import sentencepiece
import tiktoken.load
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.tokenization_utils_base import generate_merges

from tests.text.conftest import SHOWN, SPECIAL, TEXTS, loaded, train, write_json
from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.errors import CheckpointError, InvalidRequest
from tokenspeed.text.gguf_vocab import SPLITTINGS, gguf_tokenizer
from tokenspeed.text.load import TextSide, load_text
from tokenspeed.text.spans import Span
from tokenspeed.text.tiktoken_ranks import PATTERNS
from tokenspeed.text.tokenizer import Tokenizer

MIXED = [
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a <mask> b<mask>c  <tail>   d<tail>",
    "WORD aWORD WORDb (WORD) WORD",
    "<|im_start|>x<|im_start|>y<|im_start|>",
    "<think>\nwhy</think>\n\n<tool_call>{}</tool_call>",
    "<|im_<|im_end|>start|><|im_end|><|im_end|>",
    *TEXTS,
]

CONTROL_LIKE = st.sampled_from(
    [*SPECIAL, *SHOWN, "<mask>", "<tail>", "WORD", "<s>", "</s>", "<unk>", "<|im_", "|>", "<0x0A>"]
)
# Characters of Unicode versions that are newer than this Python's are words or not depending on the library's version.
KNOWN = st.characters(exclude_categories=("Cs", "Cn"))
WORDS = st.lists(st.one_of(st.text(KNOWN, max_size=6), CONTROL_LIKE, st.sampled_from([" ", "\n", "  "])), max_size=8)
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def demo_oracle() -> Any:
    """transformers' reading of the demo file, with the digits split as the model's own tokenizer does.

    transformers gives the pre-tokenizer "smollm" GPT-2's, which keeps digits together.
    """
    path = resolve(None).path
    oracle = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    pre = tokenizers.pre_tokenizers
    oracle.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    return oracle


def ids_of(oracle: Any, text: str) -> list[int]:
    return list(oracle.encode(text, add_special_tokens=False))


@pytest.fixture(scope="session")
def pairs(request: pytest.FixtureRequest) -> dict[str, tuple[Tokenizer, Any]]:
    folders = {name: request.getfixturevalue(name) for name in ("byte_level", "spaced")}
    made = {name: (loaded(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()}
    made["demo"] = (request.getfixturevalue("demo").tokenizer, demo_oracle())
    return made


@pytest.mark.parametrize("name", ["byte_level", "spaced", "demo"])
def test_ids_and_text_equal_transformers(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, oracle = pairs[name]
    for text in MIXED:
        ids = ids_of(oracle, text)
        assert ours.encode(text, parse_special=True) == ids
        assert ours.encode_spans([Span(text, False)]) == ids
        for skip in (False, True):
            shown = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == shown
    assert ours.vocab_size == len(oracle)
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    flagged = {index for index, token in oracle.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == flagged


@FEW
@given(words=WORDS, name=st.sampled_from(["byte_level", "spaced", "demo"]))
@example(words=["¹", "WORD"], name="byte_level")
@example(words=["e\u0301", "WORD", "\u200d"], name="byte_level")
def test_random_text_equals_transformers(pairs: dict[str, tuple[Tokenizer, Any]], words: list[str], name: str) -> None:
    ours, oracle = pairs[name]
    text = "".join(words)
    assert ours.encode(text, parse_special=True) == ids_of(oracle, text)


@pytest.mark.parametrize("name", ["byte_level", "spaced", "demo"])
def test_prefix_and_suffix_are_those_of_the_checkpoint(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    ours, oracle = pairs[name]
    if name == "byte_level":
        oracle.backend_tokenizer.no_truncation()
    if name == "spaced":
        # Asked for by tokenizer_config.json, which transformers 5 does not read beside a tokenizer.json.
        oracle.add_bos_token = True
    for text in ("", "Hello there", "x" * 40):
        assert ours.encode(text, add_special_tokens=True) == oracle.encode(text)
    assert bool(ours.prefix_ids) == (name != "demo")


def test_the_demo_model_splits_digits_one_by_one(demo: TextSide) -> None:
    # Ids of the published tokenizer.json of SmolLM2-135M-Instruct.
    assert demo.tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert demo.tokenizer.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert demo.tokenizer.encode("  multiple   spaces") == [216, 2701, 256, 5600]


def test_text_survives_every_tokenizer(any_tokenizer: Tokenizer) -> None:
    for text in MIXED:
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids, skip_special_tokens=False) == text
        assert b"".join(any_tokenizer.token_bytes(token_id) for token_id in ids).decode().lstrip(" ") == text.lstrip(
            " "
        )


@FEW
@given(words=WORDS)
@example(words=["▁"])
def test_request_text_never_becomes_control(any_tokenizer: Tokenizer, words: list[str]) -> None:
    control = set(any_tokenizer.control.values())
    assert control
    text = "".join(words)
    for ids in (any_tokenizer.encode(text), any_tokenizer.encode_spans([Span(text, True)])):
        assert not control.intersection(ids)
        assert any_tokenizer.decode(ids, skip_special_tokens=False) == writable(any_tokenizer, text)


@lru_cache
def missing_bytes(tokenizer: Tokenizer) -> frozenset[int]:
    singles = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)}
    return frozenset(byte for byte in range(256) if bytes((byte,)) not in singles)


def writable(tokenizer: Tokenizer, text: str) -> str:
    """The text as the vocabulary can say it: the demo model has no token for 21 bytes, and where tokens write a space
    as ▁ (U+2581), a ▁ of the text is one too, in transformers and sentencepiece alike."""
    if tokenizer.encode("a▁b") == tokenizer.encode("a b"):
        text = text.replace("▁", " ")
    lost = missing_bytes(tokenizer)
    return bytes(byte for byte in text.encode() if byte not in lost).decode("utf-8", "replace")


def test_every_added_token_is_text_in_a_request_and_control_in_a_template(any_tokenizer: Tokenizer) -> None:
    for content, token_id in any_tokenizer.control.items():
        assert token_id not in any_tokenizer.encode(content)
        assert token_id not in any_tokenizer.encode(f"a {content} b")
        assert any_tokenizer.encode(content, parse_special=True) == [token_id]
        spans = [Span("x ", False), Span(content, False), Span(" ", False), Span(content, True), Span(" y", True)]
        assert any_tokenizer.encode_spans(spans).count(token_id) == 1
        half = len(content) // 2
        straddling = [Span(content[:half], False), Span(content[half:], True)]
        assert token_id not in any_tokenizer.encode_spans(straddling)
        joined = [Span(content[:half], False), Span("", True), Span(content[half:], False)]
        assert any_tokenizer.encode_spans(joined) == [token_id]


@FEW
@given(texts=st.lists(st.text(alphabet="ab <|im_startend>\né😀1", max_size=8), max_size=6), data=st.data())
def test_spans_without_control_in_the_request_equal_the_whole(
    any_tokenizer: Tokenizer, texts: list[str], data: st.DataObject
) -> None:
    spans = [Span(text, data.draw(st.booleans())) for text in texts]
    spans.insert(data.draw(st.integers(0, len(spans))), Span("<|im_end|>", False))
    whole = "".join(span.text for span in spans)
    others = [whole.count(spelling) for spelling in any_tokenizer.control if spelling != "<|im_end|>"]
    if whole.count("<|im_end|>") == 1 and not any(others):
        assert any_tokenizer.encode_spans(spans) == any_tokenizer.encode(whole, parse_special=True)


def test_sentencepiece_ids_equal_the_library_and_transformers(sentencepiece_folder: Path) -> None:
    ours = loaded(sentencepiece_folder)
    library = sentencepiece.SentencePieceProcessor()
    library.load(str(sentencepiece_folder / "tokenizer.model"))
    size = library.get_piece_size()
    vocab = {library.id_to_piece(index): index for index in range(size)}
    scores = {piece: library.get_score(index) for piece, index in vocab.items()}
    oracle = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text)
        # transformers leaves the leading space out where the text begins with one; the library does not.
        if not text.startswith((" ", "▁")):
            assert ours.encode(text) == ids_of(oracle, text)
    assert ours.control == {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}
    assert ours.special_ids == {0, 1, 2}
    assert ours.encode("hi", add_special_tokens=True) == [1, *library.encode("hi")]
    after = ours.encode_spans([Span("<|im_start|>hi", False)])
    assert [library.id_to_piece(token_id) for token_id in after][:1] == ["<|im_start|>"]
    assert not library.id_to_piece(after[1]).startswith("▁")


def test_tiktoken_ids_equal_the_library_and_transformers(ranks_folder: Path) -> None:
    ours = loaded(ranks_folder)
    ranks = tiktoken.load.load_tiktoken_bpe(str(ranks_folder / "toy.tiktoken"))
    pattern = ours._encoding._pat_str  # type: ignore[attr-defined]
    library = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(ours.control))
    oracle = TikTokenConverter(str(ranks_folder / "toy.tiktoken"), pattern=pattern).converted()
    for text in TEXTS:
        assert ours.encode(text) == library.encode_ordinary(text) == oracle.encode(text).ids
    for text in MIXED:
        assert ours.encode(text, parse_special=True) == library.encode(text, allowed_special="all")
    assert ours.eos_token_id == 300
    assert ours.special_ids == {300, 301, 302}
    assert ours.control["</think>"] == 303


def test_kimi_ids_equal_the_library_and_transformers(kimi_folder: Path) -> None:
    ours = loaded(kimi_folder)
    ranks = tiktoken.load.load_tiktoken_bpe(str(kimi_folder / "tiktoken.model"))
    pattern = PATTERNS["TikTokenTokenizer"]
    library = tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(ours.control))
    oracle = TikTokenConverter(str(kimi_folder / "tiktoken.model"), pattern=pattern).converted()
    for text in [*TEXTS, "a<|im_end|>b [EOS]"]:
        assert ours.encode(text) == library.encode_ordinary(text) == oracle.encode(text).ids
        assert ours.encode(text, parse_special=True) == library.encode(text, allowed_special="all")
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (300, 301) and ours.special_ids == {300, 301, 302, 303}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def fooBar(x): return HTTPServer", ["def", " foo", "Bar", "(x", "):", " return", " HTTPServer"]),
        ("我们don't 说English123456", ["我们", "don't", " ", "说", "English", "123", "456"]),
        ("ça va été ΑΒγ かなカナ漢字", ["ça", " va", " été", " ΑΒγ", " かなカナ", "漢字"]),
        ("x  =  1\r\n\n  y", ["x", " ", " =", " ", " ", "1", "\r\n\n", " ", " y"]),
    ],
)
def test_kimi_cuts_text_at_han_characters_and_where_small_letters_end(text: str, words: list[str]) -> None:
    assert regex.findall(PATTERNS["TikTokenTokenizer"], text, regex.V1) == words


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_byte_level_equals_the_tokenizer_it_was_made_from(corpus: list[str], pre: str) -> None:
    steps = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
        for expression in SPLITTINGS[pre].expressions
    ]
    last = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = train(tokenizers.pre_tokenizers.Sequence([*steps, last]), corpus)
    spec = json.loads(made.to_str())
    metadata = gguf_metadata(spec["model"]["vocab"], pre)
    metadata["tokenizer.ggml.merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    ours = gguf_tokenizer(metadata, "toy.gguf")
    for text in MIXED[:1] + TEXTS:
        assert ours.encode(text, parse_special=True) == made.encode(text).ids
        assert ours.decode(made.encode(text).ids, skip_special_tokens=False) == text
    assert ours.special_ids == {0, 1, 2}


def gguf_metadata(vocab: dict[str, int], pre: str) -> dict[str, Any]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.eos_token_id": vocab[SPECIAL[2]],
    }


def test_gguf_sentencepiece_equals_transformers_and_the_library(sentencepiece_folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor()
    library.load(str(sentencepiece_folder / "tokenizer.model"))
    size = library.get_piece_size()
    tokens = [library.id_to_piece(index) for index in range(size)]
    kinds = [2, 3, 3, 4, 4] + [6 if library.is_byte(index) else 1 for index in range(5, size)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [library.get_score(index) for index in range(size)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = gguf_tokenizer(metadata, "toy.gguf")
    assert (ours.bos_token_id, ours.eos_token_id, ours.prefix_ids) == (1, 2, (1,))
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(library.encode(text)) == text
    bare = gguf_tokenizer({**metadata, "tokenizer.ggml.add_space_prefix": False}, "toy.gguf")
    assert bare.encode(" hi") == ours.encode("hi")


@pytest.mark.parametrize("pre", sorted(SPLITTINGS))
def test_every_known_splitting_compiles_and_keeps_text(demo: TextSide, pre: str) -> None:
    ours = gguf_tokenizer(small_byte_metadata(pre), "toy.gguf")
    for text in TEXTS:
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def small_byte_metadata(pre: str) -> dict[str, Any]:
    vocab = {
        token: index for index, token in enumerate([*SPECIAL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])
    }
    return {**gguf_metadata(vocab, pre), "tokenizer.ggml.merges": []}


def edited(metadata: dict[str, Any], **changes: Any) -> dict[str, Any]:
    names = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in {**metadata, **names}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre 'unheard-of'"),
        ({"model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "'a' twice"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges"),
        ({"merges": ["zz zz"]}, "toy.gguf"),
        ({"eos_token_id": 10_000}, "tokenizer.ggml.eos_token_id"),
        ({"model": "llama"}, "tokenizer.ggml.scores"),
    ],
)
def test_a_broken_gguf_vocabulary_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=r"^toy\.gguf: .*") as caught:
        gguf_tokenizer(edited(small_byte_metadata("smollm"), **changes), "toy.gguf")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 1, 100, 5000, -2])
def test_a_truncated_tokenizer_json_is_named(byte_level: Path, tmp_path: Path, cut: int) -> None:
    data = (byte_level / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not valid JSON") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": "x", "merges": []}},
        {"model": {"type": "Unheard", "vocab": {"a": 0}}},
        {"added_tokens": [{"id": 0}]},
        {"added_tokens": 7},
        {"added_tokens": [{"id": 5000, "content": "<far>"}]},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": None},
    ],
)
def test_a_wrong_tokenizer_json_is_named(byte_level: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    spec = json.loads((byte_level / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "tokenizer.json", {**spec, **change})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: ") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_broken_tokenizer_files_are_named(sentencepiece_folder: Path, ranks_folder: Path, tmp_path: Path) -> None:
    def refused(name: str, data: bytes, config: dict[str, Any], expected: str) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / name).write_bytes(data)
        write_json(tmp_path / "tokenizer_config.json", config)
        with pytest.raises(CheckpointError, match=expected) as caught:
            loaded(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)

    model = (sentencepiece_folder / "tokenizer.model").read_bytes()
    ranks = (ranks_folder / "toy.tiktoken").read_bytes()
    qwen = {"tokenizer_class": "QWenTokenizer"}
    refused("tokenizer.model", model[: len(model) // 2], {}, "tokenizer.model: ")
    refused("tokenizer.model", b"\xff" * 50, {}, "tokenizer.model: ")
    refused("toy.tiktoken", ranks, {"tokenizer_class": "Unheard"}, "tokenizer_class Unheard")
    refused("toy.tiktoken", ranks[:100], qwen, "toy.tiktoken: ")
    refused("toy.tiktoken", b"!!! 0\n", qwen, "line 1")
    refused("toy.tiktoken", ranks, {**qwen, "added_tokens_decoder": {"5": {"content": "<x>"}}}, "<x>")
    refused("toy.tiktoken", ranks, {**qwen, "added_tokens_decoder": {"a": 5}}, "added_tokens_decoder")
    refused("other.txt", b"", {}, "no tokenizer.json")


def test_ids_past_the_vocabulary_stand_for_nothing(any_tokenizer: Tokenizer) -> None:
    for token_id in (any_tokenizer.vocab_size, 2**63):
        assert any_tokenizer.token_bytes(token_id) == b""
    with pytest.raises(InvalidRequest, match="negative"):
        any_tokenizer.token_bytes(-1)


def test_text_that_is_none_is_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        any_tokenizer.encode("a\ud800b")


def test_loading_the_demo_tokenizer_needs_no_torch() -> None:
    code = (
        "import sys, tokenspeed.text.load, tokenspeed.text.stopping; from tokenspeed.checkpoint.source import resolve; "
        "tokenspeed.text.load.load_text(resolve(None)); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_prompt_of_many_control_candidates_is_encoded_in_linear_time(demo: TextSide) -> None:
    text = "<|im_" * 40_000
    start = time.perf_counter()
    demo.tokenizer.encode(text, parse_special=True)
    assert time.perf_counter() - start < 5


def test_very_long_runs_are_encoded_and_survive(any_tokenizer: Tokenizer) -> None:
    for character in (" ", "\n", "a", "1"):
        text = "x" + character * 60_000 + "y"
        start = time.perf_counter()
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text
        assert time.perf_counter() - start < 10


def test_a_million_blanks_do_not_overflow_the_stack_of_tiktoken(ranks_folder: Path) -> None:
    text = "x" + " " * 1_000_000 + "y" * 1_000_000
    ours = loaded(ranks_folder)
    assert ours.decode(ours.encode(text)) == text


def test_one_tokenizer_serves_threads_alike(demo: TextSide) -> None:
    texts = [f"{text} {index}" for index in range(20) for text in TEXTS]
    random.Random(3).shuffle(texts)
    expected = [demo.tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(demo.tokenizer.encode, texts)) == expected


def test_a_gguf_path_or_folder_can_be_the_tokenizer_of_another_checkpoint(byte_level: Path) -> None:
    demo_path = resolve(None).path
    side = load_text(Source("hf", byte_level, "toy"), tokenizer=str(demo_path))
    assert side.tokenizer.vocab_size == 49_152
    assert side.template is not None
    assert "SmolLM" in side.template.sources["default"]
    with GGUFFile(demo_path) as file:
        assert side.template.sources["default"] == file.metadata["tokenizer.chat_template"]
    other = load_text(resolve(None), tokenizer=str(byte_level))
    assert other.tokenizer.vocab_size == loaded(byte_level).vocab_size
    with pytest.raises(CheckpointError, match="--tokenizer /nowhere"):
        load_text(resolve(None), tokenizer="/nowhere")
