"""Streaming completions against any OpenAI-compatible server: TTFT, inter-token latency, throughput.

A closed loop: each of `concurrency` clients sends its next request when the last one ended. Prompts are random
words cut to the wanted number of tokens by the server's own /tokenize; end-of-sequence is ignored, so every
answer has the wanted length. One request before each level warms up and is not counted. With `--turns` every prompt
begins a conversation: a later turn is all of the one before, its answer, and some words more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

_WORD_LIST = (
    "river stone window garden paper silver market bridge winter letter engine forest music copper island "
    "candle shadow ticket harbor planet mirror ladder cotton signal thunder basket velvet compass orchard "
    "lantern meadow anchor pepper blanket canyon feather hammer journey kitten magnet needle ocean pocket "
    "quartz rocket saddle tunnel valley walnut yellow zipper amber bottle castle dragon ember falcon glacier"
)
WORDS = tuple(_WORD_LIST.split())
TIMEOUT_SECONDS = 3600.0
MORE_WORDS = 16
"""What the user of a conversation says in a later turn."""


class BenchError(Exception):
    """The benchmark cannot run; the message is one line."""


@dataclass
class Sample:
    """One request. Times are in seconds; `gaps` are between chunks with text."""

    ttft: float | None = None
    gaps: list[float] = field(default_factory=list)
    decode_seconds: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    turn: int = 0
    text: str = ""
    error: str | None = None


@dataclass
class Level:
    """All requests of one concurrency, and how long they took together."""

    concurrency: int
    samples: list[Sample]
    seconds: float

    def summary(self) -> dict[str, float | int]:
        """The figures of one row: milliseconds, tokens a second."""
        good = [sample for sample in self.samples if sample.error is None]
        ttft = sorted(sample.ttft for sample in good if sample.ttft is not None)
        gaps = sorted(gap for sample in good for gap in sample.gaps)
        rates = sorted((s.output_tokens - 1) / s.decode_seconds for s in good if s.decode_seconds > 0)
        output = sum(sample.output_tokens for sample in good)
        prompt = sum(sample.prompt_tokens for sample in good)
        later = [sample for sample in good if sample.turn]
        again = sum(sample.prompt_tokens for sample in later)
        return {
            "concurrency": self.concurrency,
            "requests": len(self.samples),
            "errors": len(self.samples) - len(good),
            "ttft_p50_ms": percentile(ttft, 50) * 1e3,
            "ttft_p99_ms": percentile(ttft, 99) * 1e3,
            "itl_p50_ms": percentile(gaps, 50) * 1e3,
            "itl_p99_ms": percentile(gaps, 99) * 1e3,
            "stream_tok_s_p50": percentile(rates, 50),
            "output_tok_s": output / self.seconds,
            "total_tok_s": (output + prompt) / self.seconds,
            "output_tokens": output,
            "prompt_tokens": prompt,
            "cached_tokens": sum(sample.cached_tokens for sample in good),
            "later_hit": sum(sample.cached_tokens for sample in later) / again * 100 if again else 0.0,
            "seconds": self.seconds,
        }


COLUMNS = (
    ("concurrency", "users", "{:d}"),
    ("requests", "requests", "{:d}"),
    ("errors", "errors", "{:d}"),
    ("ttft_p50_ms", "TTFT p50 ms", "{:.1f}"),
    ("ttft_p99_ms", "p99", "{:.1f}"),
    ("itl_p50_ms", "ITL p50 ms", "{:.2f}"),
    ("itl_p99_ms", "p99", "{:.2f}"),
    ("stream_tok_s_p50", "tok/s a stream", "{:.1f}"),
    ("output_tok_s", "output tok/s", "{:.1f}"),
    ("total_tok_s", "total tok/s", "{:.1f}"),
    ("later_hit", "later turns cached %", "{:.1f}"),
    ("seconds", "seconds", "{:.1f}"),
)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of sorted values, 0 if there are none."""
    if not ordered:
        return 0.0
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


class Client:
    """One server, one model."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str | None) -> None:
        self._session = session
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model

    @property
    def model(self) -> str:
        """The model that is asked; known after `connect`."""
        if self._model is None:
            raise BenchError("not connected")
        return self._model

    async def connect(self) -> None:
        """Find the model's name, or raise `BenchError` that says why the server cannot be used."""
        try:
            async with self._session.get(f"{self._url}/v1/models") as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            raise BenchError(f"cannot reach {self._url}: {error or type(error).__name__}") from None
        if response.status != 200:
            raise BenchError(
                f"{self._url}/v1/models answered {response.status}: {body[:200].decode('utf-8', 'replace')}"
            )
        try:
            names = [model["id"] for model in msgspec.json.decode(body)["data"]]
        except (msgspec.DecodeError, KeyError, TypeError):
            raise BenchError(f"{self._url} is no OpenAI-compatible server: /v1/models has no list of models") from None
        if self._model is None:
            if not names:
                raise BenchError(f"{self._url} serves no model")
            self._model = names[0]
        elif self._model not in names:
            raise BenchError(f"{self._url} does not serve {self._model}; it serves {', '.join(names)}")

    async def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text that has `tokens` tokens; by words on a server without /tokenize."""
        ids = await self._ask("/tokenize", {"prompt": text, "add_special_tokens": False}, "tokens")
        if ids is not None:
            if len(ids) < tokens:
                raise BenchError("the random text is too short; this is a mistake in the benchmark")
            beginning = await self._ask("/detokenize", {"tokens": ids[:tokens]}, "prompt")
            if isinstance(beginning, str):
                return beginning
        return " ".join(text.split()[:tokens])

    async def _ask(self, path: str, body: dict[str, Any], key: str) -> Any:
        async with self._session.post(self._url + path, json={"model": self.model, **body}) as response:
            return (await response.json(content_type=None)).get(key) if response.status == 200 else None

    async def complete(self, prompt: str, max_tokens: int, seed: int) -> Sample:
        """Stream one completion and time its chunks."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "min_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0.7,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        sample = Sample()
        began = time.perf_counter()
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    sample.error = f"status {response.status}: {(await response.text())[:200]}"
                    return sample
                await _read_stream(response, sample, began)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        return sample


async def _read_stream(response: aiohttp.ClientResponse, sample: Sample, began: float) -> None:
    first = last = 0.0
    ended = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        now = time.perf_counter()
        data = line[6:].strip()
        if data == b"[DONE]":
            ended = True
            continue
        chunk = msgspec.json.decode(data)
        if "error" in chunk:
            sample.error = str(chunk["error"].get("message"))
            return
        if chunk.get("usage"):
            usage = chunk["usage"]
            sample.output_tokens = usage["completion_tokens"]
            sample.prompt_tokens = usage["prompt_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if chunk["choices"] and (text := chunk["choices"][0].get("text")):
            sample.text += text
            if sample.ttft is None:
                sample.ttft, first = now - began, now
            else:
                sample.gaps.append(now - last)
            last = now
    sample.decode_seconds = last - first
    if not ended or not sample.output_tokens:
        sample.error = "the stream ended without [DONE] or usage"


def random_text(source: random.Random, words: int) -> str:
    """Random common words; one word is at least one token of any vocabulary."""
    return " ".join(source.choices(WORDS, k=words))


async def run_level(
    client: Client, prompts: list[str], output_len: int, concurrency: int, seed: int, turns: int = 1
) -> Level:
    """All prompts through `concurrency` clients, each prompt followed by its later turns."""
    samples: list[Sample] = []
    waiting = iter(enumerate(prompts))

    async def one_user(queue: Iterator[tuple[int, str]]) -> None:
        for number, first in queue:
            prompt, source = first, random.Random(seed + number)
            for turn in range(turns):
                sample = await client.complete(prompt, output_len, seed + number)
                sample.turn = turn
                samples.append(sample)
                prompt = f"{prompt}{sample.text}\n{random_text(source, MORE_WORDS)}"

    began = time.perf_counter()
    await asyncio.gather(*(one_user(waiting) for _ in range(concurrency)))
    return Level(concurrency, samples, time.perf_counter() - began)


async def run(arguments: argparse.Namespace) -> list[Level]:
    """Every level in turn, each with prompts of its own, so that nothing but the shared prefix is cached."""
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS, connect=10.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        client = Client(session, arguments.url, arguments.model)
        await client.connect()
        source = random.Random(arguments.seed)
        size = arguments.shared_prefix
        shared = await client.cut(random_text(source, size), size) if size else ""
        own = arguments.input_len - size
        levels = []
        for concurrency in arguments.concurrency:
            count = (arguments.num_requests or 4 * concurrency) + 1
            prompts = [shared + await client.cut(random_text(source, own), own) for _ in range(count)]
            warm = await client.complete(prompts.pop(), min(8, arguments.output_len), arguments.seed)
            if warm.error is not None:
                raise BenchError(f"the warm-up request failed: {warm.error}")
            levels.append(
                await run_level(client, prompts, arguments.output_len, concurrency, arguments.seed, arguments.turns)
            )
        return levels


def table(levels: list[Level]) -> str:
    """The levels as text, one row each."""
    rows = [[title for _, title, _ in COLUMNS]]
    for level in levels:
        figures = level.summary()
        rows.append([form.format(figures[name]) for name, _, form in COLUMNS])
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _levels(text: str) -> list[int]:
    levels = [int(part) for part in text.split(",")]
    if not all(level > 0 for level in levels):
        raise ValueError(text)
    return levels


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server (default: %(default)s)")
    parser.add_argument("--concurrency", type=_levels, default=[1, 4, 16], help="users at once, e.g. 1,4,16")
    parser.add_argument("--num-requests", type=_positive, help="requests of a level (default: four a user)")
    parser.add_argument("--input-len", type=_positive, default=256, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=_positive, default=64, help="generated tokens (default: %(default)s)")
    parser.add_argument("--turns", type=_positive, default=1, help="of each conversation (default: %(default)s)")
    parser.add_argument("--shared-prefix", type=int, default=0, help="prompt tokens that all requests share")
    parser.add_argument("--model", help="model to ask (default: the first that the server lists)")
    parser.add_argument("--api-key", default=os.environ.get("TOKENSPEED_API_KEY"), help="or set TOKENSPEED_API_KEY")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and sampling (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON line a level instead of the table")


def main(arguments: argparse.Namespace) -> int:
    """Run and print; 1 when a request failed, 2 when the benchmark could not run."""
    try:
        if not 0 <= arguments.shared_prefix < arguments.input_len:
            raise BenchError("--shared-prefix must be at least 0 and less than --input-len")
        levels = asyncio.run(run(arguments))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        for level in levels:
            print(msgspec.json.encode(level.summary()).decode())
    else:
        print(table(levels))
    errors = [sample.error for level in levels for sample in level.samples if sample.error is not None]
    for text in sorted(set(errors))[:5]:
        print(f"bench: {errors.count(text)} × {text}", file=sys.stderr)
    return 1 if errors else 0
