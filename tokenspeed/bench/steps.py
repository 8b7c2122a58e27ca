"""Steps with prompts: what the host enqueues, what the device needs, and where the time of agents' turns goes.

The table has a row for each `--new` and `--beside`: so many new tokens behind a cached prompt of `--context`, alone or
beside so many streams that decode, each behind a prompt as long. "host" is the time in which the step is enqueued;
"step" what it took the device, from the copy of its plan to the end of its sampling; "device" the same where all of it
was enqueued before the device began, behind a pause; so the difference is what the device waited for the host. A
dash: enqueuing took as long as the pause. "TTFT" is the first token of the request as the step loop gives it. Medians
of `--repeats`, with minimum and maximum.

`--sessions` then runs the sessions of `agentic` on the same step loop, without a front end, and adds up their steps by
the number of prompt tokens: the device's time and the host's; what is left of the wall time lies between steps.

One file, of more than 400 lines: both tables are made from one record of the steps of one loop.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from tokenspeed.batch import Finish, Int32Array, Plan, PlanBuffers, StepResult, StepTimes
from tokenspeed.bench.agentic import positive
from tokenspeed.bench.decode import control_plane
from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import ChoiceTokens, Submit
from tokenspeed.engine.step_loop import StepLoop
from tokenspeed.executor.interface import Binding, Executor, Flight, Mask
from tokenspeed.request import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.executor.load import LoadedExecutor

PAUSE = 400_000_000
"""Cycles for which a device is kept from a step that is being enqueued."""

PAUSE_SECONDS = 0.2
"""What they take at 2 GHz; the highest clock of an H200 is 1.98."""

PROFILED = 3
"""Steps under each of the profilers."""


@dataclass(slots=True)
class Record:
    """A launched step, in seconds; `times` once it has landed."""

    num_decode: int
    prompt_tokens: int
    host: float
    times: StepTimes | None = None

    @property
    def device(self) -> float:
        assert self.times is not None, "of a step that has landed"
        return self.times.forward + self.times.sample


class RecordedFlight:
    """A flight whose times go into a record."""

    def __init__(self, flight: Flight, record: Record) -> None:
        self._flight, self._record = flight, record
        self.masked: Sequence[int] = flight.masked

    def mask(self, masks: Sequence[Mask]) -> None:
        self._flight.mask(masks)

    async def tokens(self) -> StepResult:
        result = await self._flight.tokens()
        self._record.times = result.times
        return result


class RecordingExecutor:
    """An executor with a record of every step. `before_prompts` is called before a step with prompts is launched."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.records: list[Record] = []
        self.before_prompts: Callable[[], None] = _nothing

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        prompt_tokens = plan.num_tokens - plan.num_decode
        if prompt_tokens:
            self.before_prompts()
        start = time.perf_counter()
        flight = self._executor.launch(plan, bindings)
        record = Record(plan.num_decode, prompt_tokens, time.perf_counter() - start)
        self.records.append(record)
        return RecordedFlight(flight, record)

    def new_buffers(self) -> PlanBuffers:
        return self._executor.new_buffers()

    def close(self) -> None:
        self._executor.close()


def _nothing() -> None:
    pass


@dataclass(slots=True)
class _Asked:
    """A request: where its tokens go, what is woken by its first and its last one."""

    tokens: list[int]
    first: asyncio.Future[float]
    ended: asyncio.Future[None]


class Requests:
    """Requests on one step loop of this process."""

    def __init__(self, loaded: LoadedExecutor, *, seed: int = 0) -> None:
        self.executor = RecordingExecutor(loaded.executor)
        self._loop = StepLoop(
            control_plane(loaded),
            self.executor,
            overlap=1,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            publish=self._receive,
        )
        self._draw = np.random.default_rng(seed)
        self._vocab_size = loaded.vocab_size
        self._asked: dict[int, _Asked] = {}
        self._next_id = 1
        self._running = asyncio.create_task(self._loop.run())

    def random(self, count: int) -> Int32Array:
        return self._draw.integers(0, self._vocab_size, count, dtype=np.int32)

    async def ask(self, prompt: Int32Array, max_tokens: int) -> tuple[float, list[int]]:
        """Seconds to the first token, and all tokens."""
        begun = time.perf_counter()
        request_id = self._submit(prompt, max_tokens)
        asked = self._asked[request_id]
        await self._or_failure(asked.ended)
        del self._asked[request_id]
        return asked.first.result() - begun, asked.tokens

    @asynccontextmanager
    async def beside(self, streams: int, context: int, most: int) -> AsyncIterator[None]:
        """While so many streams decode, each behind its own prompt of `context` tokens and for `most` at most."""
        ids = [self._submit(self.random(context), most) for _ in range(streams)]
        for request_id in ids:
            await self._or_failure(self._asked[request_id].first)
        yield
        if any(self._asked[request_id].ended.done() for request_id in ids):
            raise SystemExit(f"a stream had generated its {most:,} tokens before the table was done")
        for request_id in ids:
            self._loop.abort(request_id)
            del self._asked[request_id]
        while self._loop.stats().running + self._loop.stats().draining:
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        self._loop.stop()
        await self._running
        self.executor.close()

    def _submit(self, prompt: Int32Array, max_tokens: int) -> int:
        params = SamplingParams(temperature=1.0, max_tokens=max_tokens, ignore_eos=True)
        request_id, self._next_id = self._next_id, self._next_id + 1
        encoded = msgspec.Raw(msgspec.msgpack.encode(params))
        message = Submit(id=request_id, prompt=prompt.tobytes(), params=encoded, seed=request_id, tps_floor=0.0)
        refusal = self._loop.submit(message)
        if refusal is not None:
            raise SystemExit(f"the engine refuses a request of the benchmark: {refusal.name}")
        future = asyncio.get_running_loop().create_future
        self._asked[request_id] = _Asked([], future(), future())
        return request_id

    def _receive(self, choices: list[ChoiceTokens]) -> None:
        now = time.perf_counter()
        for choice in choices:
            asked = self._asked.get(choice.id)
            if asked is None:
                continue
            asked.tokens += choice.token_ids
            if not asked.first.done():
                asked.first.set_result(now)
            if choice.finish != Finish.NONE:
                asked.ended.set_result(None)

    async def _or_failure(self, awaited: asyncio.Future[float] | asyncio.Future[None]) -> None:
        """Wait, or raise what ended the loop."""
        await asyncio.wait({awaited, self._running}, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            await self._running


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one kind, beside `decoding` rows: seconds, once a repeat. `device` is where nothing waited for the
    host; see `undisturbed`."""

    decoding: int
    host: list[float]
    step: list[float]
    device: list[float]
    first: list[float]


async def measure(requests: Requests, prefix: Int32Array, new: int, repeats: int, *, cuda: bool) -> Measured:
    """Steps of `new` tokens behind the cached `prefix`, beside whatever decodes."""

    async def steps(before: Callable[[], None]) -> tuple[list[Record], list[float]]:
        requests.executor.before_prompts = before
        found, first = list[Record](), list[float]()
        for _ in range(repeats):
            known = len(requests.executor.records)
            seconds, _tokens = await requests.ask(np.concatenate((prefix, requests.random(new))), 1)
            with_prompts = [record for record in requests.executor.records[known:] if record.prompt_tokens]
            if [record.prompt_tokens for record in with_prompts] != [new]:
                sizes = ", ".join(f"{record.prompt_tokens:,}" for record in with_prompts)
                raise SystemExit(f"{new:,} tokens behind {len(prefix):,} cached ones came as steps of {sizes}")
            found += with_prompts
            first.append(seconds)
        requests.executor.before_prompts = _nothing
        return found, first

    await steps(_nothing)  # what is met for the first time
    found, first = await steps(_nothing)
    held = (await steps(_pause))[0] if cuda else []
    return Measured(
        found[0].num_decode,
        [record.host for record in found],
        [record.device for record in found],
        undisturbed(held),
        first,
    )


def undisturbed(held: Sequence[Record]) -> list[float]:
    """Seconds of the device in steps behind a pause. None where one was enqueued for as long as the pause: then the
    device may have waited for the host."""
    return [record.device for record in held] if all(record.host < PAUSE_SECONDS for record in held) else []


def _here(work: Callable[[], None]) -> None:
    work()


def _pause() -> None:
    from tokenspeed.executor.kernel_times import hold  # noqa: PLC0415 - seconds that other programs do without

    hold(PAUSE)


async def profiled(requests: Requests, prefix: Int32Array, new: int) -> str:
    """What a step's kernels took, and what the threads that enqueue it called."""
    from tokenspeed.executor.kernel_times import KernelTimes  # noqa: PLC0415
    from tokenspeed.kernels.one_thread import the_thread  # noqa: PLC0415

    async def steps() -> None:
        for _ in range(PROFILED):
            await requests.ask(np.concatenate((prefix, requests.random(new))), 1)

    called = io.StringIO()
    # One after the other: from Python 3.12 on there is one profiler at a time.
    for thread in (_here, lambda work: the_thread().submit(work).result()):
        profile = cProfile.Profile()
        thread(profile.enable)
        await steps()
        thread(profile.disable)
        pstats.Stats(profile, stream=called).sort_stats("tottime").print_stats(40)
    with KernelTimes() as kernels:
        await steps()
    return f"{kernels.timeline(PROFILED)}\n\n{kernels.table(PROFILED)}\n{called.getvalue()}"


def row(context: int, new: int, measured: Measured) -> str:
    """A line of the table, milliseconds."""

    def cell(values: list[float]) -> str:
        if not values:
            return "–"
        each = sorted(1e3 * value for value in values)
        return f"{statistics.median(each):.2f} ({each[0]:.2f}–{each[-1]:.2f})"

    waits = "–"
    if measured.device:
        waits = f"{1e3 * (statistics.median(measured.step) - statistics.median(measured.device)):.2f}"
    cells = (measured.host, measured.step, measured.device)
    return (
        f"| {new:,} behind {context:,} | {measured.decoding} | {' | '.join(map(cell, cells))} | {waits} | "
        f"{cell(measured.first)} |"
    )


@dataclass(frozen=True, slots=True)
class Level:
    """The steps of C sessions, their wall seconds and generated tokens, and the first tokens of later turns."""

    records: list[Record]
    seconds: float
    tokens: int
    later: list[float]


async def level(requests: Requests, options: argparse.Namespace, concurrency: int) -> Level:
    """All turns of `concurrency` sessions at once."""
    later = list[float]()

    async def session() -> int:
        prompt, generated = requests.random(options.context), 0
        for number in range(options.turns):
            first, tokens = await requests.ask(prompt, options.output)
            generated += len(tokens)
            if number:
                later.append(first)
            prompt = np.concatenate((prompt, np.array(tokens, np.int32), requests.random(options.more)))
        return generated

    requests.executor.records.clear()
    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*(session() for _ in range(concurrency))))
    return Level(list(requests.executor.records), time.perf_counter() - start, tokens, later)


def shares(concurrency: int, measured: Level) -> list[str]:
    """Lines of a table: steps by the power of two that holds their prompt tokens."""
    kinds: dict[int, list[Record]] = defaultdict(list)
    for record in measured.records:
        kinds[1 << (record.prompt_tokens - 1).bit_length() if record.prompt_tokens else 0].append(record)
    lines, left = [], measured.seconds
    for most, records in sorted(kinds.items()):
        device = sum(record.device for record in records)
        left -= device
        name = f"up to {most:,} prompt tokens" if most else "decode alone"
        lines.append(
            f"| {concurrency} | {name} | {len(records)} | {statistics.mean(r.prompt_tokens for r in records):,.0f} | "
            f"{statistics.mean(r.num_decode for r in records):.1f} | "
            f"{1e3 * statistics.mean(r.host for r in records):.2f} | {1e3 * device / len(records):.2f} | "
            f"{device:.2f} | {device / measured.seconds:.1%} |"
        )
    later = f"{1e3 * statistics.median(measured.later):.0f} ms" if measured.later else "–"
    lines.append(
        f"| {concurrency} | between steps | | | | | | {left:.2f} | {left / measured.seconds:.1%} |\n"
        f"| {concurrency} | all: {measured.tokens / measured.seconds:.0f} output tok/s, first token of a later turn "
        f"{later} | {len(measured.records)} | | | | | {measured.seconds:.2f} | |"
    )
    return lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `steps`."""
    parser.add_argument("--model", required=True, help="a checkpoint; with --load-format dummy a config.json")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=positive, default=49_984, help="cached tokens before the new ones")
    parser.add_argument("--new", type=positive, nargs="*", default=[128, 512, 1024, 2048], help="tokens of a step")
    parser.add_argument("--beside", type=int, nargs="*", default=[0, 8], help="streams that decode beside")
    parser.add_argument("--stream-tokens", type=positive, default=4000, help="that each of these may generate")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--sessions", type=positive, nargs="*", default=[], help="sessions at once")
    parser.add_argument("--more", type=positive, default=800, help="new prompt tokens of every further turn")
    parser.add_argument("--output", type=positive, default=500, help="tokens generated in a turn")
    parser.add_argument("--turns", type=positive, default=4, help="turns of a session")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", type=Path, help="a file for kernels and calls of every --new, alone; needs a GPU")


def main(options: argparse.Namespace) -> int:
    """Print the table, then the sessions'."""
    if options.profile is not None and not (options.new and 0 in options.beside):
        raise SystemExit("--profile is of every --new, alone: it needs at least one --new, and 0 among --beside")
    turns = options.turns * (options.more + options.output) if options.sessions else 0
    longest = options.context + max(options.stream_tokens, turns, *options.new, 1)
    rows = max([1, *(number + 1 for number in options.beside), *options.sessions])
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        dtype=options.dtype,
        max_model_len=longest + 1,
        max_num_seqs=rows,
    )
    config.check()
    asyncio.run(_run(config, options))
    return 0


async def _run(config: EngineConfig, options: argparse.Namespace) -> None:
    from tokenspeed.executor import kernel_times  # noqa: PLC0415 - seconds that other programs do without
    from tokenspeed.executor.load import load_executor  # noqa: PLC0415

    cuda = kernel_times.available()
    if options.profile is not None and not cuda:
        raise SystemExit("--profile says what kernels on a GPU took, and there is none here")
    start = time.perf_counter()
    loaded = await asyncio.to_thread(load_executor, config)
    print(loaded.summary, f"loaded in {time.perf_counter() - start:.1f} s", sep="\n", flush=True)
    requests = Requests(loaded, seed=options.seed)
    if options.new:
        await _table(requests, options, cuda=cuda)
    if options.sessions:
        titles = (
            "C", "steps", "number", "prompt tokens", "rows that decode", "host, ms", "device, ms", "device, s", "share",
        )  # fmt: skip
        print("\n|", " | ".join(titles), "|")
        print("|---" * len(titles), "|", sep="", flush=True)
    for concurrency in options.sessions:
        print(*shares(concurrency, await level(requests, options, concurrency)), sep="\n", flush=True)
    await requests.close()


async def _table(requests: Requests, options: argparse.Namespace, *, cuda: bool) -> None:
    prefix = requests.random(options.context)
    await requests.ask(np.concatenate((prefix, requests.random(1))), 1)
    titles = ("step", "rows that decode", "host", "step, ms", "device", "waits for the host", "TTFT")
    print("|", " | ".join(titles), "|")
    print("|---" * len(titles), "|", sep="", flush=True)
    for streams in options.beside:
        async with requests.beside(streams, options.context, options.stream_tokens):
            for new in options.new:
                measured = await measure(requests, prefix, new, options.repeats, cuda=cuda)
                print(row(len(prefix), new, measured), flush=True)
                if options.profile is not None and not streams:
                    with options.profile.open("a") as file:
                        file.write(f"\n{new} tokens behind {len(prefix)}\n\n{await profiled(requests, prefix, new)}")
