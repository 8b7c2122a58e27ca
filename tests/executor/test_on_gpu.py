"""The GPU executor on a GPU: graphs equal what they captured, a whole model equals `transformers`, nobody waits."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.executor.random_planner import RandomPlanner, Request
from tests.executor.test_cpu_executor import binding_of, drive, plan_of
from tests.models import families
from tests.toy import VOCAB_SIZE, greedy, toy_llama
from tokenspeed.batch import ON_DEVICE, BatchLimits, Plan
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError
from tokenspeed.executor import load_gpu
from tokenspeed.executor.device_step import StepOps
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.load import load_executor
from tokenspeed.executor.masks import num_words
from tokenspeed.kernels.one_thread import NAME, enqueued
from tokenspeed.layers.forward import ForwardInput
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model
from tokenspeed.request import SamplingParams

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# Steps with prompts are padded to 16 and to 64 tokens, and larger ones run as they are.
LIMITS = BatchLimits(max_rows=12, max_tokens=80, max_blocks=20, block_size=16)
NUM_BLOCKS = 120
GPU = torch.device("cuda")


LATENT_LIMITS = BatchLimits(max_rows=12, max_tokens=80, max_blocks=5, block_size=64)
LATENT = {
    "hidden_size": 256, "num_attention_heads": 16, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 128,
}  # fmt: skip
"""DeepSeek's attention in a small model: what the kernels for one chip take."""


def model_of(folder: Path, dtype: torch.dtype, limits: BatchLimits = LIMITS) -> tuple[CausalLM, BuildContext]:
    source = resolve(str(folder))
    ctx = BuildContext.of(device=GPU, dtype=dtype, max_positions=1024, block_size=limits.block_size)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model, ctx


def executor_of(model: CausalLM, ctx: BuildContext, limits: BatchLimits = LIMITS) -> GpuExecutor:
    kv = [
        tuple(
            torch.full((NUM_BLOCKS, limits.block_size, *shape), torch.nan, dtype=ctx.dtype, device=GPU)
            for _, shape in spec.tensors
        )
        for spec in model.kv_spec
    ]
    return GpuExecutor(
        model, kv, limits=limits, vocab_size=VOCAB_SIZE, step_ops=StepOps.of(ctx.target), device=GPU
    )


def requests(seed: int) -> list[Request]:
    draw = random.Random(seed)
    asked = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=0.8, top_p=0.9, logprobs=3),
        SamplingParams(top_k=20, presence_penalty=0.5),
        SamplingParams(temperature=0.0, repetition_penalty=1.2),
        SamplingParams(min_p=0.1, bad_word_ids=((7,), (8, 9)), prompt_logprobs=1),
        SamplingParams(temperature=0.0, logit_bias={5: 3.0}, min_tokens=3),
    ]
    return [
        Request(params, [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 60))], draw.randrange(2**40), 30)
        for params in asked
    ]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("deepseek-v2-lite", torch.bfloat16),
     ("deepseek-v2", torch.bfloat16)],
    ids=str,
)  # fmt: skip
def test_graphs_give_the_tokens_of_the_operations_that_they_captured(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """Random plans, padded and not, over a cache that holds NaN wherever nothing was stored."""
    limits = LIMITS
    if family == "llama":
        toy_llama(tmp_path, seed=3)
    else:
        limits = LATENT_LIMITS
        families.write(tmp_path, family, seed=3, **LATENT)
    model, ctx = model_of(tmp_path, dtype, limits)
    texts = []
    for captured in (False, True):
        for depth in (0, 1):
            executor = executor_of(model, ctx, limits)
            executor.warm_up()
            if captured:
                executor.capture()
            asked = requests(5)
            planner = RandomPlanner(
                limits, NUM_BLOCKS, asked, random.Random(5), tolerance=1e-4 if dtype is torch.float32 else 0.5
            )
            asyncio.run(drive(executor, planner, depth))
            executor.close()
            assert all(len(request.output) == request.num_outputs for request in asked)
            texts.append([request.output for request in asked])
    # Eager and captured steps run the same kernels at the same sizes: the same bits.
    assert texts[0] == texts[2]
    assert texts[1] == texts[3]


def test_launch_waits_for_nothing_and_the_event_loop_stays_free(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    model, ctx = model_of(tmp_path, torch.float32)
    executor = executor_of(model, ctx)
    executor.warm_up()
    executor.capture()

    async def run() -> None:
        rows = [(slot, 0, (1, 2, 3)) for slot in range(12)]
        first = plan_of(
            executor.new_buffers(), rows, bound=range(12), deltas=[(slot, 0, slot) for slot in range(12)]
        )
        rows = [(slot, 3, (ON_DEVICE,)) for slot in range(12)]
        second = plan_of(executor.new_buffers(), rows, step=2)
        # Prompts whose slots are bound, then a step of decode rows.
        for plan, bindings in ((first, [binding_of([1, 2, 3])] * 12), (second, [])):
            torch.cuda.synchronize()
            torch.cuda._sleep(400_000_000)  # about 0.2 s of device time in front of the step
            start = time.perf_counter()
            torch.cuda.set_sync_debug_mode("error")
            flight = executor.launch(plan, bindings)
            torch.cuda.set_sync_debug_mode("default")
            assert time.perf_counter() - start < 0.05
            waiting = asyncio.create_task(flight.tokens())
            ticks = 0
            while not waiting.done():
                await asyncio.sleep(0.001)
                ticks += 1
            assert ticks > 20
            assert (await waiting).tokens.shape == (12, 1)

    asyncio.run(run())
    executor.close()


def test_what_a_step_hands_to_the_thread_that_enqueues_is_in_it_already() -> None:
    stream, found = torch.cuda.Stream(), []

    def work() -> torch.Tensor:
        found.append((threading.current_thread().name, torch.cuda.current_stream() == stream))
        return torch.ones(3, device=GPU)

    with torch.cuda.stream(stream):
        ones = enqueued(lambda: enqueued(work, GPU), GPU)
        assert ones.tolist() == [1.0, 1.0, 1.0]
    ((name, same),) = found
    assert name.startswith(NAME) and same


def whole_logits(model: CausalLM, ids: torch.Tensor, block_size: int, num_decoded: int) -> torch.Tensor:
    """Logits of every position of one sequence, over blocks in random order, the last `num_decoded` one at a time."""
    length = len(ids)
    table = torch.randperm(-(-length // block_size), device=GPU).int()[None]
    empty = {"fill_value": torch.nan, "dtype": torch.bfloat16, "device": GPU}
    kv = [
        tuple(torch.full((table.shape[1], block_size, *shape), **empty) for _, shape in spec.tensors)
        for spec in model.kv_spec
    ]

    def forward(start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end, device=GPU)
        inputs = ForwardInput(
            token_ids=ids[start:end],
            positions=positions,
            kv_slots=table[0].long()[positions // block_size] * block_size + positions % block_size,
            query_start=torch.tensor([0, end - start], dtype=torch.int32, device=GPU),
            kv_len=torch.tensor([end], dtype=torch.int32, device=GPU),
            block_table=table,
            num_decode=int(end - start == 1),
            query_lens=(end - start,),
            kv_lens=(end,),
            block_size=block_size,
        )
        return model.logits(model.forward(inputs, kv))

    prompt = length - num_decoded
    return torch.cat([forward(0, prompt), *(forward(at, at + 1) for at in range(prompt, length))])


WIDE_LLAMA = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "num_hidden_layers": 4, "initializer_range": 0.05,
}  # fmt: skip
WIDE_LATENT = LATENT | {"hidden_size": 1024, "intermediate_size": 2048, "initializer_range": 0.05}


@pytest.mark.parametrize(
    ("family", "heads"), [("llama", 16), ("deepseek-v2-lite", 16), ("deepseek-v3", 16), ("deepseek-v3", 128)]
)
def test_a_whole_model_in_bfloat16_is_close_to_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, heads: int
) -> None:
    """A wider toy, every position of one sequence, against transformers in float32 and bfloat16.

    Experts are where bfloat16 is felt: a score rounded differently is another expert, in `transformers` as here.
    """
    if family == "llama":
        reference, limits = toy_llama(tmp_path, **WIDE_LLAMA), LIMITS
    else:
        changes = WIDE_LATENT | {"num_attention_heads": heads, "num_key_value_heads": heads}
        reference, limits = families.write(tmp_path, family, **changes), LATENT_LIMITS
    reference = reference.to(GPU)
    model, _ = model_of(tmp_path, torch.bfloat16, limits)
    draw = random.Random(1)
    ids = torch.tensor([draw.randrange(VOCAB_SIZE) for _ in range(700)], device=GPU)
    with torch.inference_mode():
        exact = reference(ids[None]).logits[0]
        theirs = reference.to(torch.bfloat16)(ids[None]).logits[0].float()
        ours = whole_logits(model, ids, limits.block_size, 100)

    def error(logits: torch.Tensor, rows: slice) -> float:
        return float((logits[rows] - exact[rows]).norm() / exact[rows].norm())

    def agreement(logits: torch.Tensor) -> float:
        return float((logits.argmax(1) == exact.argmax(1)).float().mean())

    prompt, decoded = slice(600), slice(600, None)
    with capsys.disabled():
        print(
            f"\n{family}, {heads} heads, bfloat16 logits against float32: ours {error(ours, prompt):.2e} in a prompt "
            f"and {error(ours, decoded):.2e} decoded, transformers {error(theirs, prompt):.2e} and "
            f"{error(theirs, decoded):.2e}; the same best token at {agreement(ours):.1%} and {agreement(theirs):.1%}"
        )
    for rows in (prompt, decoded):
        assert error(ours, rows) < 1.2 * error(theirs, rows)
    assert agreement(ours) > agreement(theirs) - 0.02


def test_a_loaded_executor_computes_what_transformers_computes(tmp_path: Path) -> None:
    reference = toy_llama(tmp_path)
    loaded = load_executor(EngineConfig(model=str(tmp_path), dtype="float32", block_size=16, max_num_seqs=8))
    prompt = [7, 301, 4, 88, 12] * 7
    asked = [Request(SamplingParams(temperature=0.0), prompt, 0, 20)]
    planner = RandomPlanner(loaded.limits, loaded.executor.num_blocks, asked, random.Random(0))
    asyncio.run(drive(loaded.executor, planner, 1))
    loaded.executor.close()
    assert asked[0].output == greedy(reference, prompt, 20)
    assert "graphs" in loaded.summary


BROKEN_DEVICE = """
import asyncio
import torch
from tests.executor.hash_model import HashModel
from tests.executor.test_cpu_executor import LIMITS, binding_of, plan_of
from tokenspeed.executor.device_step import StepOps
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.kernels.reference.decode_inputs import decode_inputs
from tokenspeed.kernels.reference.sample import sample

class Reckless(HashModel):
    def forward(self, inputs, kv):
        return torch.zeros(len(inputs.token_ids), 1, device="cuda")[inputs.positions + 1000]

device = torch.device("cuda")
model = Reckless()
size = LIMITS.block_size
kv = [tuple(torch.zeros(9, size, *shape, device=device) for _, shape in spec.tensors) for spec in model.kv_spec]
executor = GpuExecutor(model, kv, limits=LIMITS, vocab_size=97, step_ops=StepOps(decode_inputs, sample), device=device)

async def run():
    for step, buffers in enumerate([executor.new_buffers() for _ in range(2)]):
        plan = plan_of(buffers, [(0, 0, (1, 2))], step=step, bound=[0], deltas=[(0, 0, 3)])
        flight = executor.launch(plan, [binding_of([1, 2])])
        try:
            await flight.tokens()
        except Exception as error:
            print("raised", type(error).__name__)

asyncio.run(run())
executor.close()
"""


def test_a_cuda_error_comes_out_of_its_flight_and_of_all_later_ones() -> None:
    """In a process of its own: its device is lost."""
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_DEVICE], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.count("raised") == 2, done.stdout + done.stderr
    assert "device-side assert" in done.stderr or "AcceleratorError" in done.stdout


def test_too_little_memory_is_refused_in_one_line_with_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_llama(tmp_path)
    config = EngineConfig(model=str(tmp_path), block_size=16)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory") as caught:
        load_executor(EngineConfig(model=str(tmp_path), block_size=16, kv_cache_bytes=1 << 45))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(load_gpu, "MARGIN", 1 << 45)
    with pytest.raises(ConfigError, match=r"not enough GPU memory: .* MiB are left .*--max-num-seqs") as caught:
        load_executor(config)
    assert "\n" not in str(caught.value)


def test_a_captured_head_masks_a_slot_while_its_request_is_masked_and_no_longer(tmp_path: Path) -> None:
    """The same steps with and without graphs: masked decodes, then the slot in the hands of a request without masks."""
    toy_llama(tmp_path, seed=4)
    model, ctx = model_of(tmp_path, torch.float32)
    allowed = (7, 31, 32, 96)
    mask = np.zeros(num_words(VOCAB_SIZE), dtype=np.uint32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32)

    async def steps(executor: GpuExecutor) -> list[list[int]]:
        def decode(step: int, computed: tuple[int, int]) -> Plan:
            rows = [(slot, known, (ON_DEVICE,)) for slot, known in enumerate(computed)]
            return plan_of(executor.new_buffers(), rows, step=step)

        prompts = [(0, 0, (1, 2)), (1, 0, (3, 4, 5))]
        plan = plan_of(executor.new_buffers(), prompts, bound=[0, 1], deltas=[(0, 0, 3), (1, 0, 4)])
        masked = dataclasses.replace(binding_of([3, 4, 5]), masked=True)
        bindings = [binding_of([1, 2]), masked]
        found = []
        for each in (plan, decode(2, (2, 3)), decode(3, (3, 4))):
            flight = executor.launch(each, bindings)
            flight.mask([mask.view(np.int32)])
            found.append((await flight.tokens()).tokens[:, 0].tolist())
        plan = plan_of(executor.new_buffers(), [(1, 0, (8, 9))], step=4, bound=[1], deltas=[(1, 0, 5)])
        found.append((await executor.launch(plan, [binding_of([8, 9])]).tokens()).tokens[:, 0].tolist())
        found.append((await executor.launch(decode(5, (4, 2)), []).tokens()).tokens[:, 0].tolist())
        return found

    texts = []
    for captured in (False, True):
        executor = executor_of(model, ctx)
        executor.warm_up()
        if captured:
            executor.capture()
        texts.append(asyncio.run(steps(executor)))
        executor.close()
    assert texts[0] == texts[1]
    assert all(tokens[1] in allowed for tokens in texts[0][:3])
    assert texts[0][3][0] not in allowed and texts[0][4][1] not in allowed
