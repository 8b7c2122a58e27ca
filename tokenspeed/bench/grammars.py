"""Structured output: what a mask costs a row, and how long a new schema of many tools keeps the event loops.

The vocabulary is that of the embedded model, filled up to the asked size with pairs of its words. A row's time is that
of accepting one token and filling the mask of the next, along a call with a long argument; the table gives processor
time, so that a busy machine does not count. Then many rows of a step, of a grammar that is dear to follow. Lag is how
much later than asked an event loop came back from a sleep of 1 ms, at most: without work, while the front end's process
waits for the verdict, while the engine compiles, and while the rows move on.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Awaitable
from typing import Any

import numpy as np

from tokenspeed.batch import Finish
from tokenspeed.checkpoint.source import resolve
from tokenspeed.engine.grammars import TOO_SLOW, Constraint, Grammars
from tokenspeed.engine.messages import Learn
from tokenspeed.engine.moves import Moves
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.compiler import GrammarCompiler
from tokenspeed.text.grammars.vocabulary import Vocabulary
from tokenspeed.text.load import load_text
from tokenspeed.text.parsers.answer_grammar import Calls, answer_grammar
from tokenspeed.text.parsers.choose import AnswerFormat
from tokenspeed.text.tokenizer import Tokenizer

EOS = 2
TEXT = "def add(first, second):\\n    return first + second  # the sum of \\\"two\\\" numbers\\n" * 4
REPEATS = 7
DEAR = Grammar("regex", "([a-z]{1,20}[ ,.]){1,500}")
DEAR_TEXT = "the quick brown fox jumps over the lazy dog and runs away from here"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    parser.add_argument("--vocab-size", type=int, default=131_072, help="tokens (default %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="rows of the dear step (default %(default)s)")
    parser.add_argument("--tools", type=int, default=100, help="tools of the schema (default %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Measure and print; the return value is the exit status."""
    asyncio.run(_measure(options.vocab_size, options.tools, options.rows))
    return 0


async def _measure(vocab_size: int, num_tools: int, num_rows: int) -> None:
    tokenizer = load_text(resolve(None, "auto")).tokenizer
    vocabulary = _vocabulary(tokenizer, vocab_size)
    grammar = _demanded(num_tools)
    quiet, _ = await _lag(asyncio.sleep(1.0))
    compiler = GrammarCompiler(lambda: vocabulary, seconds=60.0)
    try:
        await compiler.compile(Grammar("regex", "a"))  # starts the process
        began = time.perf_counter()
        front, rules = await _lag(compiler.compile(grammar))
        judged = time.perf_counter() - began
    finally:
        await compiler.close()
    engine = Grammars()
    await engine.learn(Learn(0, b"first", (await _rules(vocabulary, Grammar("regex", "a"))), vocabulary))
    began = time.perf_counter()
    back, learnt = await _lag(engine.learn(Learn(1, rules.key, rules.rules, vocabulary)))
    compiled = time.perf_counter() - began
    assert learnt.held, learnt.error
    rows = [_row(engine, rules.key, tokenizer) for _ in range(REPEATS)]
    dear = await _rules(vocabulary, DEAR)
    await engine.learn(Learn(2, b"dear", dear, vocabulary))
    steps = await _steps([engine.follow(b"dear", {EOS}) for _ in range(num_rows)], tokenizer.encode(DEAR_TEXT))
    engine.close()
    best: np.ndarray[Any, Any] = np.array(rows).min(axis=0) * 1e6
    print(f"{vocab_size} tokens, {num_tools} tools, rules of {len(rules.rules) / 1e3:.0f} kB")
    print(f"verdict in the front end's process   {judged:8.3f} s, lag of its loop {front * 1e3:.1f} ms")
    print(f"compiled in the engine               {compiled:8.3f} s, lag of its loop {back * 1e3:.1f} ms")
    print(f"lag of a loop without work                       {quiet * 1e3:.1f} ms")
    median, high = np.percentile(best, [50, 90])
    print(f"a token and its mask: median {median:.1f} µs, 90% {high:.1f}, most {best.max():.1f}")
    print(f"a step of {num_rows} dear rows: median {steps[0] * 1e3:.1f} ms, lag of its loop {steps[1] * 1e3:.1f} ms")


async def _steps(rows: list[Constraint], tokens: list[int]) -> tuple[float, float]:
    """Median seconds of moving all rows on by a token, and the median of the loop's worst lag of each."""
    moves, seconds, lags = Moves(), [], []
    for token in tokens:
        began = time.perf_counter()
        lag, _ = await _lag(moves.make([(row, token) for row in rows]))
        seconds.append(time.perf_counter() - began)
        lags.append(lag)
        ended = [row for row in rows if row.settle(Finish.NONE) != Finish.NONE]
        assert not ended or ended[0].error == f"the grammar of this request {TOO_SLOW}"
    return float(np.median(seconds)), float(np.median(lags))


async def _rules(vocabulary: Vocabulary, grammar: Grammar) -> str:
    compiler = GrammarCompiler(lambda: vocabulary)
    try:
        return (await compiler.compile(grammar)).rules
    finally:
        await compiler.close()


async def _lag(work: Awaitable[Any]) -> tuple[float, Any]:
    """How late the loop was at most while `work` ran, in seconds, and what it gave."""
    worst = 0.0
    task = asyncio.ensure_future(work)
    while not task.done():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        worst = max(worst, time.perf_counter() - began - 0.001)
    return worst, task.result()


def _vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(min(tokenizer.vocab_size, size))]
    tokens[EOS] = b""
    known, draw = set(tokens), random.Random(1)
    words = [token for token in tokens if 2 <= len(token) <= 8 and token.strip().isalpha()]
    while len(tokens) < size:
        pair = draw.choice(words) + draw.choice(words)
        if pair not in known:
            known.add(pair)
            tokens.append(pair)
    sizes = np.fromiter(map(len, tokens), dtype="<i4", count=size)
    return Vocabulary(size, EOS, b"".join(tokens), sizes.tobytes())


def _demanded(num_tools: int) -> Grammar:
    schemas = {f"tool_{index}": _schema(index) for index in range(num_tools)}
    calls = Calls(schemas, frozenset(schemas), demanded=True, named=None, parallel=True)
    grammar = answer_grammar(AnswerFormat("hermes", None), None, calls, "")
    assert grammar is not None
    return grammar


def _schema(index: int) -> dict[str, Any]:
    item = {"type": "object", "properties": {"k": {"type": "string"}, "v": {"type": ["string", "null"]}}}
    return {
        "type": "object",
        "properties": {
            f"text_{index}": {"type": "string", "description": "what to write"},
            "count": {"type": "integer", "minimum": 0, "maximum": 10_000},
            "mode": {"enum": ["read", "write", f"mode_{index}"]},
            "options": {"type": "array", "items": item},
        },
        "required": [f"text_{index}"],
    }


def _row(engine: Grammars, key: bytes, tokenizer: Tokenizer) -> list[float]:
    text = f'<tool_call>\n{{"name": "tool_0", "arguments": {{"text_0": "{TEXT}", "count": 12, "mode": "read"}}}}\n'
    constraint = engine.follow(key, {EOS})
    seconds = []
    for token in tokenizer.encode(text):
        began = time.thread_time()
        constraint.move(token)
        seconds.append(time.thread_time() - began)
        constraint.settle(Finish.NONE)
    assert constraint.error is None
    return seconds
