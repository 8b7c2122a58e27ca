"""From a configuration to an executor that can run steps."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import default_dtype, load_weights, stored_forms
from tokenspeed.config import MAX_THREADS, EngineConfig, Quantization
from tokenspeed.errors import ConfigError
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.device_step import Model
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.interface import Executor
from tokenspeed.executor.joint import JointExecutor
from tokenspeed.executor.load_gpu import STEP_TOKENS as GPU_STEP_TOKENS
from tokenspeed.executor.load_gpu import Needs, free_memory, start_gpu
from tokenspeed.executor.machine import available_cpus, available_memory
from tokenspeed.executor.memory import block_bytes, mib, num_kv_blocks
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import KernelError, Target
from tokenspeed.kernels.selection import plain_form
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.over_ranks import OverRanks
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.launched import Place
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.world import World

STEP_TOKENS = 256
"""Tokens of a step on a CPU, unless a flag says otherwise: every stream waits for the prompts in its step, and
two cores prefill about 300 tokens a second of a small model."""

DEVICE = "TOKENSPEED_DEVICE"
"""Environment variable: cpu or cuda; unset, a GPU is used where torch finds one."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all) as loading goes on."""

JOIN_SECONDS = 25.0
"""How long ranks that a launcher has started wait for each other: it starts all of them at once."""


@dataclass(frozen=True, slots=True)
class LoadedExecutor:
    """An executor with its model's weights in memory, and what the engine must know of it.

    `pool_blocks` are the KV blocks of each pool, one for each group of ranks that attends to requests of its own.

    `eos_token_ids` end a generation unless a request ignores them. `summary` is one line for the log. `world` are the
    ranks that compute each step together, None for one alone.
    """

    executor: Executor
    pool_blocks: tuple[int, ...]
    limits: BatchLimits
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    summary: str
    world: World | None = None


def load_executor(
    config: EngineConfig,
    progress: Progress | None = None,
    place: Place | None = None,
    *,
    join_seconds: float = JOIN_SECONDS,
) -> LoadedExecutor:
    """Find the checkpoint, check that model and cache fit in memory, meet the other ranks, read the weights, start the
    executor. `place` is which rank this is, None the only one.

    Raises `ConfigError` (or its child `CheckpointError`), in one line, for whatever is wrong with the
    flags, the files or the memory, before anything large is allocated; also for ranks that do not come within
    `join_seconds`, or were started with other flags.
    """
    place = place or Place.alone()
    device = chosen_device(os.environ.get(DEVICE, ""), place)
    source = resolve(config.model, config.load_format)
    model_config = read_model_config(source)
    max_model_len = context_length(config.max_model_len, model_config)
    limits = limits_of(config, max_model_len, GPU_STEP_TOKENS if device.type == "cuda" else STEP_TOKENS)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype)
    dtype = default_dtype(model_config, Platform.of(device)) if dtype is None else dtype
    # As the checkpoint has them, unless a type was asked for.
    forms = stored_forms(source) if config.dtype == "auto" and device.type == "cpu" else {}
    ctx = BuildContext.of(
        forms=forms,
        plain_form=form_of_plain(config.quantization, Target(Platform.of(device), dtype), model_config),
        device=device,
        dtype=dtype,
        max_positions=max_model_len,
        block_size=config.block_size,
        mesh=Mesh.of(place.world, **config.parallel.sizes()),
        rank=place.rank,
    )
    # Built without memory first: what does not fit is refused before it is allocated (0.1 s for 30 layers).
    shapes = built(model_config, ctx.on(torch.device("meta")))
    needs = Needs(
        block_bytes(shapes.kv_spec, config.block_size, dtype), config.kv_cache_bytes, limits, model_config.vocab_size
    )
    fits = fitting(needs, shapes, device, place)
    world = None
    if place.world > 1:
        world = join(ctx, place, join_seconds)
        agree(world, config, model_config, limits, dtype)
    model = built(model_config, ctx)
    load_weights(model, source, None if progress is None else lambda done, total: progress("weights", done, total))
    name = model_config.architecture
    runs: Model = model if world is None else OverRanks(model, world, name).prepared(limits.max_tokens)
    executor, pool_blocks, where = started(runs, ctx, needs, fits, config.num_threads, place, world)
    caches = f"KV cache of {pool_blocks[0]}" if len(pool_blocks) == 1 else f"KV caches of {pool_blocks}"
    rounded = "" if config.quantization == "none" else f", weights rounded to {config.quantization}"
    summary = (
        f"{source.name} ({model_config.architecture}, {dtype}{rounded}) on {where}; context {max_model_len}; "
        f"{caches} blocks of {config.block_size} tokens, {mib(executor.num_blocks * needs.per_block)}"
    )
    eos = model_config.eos_token_ids
    return LoadedExecutor(executor, pool_blocks, limits, max_model_len, model_config.vocab_size, eos, summary, world)


def form_of_plain(quantization: Quantization, target: Target, config: ModelConfig) -> str:
    """The form that matrices of plain numbers get. Raises `ConfigError` where they cannot be rounded, and for a choice
    of kernels that cannot be honoured."""
    if quantization == "none":
        try:
            return plain_form(target)
        except KernelError as error:
            raise ConfigError(str(error)) from error
    if target.platform.vendor != "cpu":
        raise ConfigError(f"--quantization {quantization} needs a CPU, this engine runs on {target.platform.vendor}")
    if config.dtype == "quantised":
        raise ConfigError(f"--quantization {quantization}: the weights of {config.file} are quantised already")
    return "q8_0"


def limits_of(config: EngineConfig, max_model_len: int, step_tokens: int) -> BatchLimits:
    """The largest step, of `step_tokens` where nothing else was asked for."""
    return BatchLimits(
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens or max(step_tokens, config.max_num_seqs),
        max_blocks=-(-max_model_len // config.block_size),
        block_size=config.block_size,
    )


def fitting(needs: Needs, shapes: CausalLM, device: torch.device, place: Place) -> int:
    """KV blocks that fit beside the weights on a CPU; on a GPU that is known only once everything else is there, and
    this is 0. Raises `ConfigError` if not even the least that is needed fits."""
    if device.type == "cuda":
        needs.check(left_by_weights(shapes, free_memory(device)))
        return 0
    left = left_by_weights(shapes, available_memory() // place.local_world)
    return num_kv_blocks(needs.per_block, needs.limits, kv_cache_bytes=needs.kv_cache_bytes, available=left)


def started(
    model: Model, ctx: BuildContext, needs: Needs, fits: int, num_threads: int | None, place: Place, world: World | None
) -> tuple[Executor, tuple[int, ...], str]:
    """An executor, the KV blocks of each pool, and where it runs in words. The ranks of a group all take as many as the
    least of them has; none returns before all are ready. `fits` is how many there are on a CPU."""
    executor: CpuExecutor | GpuExecutor
    if ctx.device.type == "cuda":
        if num_threads is not None:  # what torch still computes on the host: weights that are converted
            torch.set_num_threads(num_threads)
        executor, pool_blocks, where = start_gpu(model, ctx, needs, world)
    else:
        num_threads = num_threads or min(MAX_THREADS, max(1, available_cpus() // place.local_world))
        pool_blocks = (fits,) if world is None else world.least_by_group(fits)
        executor = CpuExecutor(
            model,
            num_blocks=fits if world is None else pool_blocks[world.group],
            limits=needs.limits,
            vocab_size=needs.vocab_size,
            dtype=ctx.dtype,
            num_threads=num_threads,
            peers=world,
        )
        where = f"{num_threads} CPU threads"
    if world is None:
        return executor, pool_blocks, where
    world.least(0)
    where = f"{place.world} ranks, each on {where}"
    if len(pool_blocks) == 1:
        return executor, pool_blocks, where
    return JointExecutor(executor, world, pool_blocks), pool_blocks, where


def join(ctx: BuildContext, place: Place, seconds: float) -> World:
    """Meet the other ranks. Raises `ConfigError` if they do not come within so many seconds."""
    return World.join(
        ctx.mesh, ctx.rank, ctx.device,
        address=place.address, port=place.port, timeout=seconds, standing=place.standing,
    )  # fmt: skip


OWN = frozenset({"model", "tokenizer", "chat_template", "record", "cache_events", "parallel", "num_threads"})
"""Of a configuration what each rank may have its own of, or what is compared in another way: paths of a machine, the
layout when ranks meet, how many threads a machine has, what rank 0 tells."""

FLAGS = {"kv_cache_bytes": "--kv-cache-memory"}
"""Flags that are not called like what they set."""

KERNELS = "TOKENSPEED_KERNELS"


def agree(
    world: World, config: EngineConfig, model_config: ModelConfig, limits: BatchLimits, dtype: torch.dtype
) -> None:
    """Raise `ConfigError` on every rank, naming the flag, if ranks were started differently: of what they were told
    everything but `OWN`, and what each has made of it."""
    described = msgspec.json.encode(model_config.hf, order="deterministic")
    world.same("--model", f"{model_config.architecture} {hashlib.sha256(described).hexdigest()[:16]}")
    config = msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig)  # as another rank reads it: 1 is 1.0
    for name in config.__struct_fields__:
        if name not in OWN:
            world.same(FLAGS.get(name, "--" + name.replace("_", "-")), str(getattr(config, name)))
    for flag, value in (
        ("--dtype", str(dtype)),
        ("--max-model-len", str(limits.max_blocks * limits.block_size)),
        ("--max-num-batched-tokens", str(limits.max_tokens)),
        (KERNELS, os.environ.get(KERNELS, "")),
    ):
        world.same(flag, value)


def chosen_device(setting: str, place: Place | None = None) -> torch.device:
    """The device that `TOKENSPEED_DEVICE` asks for: each rank of a machine has its own GPU, which becomes this thread's
    current one. Raises `ConfigError` for one that is not there."""
    place = place or Place.alone()
    if setting not in ("", "cpu", "cuda"):
        raise ConfigError(f"{DEVICE} must be cpu or cuda, got {setting!r}")
    found = torch.cuda.is_available()
    if setting == "cuda" and not found:
        raise ConfigError(f"{DEVICE}=cuda, but torch finds no GPU here")
    if not found or setting == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank)
    if place.world > 1:
        if place.local_world > torch.cuda.device_count():
            raise ConfigError(
                f"--tensor-parallel-size {place.world}: {place.local_world} ranks on this machine need a GPU each, but "
                f"torch finds {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(device)
    return device


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
