"""The engine's configuration: frozen, checked once, and never carried down whole.

A component receives the values that it needs; only the entry points and the engine read `EngineConfig`.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from tokenspeed.errors import ConfigError

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
DType = Literal["auto", "float32", "bfloat16"]
Quantization = Literal["none", "int8"]

MAX_QUEUED = 1_000_000
MAX_THREADS = 256
"""Threads of the CPU kernels' pool at most (`kernels/cpu/parallel.h`)."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
STEERED_FLOOR = 70.0
"""Tokens a second that an engine without a `tps_floor` of its own steers every stream for."""


class Parallel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The ranks of one model, and into how many parts each part of it is cut; None is what `Mesh.of` takes then.

    `world` is the number of ranks: one process each, and one GPU each where there are GPUs.
    """

    world: int = 1
    attn_tp: int | None = None
    attn_dp: int | None = None
    attn_copies: int | None = None
    dense_tp: int | None = None
    moe_tp: int | None = None
    moe_ep: int | None = None
    vocab_tp: int | None = None

    def sizes(self) -> dict[str, int | None]:
        """What `Mesh.of` is told besides the world."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name != "world"}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides how an engine is built.

    `model` is a folder, a .gguf file or a Hugging Face hub name; None is the embedded demonstration
    model. `load_format` dummy reads no weights and draws random ones. `quantization` int8 rounds matrices of plain
    numbers to 8 bits while they are loaded, on a CPU. `max_model_len` None is the checkpoint's own. `kv_cache_bytes`
    None sizes the cache from the memory that is free; `max_num_batched_tokens` None is what suits the device. `overlap`
    is the number of steps in flight while the next is planned (0 or 1).

    `tps_floor` is the tokens per second that every stream is promised: a request beside which they could not be
    kept is refused. 0 is none; None steers for `STEERED_FLOOR` and refuses nobody. With `session_admission` a
    session counts with all its KV blocks, also between its turns, and sessions that do not fit wait instead of
    evicting each other; one that is expected to wait longer than `max_queue_seconds` is refused. `record` is a new
    file for every call of the control plane, prompts included. With `cache_events` the engine tells which KV blocks are
    cached, for `AsyncEngine.watch_cache`.

    `parallel` says over how many ranks the model lies, and how. An engine of several ranks ends when no step has landed
    for `watchdog_seconds` although one is in flight: a rank hangs.
    """

    model: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    dtype: DType = "auto"
    load_format: LoadFormat = "auto"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    block_size: int = 64
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_queued_requests: int = 1024
    max_queue_seconds: float = 300.0
    tps_floor: float | None = None
    session_admission: bool = True
    enable_prefix_caching: bool = True
    kv_cache_bytes: int | None = None
    overlap: int = 1
    num_threads: int | None = None
    seed: int | None = None
    record: str | None = None
    cache_events: bool = False
    parallel: Parallel = Parallel()
    watchdog_seconds: float = 60.0

    def check(self) -> None:
        """Raise `ConfigError` naming the first flag that is out of range."""
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"--block-size must be one of {BLOCK_SIZES}, got {self.block_size}")
        positive: tuple[tuple[str, int | None], ...] = (
            ("--max-model-len", self.max_model_len),
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--max-queued-requests", self.max_queued_requests),
            ("--kv-cache-memory", self.kv_cache_bytes),
            ("--num-threads", self.num_threads),
            ("--tensor-parallel-size", self.parallel.world),
        )
        for flag, value in positive:
            if value is not None and value < 1:
                raise ConfigError(f"{flag} must be at least 1, got {value}")
        if self.max_queued_requests > MAX_QUEUED:
            raise ConfigError(f"--max-queued-requests must be at most {MAX_QUEUED}, got {self.max_queued_requests}")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"--num-threads must be at most {MAX_THREADS}, got {self.num_threads}")
        if not 0 <= self.max_queue_seconds < math.inf:
            raise ConfigError(f"--max-queue-seconds must be a number of at least 0, got {self.max_queue_seconds:g}")
        if self.tps_floor is not None and not 0 <= self.tps_floor < math.inf:
            raise ConfigError(f"--tps-floor must be a number of at least 0, got {self.tps_floor:g}")
        if not 0 < self.watchdog_seconds < math.inf:
            raise ConfigError(f"--watchdog-seconds must be a number above 0, got {self.watchdog_seconds:g}")
        if self.cache_events and not self.enable_prefix_caching:
            raise ConfigError("--cache-events has nothing to tell with --no-enable-prefix-caching")
        if self.overlap not in (0, 1):
            raise ConfigError(f"--overlap must be 0 or 1, got {self.overlap}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-num-seqs ({self.max_num_seqs}): every decoding request needs one token a step"
            )
