"""What a request asks for and what comes back: plain data that crosses processes.

`SamplingParams` is one schema for every door (HTTP, gRPC, Python). It is checked once where it enters
the front end and once more at the engine's door.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from tokenspeed.errors import InvalidRequest

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_BIAS_ENTRIES = 1024
MAX_SEED = 2**63
MAX_GRAMMAR_BYTES = 8 << 20

GrammarKind = Literal["json_schema", "regex", "ebnf", "choice", "structural_tag"]

_PATH = re.compile(r"`\$\.(\w+)")


class Grammar(msgspec.Struct, frozen=True):
    """What the text of an answer must match, from its first token to its last.

    `text` is a JSON schema (JSON text), a regular expression for the whole answer, a grammar in the EBNF of llama.cpp
    with a rule `root`, a JSON array of the texts to choose from, or a format of xgrammar's structural tags (JSON text).
    `field` is where a request asks for it, for error messages. Without `strict` what of a JSON schema cannot be
    enforced is left out instead of refused. Before it the answer has a `thinking`, of any text up to the second of
    `marks`: one that the prompt has opened, or one that the answer may open.
    """

    kind: GrammarKind
    text: str
    field: str = "grammar"
    strict: bool = True
    thinking: Literal["none", "opened", "allowed"] = "none"
    marks: tuple[str, str] = ("<think>", "</think>")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How the tokens of one request are chosen and when they end.

    `temperature` 0 is greedy. `top_k` 0 or −1 is off. `max_tokens` None is the rest of the context.
    `logprobs` k gives the chosen token's log-probability and the k most likely ones (0: only the chosen
    one); `prompt_logprobs` likewise for the prompt, which is then computed without prefix hits.
    `bad_words` are texts, `bad_word_ids` their token sequences, filled in by whoever has the tokenizer.
    `shown_special_ids` are special tokens whose text is shown although `skip_special_tokens` hides the others.
    `grammar` masks every token with which the text could not match; the answer ends where nothing more may follow.
    Log-probabilities are those of the model, before temperature, penalties and masks.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True
    shown_special_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    grammar: Grammar | None = None

    @property
    def greedy(self) -> bool:
        """True when no randomness is involved."""
        return self.temperature == 0.0

    def check(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range for this vocabulary."""
        self._check_types()
        _between("temperature", self.temperature, 0.0, 100.0)
        if not -1 <= self.top_k < 2**31:
            raise InvalidRequest(f"top_k must be −1 (off), 0 (off) or positive, got {self.top_k}", param="top_k")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}", param="top_p")
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if not 1 <= self.n <= MAX_N:
            raise InvalidRequest(f"n must be between 1 and {MAX_N}, got {self.n}", param="n")
        self._check_lengths()
        self._check_ids(vocab_size)
        _bounded_count("logprobs", self.logprobs, MAX_LOGPROBS)
        _bounded_count("prompt_logprobs", self.prompt_logprobs, MAX_LOGPROBS)
        if self.seed is not None and not -MAX_SEED <= self.seed < MAX_SEED:
            raise InvalidRequest(f"seed must fit a signed 64-bit integer, got {self.seed}", param="seed")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}", param="stop")
        for text in self.stop:
            if not text or len(text.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES:
                raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_BYTES} bytes", param="stop")
        if self.grammar is not None and len(self.grammar.text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
            field = self.grammar.field
            raise InvalidRequest(f"{field} must have at most {MAX_GRAMMAR_BYTES} bytes", param=field)

    def _check_types(self) -> None:
        """A struct made in Python holds whatever it was given; one from the wire is what it says."""
        try:
            msgspec.convert(msgspec.to_builtins(self, builtin_types=()), SamplingParams, strict=True)
        except (msgspec.ValidationError, TypeError, OverflowError) as error:
            path = _PATH.search(str(error))
            raise InvalidRequest(str(error), param=path[1] if path else None) from error

    def _check_lengths(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {self.max_tokens}", param="max_tokens")
        if self.min_tokens < 0:
            raise InvalidRequest(f"min_tokens must not be negative, got {self.min_tokens}", param="min_tokens")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})", param="min_tokens"
            )

    def _check_ids(self, vocab_size: int) -> None:
        _ids_in_vocabulary("stop_token_ids", self.stop_token_ids, vocab_size)
        _ids_in_vocabulary("shown_special_ids", self.shown_special_ids, vocab_size)
        for sequence in self.bad_word_ids:
            if not sequence:
                raise InvalidRequest("bad_word_ids has an empty sequence", param="bad_word_ids")
            _ids_in_vocabulary("bad_words", sequence, vocab_size)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must not be empty", param="allowed_token_ids")
            _ids_in_vocabulary("allowed_token_ids", self.allowed_token_ids, vocab_size)
            banned = {sequence[0] for sequence in self.bad_word_ids if len(sequence) == 1}
            if banned.issuperset(self.allowed_token_ids):
                raise InvalidRequest("bad_words bans every allowed token", param="bad_words")
        if len(self.logit_bias) > MAX_BIAS_ENTRIES:
            raise InvalidRequest(f"logit_bias has more than {MAX_BIAS_ENTRIES} entries", param="logit_bias")
        _ids_in_vocabulary("logit_bias", tuple(self.logit_bias), vocab_size)
        for bias in self.logit_bias.values():
            _between("logit_bias", bias, -100.0, 100.0)


def _between(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low:g} and {high:g}, got {value}", param=name)


def _bounded_count(name: str, value: int | None, high: int) -> None:
    if value is not None and not 0 <= value <= high:
        raise InvalidRequest(f"{name} must be between 0 and {high}, got {value}", param=name)


def _ids_in_vocabulary(name: str, ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{name} has token id {token_id}; the vocabulary has ids 0 to {vocab_size - 1}", param=name
            )


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one position: the token there and the most likely ones, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class RequestOutput(msgspec.Struct, kw_only=True):
    """What one choice of a request gained since its last output: `text` and `token_ids` are deltas.

    `finish_reason` is set on the last output of a choice. `stop_reason` is the stop token id or stop
    string that ended it, None for end-of-sequence. `prompt_logprobs` comes once, with the first output;
    its first entry is None because nothing precedes the first token.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
