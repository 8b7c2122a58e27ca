"""`LLM`: the blocking face for scripts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tokenspeed.config import EngineConfig
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.intake import Prompt
from tokenspeed.request import RequestOutput, SamplingParams


class LLM:
    """An engine behind blocking calls, usable from any thread.

    `LLM("model")`, `LLM(config=EngineConfig(…))`, or `LLM()` for the embedded model. Use it as a context
    manager, or call `close`.
    """

    def __init__(
        self, model: str | None = None, *, config: EngineConfig | None = None, in_process: bool = False
    ) -> None:
        if model is not None and config is not None:
            raise ValueError("give either model or config, not both")
        self._engine = AsyncEngine(config or EngineConfig(model=model), in_process=in_process)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tokenspeed-llm", daemon=True)
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._engine.start(), self._loop)
        try:
            starting.result()
        except BaseException:
            starting.cancel()
            self.close()
            raise

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        tps_floor: float | None = None,
    ) -> list[list[RequestOutput]]:
        """Complete prompts together. For each prompt its `params.n` choices, each whole in one output.

        `tps_floor` as for `AsyncEngine.submit`; one prompt refused is all refused.
        """
        batch = _as_batch(prompts)
        work = self._generate(batch, params or SamplingParams(), tps_floor)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, tps_floor: float | None
    ) -> list[list[RequestOutput]]:
        # Not a TaskGroup: a refusal is raised as it is, not wrapped in an exception group.
        tasks = [asyncio.create_task(self._whole(prompt, params, tps_floor)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _whole(self, prompt: Prompt, params: SamplingParams, tps_floor: float | None) -> list[RequestOutput]:
        whole: dict[int, RequestOutput] = {}
        async for delta in self._engine.generate(prompt, params, tps_floor=tps_floor):
            whole[delta.index] = merge(whole.get(delta.index), delta)
        return [whole[index] for index in sorted(whole)]

    def close(self) -> None:
        """End the engine. Idempotent."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._engine.stop(grace=0.0), self._loop).result()
            self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merge(whole: RequestOutput | None, delta: RequestOutput) -> RequestOutput:
    """The output that says everything `whole` and the next `delta` of the same choice say."""
    if whole is None:
        return delta
    token_ids, logprobs, prompt_logprobs = whole.token_ids, whole.logprobs, whole.prompt_logprobs
    token_ids.extend(delta.token_ids)
    if logprobs is not None:
        logprobs.extend(delta.logprobs or ())
    delta.text = whole.text + delta.text
    delta.token_ids, delta.logprobs = token_ids, logprobs
    if delta.prompt_logprobs is None:
        delta.prompt_logprobs = prompt_logprobs
    return delta


def _as_batch(
    prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    batch: list[Prompt] = []
    alone: list[int] = []
    for item in prompts:
        if isinstance(item, int):
            alone.append(item)
        else:
            batch.append(item)
    if alone and batch:
        raise TypeError("prompts are either token ids of one prompt or several prompts, not both")
    return [alone] if alone else batch
