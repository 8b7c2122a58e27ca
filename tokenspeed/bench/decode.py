"""Decode rates of the engine itself: control plane, step loop and executor, without a front end.

For each shape so many streams decode at once, each behind its own random prompt, with end-of-sequence ignored.
Measured is the time in which all of them decode, in slices: tokens over seconds, what the device did, how long
it had nothing to do between two steps, and the host's time for a step. "first" is the time from asking for all
streams at once to the first token of the last one. With `--profile` every shape decodes some more steps: under torch's
profiler, which says what each kernel took, and under Python's, which says what the loop's thread did. "experts" are the
distinct ones of a layer that one such step's tokens chose, "blocks" those of the cache that its rows read.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import pstats
import random
import secrets
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec
import numpy as np

from tokenspeed._core.scheduler import Scheduler
from tokenspeed.batch import Plan, PlanBuffers
from tokenspeed.config import EngineConfig, Quantization
from tokenspeed.engine.messages import ChoiceTokens, Submit
from tokenspeed.engine.step_loop import StepLoop
from tokenspeed.executor.interface import Binding, Executor, Flight
from tokenspeed.request import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.executor.load import LoadedExecutor

SLICES = 5
WARM_TOKENS = 8
"""Tokens of every stream that are not measured."""

PROFILED_STEPS = 20
"""Steps under each of the two profilers."""

LEAST_STEP = 256
"""Tokens of a prompt that a step computes at least, whatever the device."""

COUNTED_STEPS = 6
"""Steps that are left for the one in which experts are counted."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A shape: seconds to the last stream's first token, slices, distinct experts of a layer as text, blocks read."""

    first: float
    slices: list[Slice]
    experts: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the measured time: steps, seconds, and of a step in milliseconds what went where."""

    steps: int
    seconds: float
    forward: float
    sample: float
    host: float
    launch: float

    @property
    def step(self) -> float:
        return self.seconds / self.steps * 1e3


class TimedExecutor:
    """An executor, and the seconds that the loop spent in its `launch`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.seconds = 0.0

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        start = time.perf_counter()
        flight = self._executor.launch(plan, bindings)
        self.seconds += time.perf_counter() - start
        return flight

    def new_buffers(self) -> PlanBuffers:
        return self._executor.new_buffers()

    def close(self) -> None:
        self._executor.close()


def control_plane(loaded: LoadedExecutor) -> Scheduler:
    """One for this executor, that finds prefixes again."""
    return Scheduler(
        num_blocks=loaded.executor.num_blocks,
        limits=loaded.limits,
        max_model_len=loaded.max_model_len,
        max_queued=1024,
        prefix_caching=True,
        hash_key=secrets.token_bytes(16),
    )


class Streams:
    """One batch after the other on one step loop."""

    def __init__(self, loaded: LoadedExecutor, params: SamplingParams, overlap: int, seed: int) -> None:
        self._params = params
        self._vocab_size = loaded.vocab_size
        self._executor = TimedExecutor(loaded.executor)
        self._loop = StepLoop(
            control_plane(loaded),
            self._executor,
            overlap=overlap,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            publish=self._receive,
        )
        self._draw = random.Random(seed)
        self._counts: dict[int, int] = {}
        self._next_id = 1
        self._changed = asyncio.Event()
        self._running = asyncio.create_task(self._loop.run())

    async def measure(self, batch: int, context: int, num_tokens: int, profile: Path | None) -> Measured:
        """Decode `num_tokens` of each of `batch` streams behind prompts of `context` tokens.

        What `profile` says is added to that file.
        """
        start = time.perf_counter()
        more = COUNTED_STEPS + (0 if profile is None else 4 * PROFILED_STEPS)
        most = generated(batch, context, num_tokens, more)
        self._counts = {self._submit(context, most): 0 for _ in range(batch)}
        await self._until(lambda: min(self._counts.values()) > 0)
        first = time.perf_counter() - start
        await self._until(lambda: min(self._counts.values()) > WARM_TOKENS)
        if max(self._counts.values()) > most - num_tokens - more:
            raise SystemExit(f"{batch} streams of {context:,} tokens: the first is nearly done when the last begins")
        slices = [await self._slice(-(-num_tokens // SLICES)) for _ in range(SLICES)]
        blocks = self._loop.stats().blocks_used
        experts = await self._experts(batch)
        if profile is not None:
            with profile.open("a") as file:
                file.write(f"\n{batch} streams at {context} tokens\n\n{await self._profiled()}")
        for request_id in self._counts:
            self._loop.abort(request_id)
        while self._loop.stats().running + self._loop.stats().draining:
            await asyncio.sleep(0.001)
        return Measured(first, slices, experts, blocks)

    async def _experts(self, batch: int) -> str:
        """Distinct experts of a layer, in a step that a short prompt joins; its stream counts for nothing else."""
        from tokenspeed.executor.chosen_experts import PROMPT, ChosenExperts  # noqa: PLC0415 - torch, which others do without

        with ChosenExperts(batch) as chosen:
            joined = self._submit(PROMPT, 1)
            self._counts[joined] = 0
            await self._until(lambda: self._counts[joined] > 0)
            del self._counts[joined]
            return chosen.text()

    async def _profiled(self) -> str:
        """Microseconds: three steps on the device, a step's kernels, then what the loop's thread called."""
        from tokenspeed.executor.kernel_times import KernelTimes  # noqa: PLC0415 - seconds that others do without

        leader = max(self._counts, key=lambda request_id: self._counts[request_id])

        async def steps() -> None:
            end = self._counts[leader] + PROFILED_STEPS
            await self._until(lambda: self._counts[leader] >= end)

        host = cProfile.Profile()
        host.enable()
        await steps()
        host.disable()
        called = io.StringIO()
        pstats.Stats(host, stream=called).sort_stats("tottime").print_stats(30)
        with KernelTimes() as kernels:
            await steps()
        return f"{kernels.timeline(3)}\n\n{kernels.table(PROFILED_STEPS)}\n{called.getvalue()}"

    async def _slice(self, steps: int) -> Slice:
        timer, executor = self._loop.timer, self._executor
        timer.line()
        executor.seconds = 0.0
        leader = max(self._counts, key=lambda request_id: self._counts[request_id])
        first = self._counts[leader]
        start = time.perf_counter()
        await self._until(lambda: self._counts[leader] >= first + steps)
        seconds = time.perf_counter() - start
        n = timer.steps
        host = timer.plan + timer.commit + timer.publish + executor.seconds
        per = [value / n * 1e3 for value in (timer.forward, timer.sample, host, executor.seconds)]
        return Slice(self._counts[leader] - first, seconds, *per)

    async def close(self) -> None:
        self._loop.stop()
        await self._running
        self._executor.close()

    def _submit(self, context: int, max_tokens: int) -> int:
        prompt = np.array([self._draw.randrange(self._vocab_size) for _ in range(context)], dtype=np.int32)
        params = msgspec.structs.replace(self._params, max_tokens=max_tokens, ignore_eos=True)
        request_id, self._next_id = self._next_id, self._next_id + 1
        message = Submit(
            id=request_id, prompt=prompt.tobytes(), params=msgspec.Raw(msgspec.msgpack.encode(params)), seed=request_id
        )
        refusal = self._loop.submit(message)
        if refusal is not None:
            raise SystemExit(f"the engine refuses a stream of the benchmark: {refusal.name}")
        return request_id

    def _receive(self, choices: list[ChoiceTokens]) -> None:
        for choice in choices:
            self._counts[choice.id] += len(choice.token_ids)
        self._changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            changed = asyncio.create_task(self._changed.wait())
            await asyncio.wait({changed, self._running}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if self._running.done():
                self._running.result()
                raise SystemExit("the step loop ended before the streams did")


def generated(batch: int, context: int, num_tokens: int, more: int) -> int:
    """Tokens that a stream may generate: it decodes along while the prompts of the others are computed."""
    riding = 64 + 2 * -(-batch * context // LEAST_STEP)
    return riding + WARM_TOKENS + num_tokens + more + 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `decode`."""
    parser.add_argument("--model", required=True, help="a checkpoint; with --load-format dummy a config.json")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none", choices=get_args(Quantization))
    parser.add_argument(
        "--shape", type=_shape, nargs="+", default=[(1, 1024), (8, 1024), (32, 1024), (128, 1024)],
        help="streams x tokens of their prompts: 8x1024",
    )  # fmt: skip
    parser.add_argument("--num-tokens", type=int, default=200, help="tokens of every stream that are measured")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--overlap", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", type=float, nargs="*", default=[], help="a peer's tok/s, one a --shape; 0 if none")
    parser.add_argument(
        "--weight-bytes", type=float, nargs="*", default=[],
        help="bytes of weights that a step must read, one for each --shape or one for all",
    )  # fmt: skip
    parser.add_argument("--kv-bytes", type=float, default=0.0, help="bytes of KV that a step must read, a token")
    parser.add_argument("--bandwidth", type=float, default=3150e9, help="bytes a second that the device reads at most")
    parser.add_argument("--profile", type=Path, help="a file for what every GPU kernel and the loop's thread took")


def _shape(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form STREAMSxTOKENS")
    return int(batch), int(context)


def main(options: argparse.Namespace) -> int:
    """Print one row a shape."""
    batches, _ = zip(*options.shape, strict=True)
    extra = COUNTED_STEPS + (0 if options.profile is None else 4 * PROFILED_STEPS)
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        dtype=options.dtype,
        quantization=options.quantization,
        max_model_len=max(n + generated(batch, n, options.num_tokens, extra) for batch, n in options.shape) + 1,
        max_num_seqs=max(batches) + 1,  # and the one that joins to count experts
        overlap=options.overlap,
    )
    config.check()
    asyncio.run(_run(config, options))
    return 0


async def _run(config: EngineConfig, options: argparse.Namespace) -> None:
    from tokenspeed.executor import kernel_times  # noqa: PLC0415 - seconds that other programs do without
    from tokenspeed.executor.load import load_executor  # noqa: PLC0415

    if options.profile is not None and not kernel_times.available():
        raise SystemExit("--profile says what kernels on a GPU took, and there is none here")
    start = time.perf_counter()
    loaded = await asyncio.to_thread(load_executor, config)
    print(loaded.summary, f"loaded in {time.perf_counter() - start:.1f} s", sep="\n", flush=True)
    params = SamplingParams(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k)
    streams = Streams(loaded, params, options.overlap, options.seed)
    titles = ("batch × context", "first s", "tok/s (min–max)", "ms a step", "forward", "sample", "idle", "host")
    print("|", " | ".join((*titles, "of it launch", "experts", "blocks", "of limit", "× peer")), "|")
    print("|---" * (len(titles) + 5), "|", sep="", flush=True)
    for index, (batch, context) in enumerate(options.shape):
        measured = await streams.measure(batch, context, options.num_tokens, options.profile)
        peer = options.peer[index] if index < len(options.peer) else None
        print(row(batch, context, measured, limit(index, options), peer or None), flush=True)
    await streams.close()


def limit(index: int, options: argparse.Namespace) -> float | None:
    """Tokens a second of a shape if a step took no longer than reading its bytes once; None if they were not given."""
    given: list[float] = options.weight_bytes
    if not given:
        return None
    batch, context = options.shape[index]
    length = context + WARM_TOKENS + options.num_tokens / 2
    seconds = (given[min(index, len(given) - 1)] + batch * length * options.kv_bytes) / options.bandwidth
    return float(batch / seconds)


def row(batch: int, context: int, measured: Measured, bound: float | None, peer: float | None) -> str:
    """A line of the table: medians over the slices."""
    slices = measured.slices

    def median(name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in slices))

    rates = sorted(batch * each.steps / each.seconds for each in slices)
    rate = statistics.median(rates)
    idle = statistics.median(each.step - each.forward - each.sample for each in slices)
    return (
        f"| {batch} × {context:,} | {measured.first:.3f} | **{rate:,.0f}** ({rates[0]:,.0f}–{rates[-1]:,.0f}) | "
        f"{median('step'):.3f} | "
        f"{median('forward'):.3f} | {median('sample'):.3f} | {idle:.3f} | {median('host'):.3f} | "
        f"{median('launch'):.3f} | {measured.experts} | {measured.blocks:,} | "
        f"{'–' if bound is None else f'{rate / bound:.0%}'} | {'–' if peer is None else f'{rate / peer:.2f}'} |"
    )
