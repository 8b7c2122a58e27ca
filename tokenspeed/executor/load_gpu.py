"""An executor on a GPU: everything that takes memory is tried first, and the KV cache gets what is left."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import dataclass

import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.errors import ConfigError
from tokenspeed.executor.device_step import Model, StepOps
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.late_kernels import report_late_kernels
from tokenspeed.executor.memory import mib, num_kv_blocks
from tokenspeed.executor.slot_tables import SlotTables
from tokenspeed.layers.module import BuildContext
from tokenspeed.parallel.world import World

STEP_TOKENS = 8192
"""Tokens of a step on a GPU, unless a flag says otherwise: enough that products of matrices run at full rate."""

MARGIN = 1 << 30
"""Bytes left free for what libraries allocate by themselves later."""


SESSIONS_A_ROW = 16
"""Sessions whose cache may be kept for each row of a step: agents pause between turns for much longer than they
generate, and find their cache when they come back. Where a model is large, memory is less than that."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Sizes that decide whether a model fits; `kv_cache_bytes` is what was asked for, None takes what is left."""

    per_block: int
    kv_cache_bytes: int | None
    limits: BatchLimits
    vocab_size: int

    def check(self, left: int) -> None:
        """Raise `ConfigError` if `left` bytes beside the weights cannot hold the tables, a block and the margin."""
        tables = SlotTables.num_bytes(self.limits, self.vocab_size)
        kv = self.per_block if self.kv_cache_bytes is None else self.kv_cache_bytes
        if tables + kv + MARGIN > left:
            raise ConfigError(
                f"not enough GPU memory: {mib(left)} are left beside the weights, the tables of "
                f"{self.limits.max_rows} requests take {mib(tables)}, the KV cache at least {mib(kv)} and "
                f"{mib(MARGIN)} stay free; set a smaller --max-num-seqs, --kv-cache-memory or --block-size"
            )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, by anybody."""
    return torch.cuda.mem_get_info(device)[0]


def start_gpu(
    model: Model, ctx: BuildContext, needs: Needs, world: World | None = None
) -> tuple[GpuExecutor, tuple[int, ...], str]:
    """Start an executor for a loaded model, steps captured; say how many KV blocks each pool has, and in a line
    what it took.

    A first executor with a cache of one block runs the largest step and captures everything; what is free beside
    it becomes the cache of the one that stays; the ranks of a group all take what the least of them has. Raises
    `ConfigError` if that leaves too little.
    """
    # Sums of products stay in float32, whatever the split: a token must not depend on the shape of its batch.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    device, limits = ctx.device, needs.limits

    def executor(num_blocks: int) -> GpuExecutor:
        kv = [
            tuple(
                torch.zeros(num_blocks, limits.block_size, *shape, dtype=ctx.dtype, device=device)
                for _, shape in spec.tensors
            )
            for spec in model.kv_spec
        ]
        step_ops = StepOps.of(ctx.target)
        return GpuExecutor(
            model, kv, limits=limits, vocab_size=needs.vocab_size, step_ops=step_ops, device=device, peers=world
        )

    before = free_memory(device)
    try:
        trial = executor(1)
        trial.warm_up()
        warm = free_memory(device)
        first = trial.capture()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"not enough GPU memory for a step of {limits.max_tokens} tokens and graphs of up to {limits.max_rows} "
            f"rows: {mib(before)} were left beside the weights; set a smaller --max-num-batched-tokens or "
            f"--max-num-seqs"
        ) from error
    left = free_memory(device)
    trial.close()
    del trial
    num_blocks = num_kv_blocks(
        needs.per_block, limits, kv_cache_bytes=needs.kv_cache_bytes, available=max(0, left - MARGIN), share=1.0,
        sessions_a_row=SESSIONS_A_ROW,
    )  # fmt: skip
    pool_blocks = (num_blocks,) if world is None else world.least_by_group(num_blocks)
    gc.collect()
    torch.cuda.empty_cache()
    started = executor(pool_blocks[0 if world is None else world.group])
    seconds = started.capture()
    if importlib.util.find_spec("triton"):
        report_late_kernels()
    return started, pool_blocks, (
        f"{torch.cuda.get_device_name(device)}; a step takes {mib(before - warm)}, "
        f"{started.num_graphs} graphs {mib(warm - left)}, tried in {first:.1f} s and captured in "
        f"{seconds:.1f} s"
    )
