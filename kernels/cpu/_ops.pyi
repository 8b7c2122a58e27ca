from typing import Literal

Isa = Literal["portable", "avx2", "avx512", "avx512_bf16", "amx"]

Form = str
"""A name of `kernels.forms.FORMS`. Packed matrices are read at their layout's addresses: no stride."""

Matrix = tuple[int, int, int, int, int, Form]
"""Address, address of the bias or 0, rows, columns, stride of a row, form."""

LINEAR_FEW: int
"""Tokens up to which `Kernels.linear` reads weights as they lie; beyond, it transposes them first."""

def num_helpers() -> int:
    """Threads that this process has started for the kernels so far, the calling ones not counted."""

def supports(isa: Isa) -> bool:
    """Whether this processor runs it and this build has it."""

def full_rate_pairs() -> bool:
    """Whether `avx512_bf16` is supported, and its products of pairs take no longer than those of float32."""

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
        form: Form,
        threads: int,
    ) -> None:
        """`bias` is 0 without one. With `float_out` the results are float32. `weight_stride` is of `rows` alone."""

    def embedding(
        self, form: Form, table: int, num_rows: int, columns: int, ids: int, tokens: int, out: int
    ) -> None:
        """Rows of a packed table. `IndexError` on an id that it does not have."""

class BlockRows:
    """Where positions, slots, lengths and block tables of a step's rows lie."""

    def __init__(
        self, positions: int, kv_slots: int, kv_len: int, block_table: int, table_stride: int, table_width: int
    ) -> None: ...

class GqaBlock:
    """An attention block with its weights and caches. Whoever holds it keeps their memory."""

    def __init__(
        self,
        kernels: Kernels,
        qkv: Matrix,
        out: Matrix,
        q_gain: int,
        k_gain: int,
        head_eps: float,
        cos_sin: int,
        num_positions: int,
        interleaved: bool,
        k_cache: int,
        v_cache: int,
        num_blocks: int,
        block_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
    ) -> None: ...
    def run(
        self,
        rows: BlockRows,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        gain: int,
        eps: float,
        y: int,
        residual_out: int,
        tokens: int,
        threads: int,
    ) -> None:
        """`gain` is 0 for an x that is normed, `residual` and `residual_out` without a residual. `IndexError` on a row
        that is out of range; nothing is written then."""

class MlpBlock:
    """A feed-forward block with its weights. Whoever holds it keeps their memory."""

    def __init__(self, kernels: Kernels, gate_up: Matrix, down: Matrix) -> None: ...
    def run(
        self,
        x: int,
        x_stride: int,
        residual: int,
        residual_stride: int,
        gain: int,
        eps: float,
        y: int,
        residual_out: int,
        tokens: int,
        threads: int,
    ) -> None:
        """As `GqaBlock.run`."""

class Stack:
    """The layers of a dense decoder. Whoever holds it keeps their memory."""

    def __init__(self, kernels: Kernels) -> None: ...
    def add(self, attention: GqaBlock, attention_gain: int, mlp: MlpBlock, mlp_gain: int, eps: float) -> None:
        """One more layer, of the sizes of those before, over as many positions and as many blocks of a cache."""

    def run(
        self, rows: BlockRows, x: int, x_stride: int, gain: int, eps: float, y: int, tokens: int, threads: int
    ) -> None:
        """All layers, then the norm of `gain` and `eps`. `IndexError` on a row that is out of range; nothing is written
        then. `ValueError` without a layer."""

class SamplerTables:
    """The addresses of a `SamplerState`'s tables, in its order. Whoever holds it keeps their memory."""

    def __init__(
        self,
        kernels: Kernels,
        num_slots: int,
        vocab: int,
        mask_words: int,
        features: int,
        temperature: int,
        top_k: int,
        top_p: int,
        min_p: int,
        repetition: int,
        presence: int,
        frequency: int,
        min_length: int,
        seed: int,
        length: int,
        last_token: int,
        bias: int,
        seen: int,
        mask: int,
    ) -> None: ...
    def sample(self, logits: int, slots: int, tokens: int, rows: int, threads: int) -> None:
        """A token for each row of logits [rows, vocab], which are overwritten. `IndexError` on a slot past the tables;
        nothing is written then."""

ROUTE_MOST: int
"""Experts that a token may name, and groups of experts."""

class MoeRoute:
    """The choice of one model's experts. `top_groups` of the `groups` must hold `top_k` experts."""

    def __init__(
        self,
        kernels: Kernels,
        experts: int,
        top_k: int,
        num_shared: int,
        groups: int,
        top_groups: int,
        sigmoid: bool,
        normalise: bool,
    ) -> None: ...
    def run(
        self,
        logits: int,
        stride: int,
        float_logits: bool,
        bias: int,
        scale: float,
        tokens: int,
        num_tokens: int,
        ids: int,
        weights: int,
        threads: int,
    ) -> None:
        """`bias` and `num_tokens` are 0 where there is none. With `float_logits` the logits are float32."""

class MoeExperts:
    """The experts' feed-forward in one layer's shape."""

    def __init__(self, kernels: Kernels, experts: int, hidden: int, inner: int) -> None: ...
    def run(
        self,
        x: int,
        x_stride: int,
        gate_up: int,
        down: int,
        ids: int,
        weights: int,
        tokens: int,
        slots: int,
        out: int,
        threads: int,
    ) -> None:
        """`IndexError` on an expert that does not exist; nothing is written then."""

class MlaDecode:
    """Absorbed latent attention in one model's shape."""

    def __init__(self, kernels: Kernels, num_heads: int, rank: int, rope: int, block_size: int) -> None: ...
    def run(
        self,
        q_latent: int,
        q_strides: tuple[int, ...],
        q_rope: int,
        rope_strides: tuple[int, ...],
        cache: int,
        num_blocks: int,
        block_table: int,
        table_stride: int,
        table_width: int,
        kv_len: int,
        rows: int,
        queries: int,
        scale: float,
        out: int,
        threads: int,
    ) -> None:
        """Strides of rows, queries and heads. `IndexError` on a row that is out of range; nothing is written then."""

class MlaPrefill:
    """Expanded latent attention of one row in one model's shape."""

    def __init__(
        self, kernels: Kernels, num_heads: int, nope: int, v_dim: int, rank: int, rope: int, block_size: int
    ) -> None: ...
    def run(
        self,
        q: int,
        q_stride: int,
        cache: int,
        num_blocks: int,
        block_table: int,
        table_width: int,
        kv_len: int,
        tokens: int,
        k_up: int,
        k_up_stride: int,
        v_up: int,
        v_up_stride: int,
        scale: float,
        out: int,
        threads: int,
    ) -> None:
        """`IndexError` on lengths or blocks that are out of range; nothing is written then."""
