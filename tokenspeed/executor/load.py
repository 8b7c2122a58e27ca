"""From a configuration to an executor that can run steps."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import default_dtype, load_weights
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.interface import Executor
from tokenspeed.executor.load_gpu import STEP_TOKENS as GPU_STEP_TOKENS
from tokenspeed.executor.load_gpu import GpuNeeds, free_memory, start_gpu
from tokenspeed.executor.machine import available_cpus, available_memory
from tokenspeed.executor.memory import block_bytes, mib, num_kv_blocks
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import KernelError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model

STEP_TOKENS = 256
"""Tokens of a step on a CPU, unless a flag says otherwise: every stream waits for the prompts in its step, and
two cores prefill about 300 tokens a second of a small model."""

DEVICE = "TOKENSPEED_DEVICE"
"""Environment variable: cpu or cuda; unset, a GPU is used where torch finds one."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all) as loading goes on."""


@dataclass(frozen=True, slots=True)
class LoadedExecutor:
    """An executor with its model's weights in memory, and what the engine must know of it.

    `eos_token_ids` end a generation unless a request ignores them. `summary` is one line for the log.
    """

    executor: Executor
    limits: BatchLimits
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    summary: str


def load_executor(config: EngineConfig, progress: Progress | None = None) -> LoadedExecutor:
    """Find the checkpoint, check that model and cache fit in memory, read the weights, start the executor.

    Raises `ConfigError` (or its child `CheckpointError`), in one line, for whatever is wrong with the
    flags, the files or the memory, before anything large is allocated.
    """
    device = chosen_device(os.environ.get(DEVICE, ""))
    gpu = device.type == "cuda"
    source = resolve(config.model, config.load_format)
    model_config = read_model_config(source)
    max_model_len = context_length(config.max_model_len, model_config)
    step_tokens = GPU_STEP_TOKENS if gpu else STEP_TOKENS
    limits = BatchLimits(
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens or max(step_tokens, config.max_num_seqs),
        max_blocks=-(-max_model_len // config.block_size),
        block_size=config.block_size,
    )
    platform = Platform.of(device)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    dtype = default_dtype(model_config, platform) if dtype is None else dtype
    ctx = BuildContext.of(device=device, dtype=dtype, max_positions=max_model_len, block_size=config.block_size)
    # Built without memory first: what does not fit is refused before it is allocated (0.1 s for 30 layers).
    shapes = built(model_config, dataclasses.replace(ctx, device=torch.device("meta")))
    per_block = block_bytes(shapes.kv_spec, config.block_size, dtype)
    left = left_by_weights(shapes, free_memory(device) if gpu else available_memory())
    needs = GpuNeeds(per_block, config.kv_cache_bytes, limits, model_config.vocab_size)
    num_blocks = 0
    if gpu:
        needs.check(left)
    else:
        num_blocks = num_kv_blocks(per_block, limits, kv_cache_bytes=config.kv_cache_bytes, available=left)
    model = built(model_config, ctx)
    load_weights(model, source, None if progress is None else lambda done, total: progress("weights", done, total))
    num_threads = config.num_threads or available_cpus()
    executor: Executor
    if gpu:
        if config.num_threads is not None:  # what torch still computes on the host: weights that are converted
            torch.set_num_threads(config.num_threads)
        executor, where = start_gpu(model, ctx, needs)
    else:
        executor = CpuExecutor(
            model,
            num_blocks=num_blocks,
            limits=limits,
            vocab_size=model_config.vocab_size,
            dtype=dtype,
            num_threads=num_threads,
        )
        where = f"{num_threads} CPU threads"
    summary = (
        f"{source.name} ({model_config.architecture}, {dtype}) on {where}; context {max_model_len}; "
        f"KV cache of {executor.num_blocks} blocks of {config.block_size} tokens, "
        f"{mib(executor.num_blocks * per_block)}"
    )
    return LoadedExecutor(
        executor, limits, max_model_len, model_config.vocab_size, model_config.eos_token_ids, summary
    )


def chosen_device(setting: str) -> torch.device:
    """The device that `TOKENSPEED_DEVICE` asks for. Raises `ConfigError` for one that is not there."""
    if setting not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE} must be cpu or cuda, got {setting!r}")
    found = torch.cuda.is_available()
    if setting == "cuda" and not found:
        raise ConfigError(f"{DEVICE}=cuda, but torch finds no GPU here")
    return torch.device("cuda", 0) if found and setting != "cpu" else torch.device("cpu")


def built(config: ModelConfig, ctx: BuildContext) -> CausalLM:
    """The model with its kernels chosen. A choice that cannot be honoured is a `ConfigError` that says why."""
    try:
        return build_model(config, ctx)
    except KernelError as error:
        raise ConfigError(str(error)) from error


def context_length(asked: int | None, config: ModelConfig) -> int:
    """The longest sequence. Raises `ConfigError` if more is asked for than the model has positions."""
    if asked is not None and asked > config.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {asked} is more than max_position_embeddings ({config.max_position_embeddings}) "
            f"in {config.file}"
        )
    return config.max_position_embeddings if asked is None else asked


def left_by_weights(model: CausalLM, available: int) -> int:
    """Bytes of `available` memory that are left beside the weights. Raises `ConfigError` if they do not fit."""
    weights = sum(weight.parameter.numel() * weight.parameter.element_size() for weight in model.weights())
    if weights > available:
        raise ConfigError(
            f"the weights take {mib(weights)}, but only {mib(available)} of memory are available; "
            f"free memory, or choose a smaller --model or --dtype"
        )
    return available - weights
