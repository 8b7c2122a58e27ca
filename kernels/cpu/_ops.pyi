from typing import Literal

Isa = Literal["portable", "avx2", "avx512", "avx512_bf16"]

LINEAR_FEW: int
"""Tokens up to which `Kernels.linear` reads weights as they lie; beyond, it transposes them first."""

def num_helpers() -> int:
    """Threads that this process has started for the kernels so far, the calling ones not counted."""

def supports(isa: Isa) -> bool:
    """Whether this processor runs it and this build has it."""

def kv_store(
    source: int, source_stride: int, cache: int, slots: int, tokens: int, size: int, num_slots: int, threads: int
) -> None:
    """Copy `size` bytes a token; `source_stride` is in bytes. `IndexError` on a slot that does not exist."""

class Kernels:
    """The kernels of one instruction set and one type. Tensors are addresses; strides are in elements.

    Nothing is checked but lengths, blocks and positions (`IndexError`): the callers check the rest.
    """

    def __init__(self, isa: Isa, dtype: Literal["float32", "bfloat16"]) -> None:
        """`ValueError` where the instruction set is not supported."""

    def mha_decode(
        self,
        q: int,
        q_stride: int,
        out: int,
        k: int,
        v: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_table: int,
        table_stride: int,
        table_width: int,
        kv_len: int,
        rows: int,
        scale: float,
        threads: int,
    ) -> None: ...
    def mha_prefill(
        self,
        q: int,
        q_stride: int,
        out: int,
        k: int,
        v: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_table: int,
        table_stride: int,
        table_width: int,
        kv_len: int,
        rows: int,
        scale: float,
        query_start: int,
        threads: int,
    ) -> None: ...
    def rms_norm(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        weight: int,
        y: int,
        residual_out: int,
        tokens: int,
        hidden: int,
        eps: float,
        threads: int,
    ) -> None:
        """`residual` and `residual_out` are 0 without a residual."""

    def rotary(
        self,
        q: int,
        q_stride: int,
        q_head_stride: int,
        q_heads: int,
        k: int,
        k_stride: int,
        k_head_stride: int,
        k_heads: int,
        head_dim: int,
        interleaved: bool,
        positions: int,
        cos_sin: int,
        num_positions: int,
        tokens: int,
        threads: int,
    ) -> None: ...
    def silu_mul(self, gate_up: int, stride: int, out: int, tokens: int, size: int, threads: int) -> None: ...
    def linear(
        self,
        x: int,
        x_stride: int,
        weight: int,
        weight_stride: int,
        bias: int,
        out: int,
        float_out: bool,
        tokens: int,
        columns: int,
        rows: int,
        threads: int,
    ) -> None:
        """`bias` is 0 without one. With `float_out` the results are float32."""
