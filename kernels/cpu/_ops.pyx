"""The door to the C++ kernels: addresses in, errors out, no GIL in between. Its types are in _ops.pyi."""

from libc.stdint cimport int32_t, int64_t, uintptr_t
from libcpp.vector cimport vector


cdef extern from "parallel.h" namespace "tokenspeed::cpu" nogil:
    const int c_max_threads "tokenspeed::cpu::MAX_THREADS"
    int c_num_helpers "tokenspeed::cpu::num_helpers"()


cdef extern from "kernels.h" namespace "tokenspeed::cpu" nogil:
    cdef enum class Form:
        rows
        panels
        q4_0
        q4_1
        q4_k
        q8_0
        q5_0
        q5_1
        q5_k
        q6_k
        mixed

    cdef enum class Type:
        f32
        bf16

    cdef enum class Isa:
        portable
        avx2
        avx512
        avx512_bf16
        amx

    cdef cppclass Attention:
        const void* q
        void* out
        const void* k
        const void* v
        const int32_t* block_table
        const int32_t* kv_len
        int64_t q_stride
        int64_t table_stride
        int64_t table_width
        int64_t num_blocks
        int32_t rows
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        int32_t block_size
        float scale

    cdef cppclass Linear:
        const void* x
        const void* weight
        const void* bias
        void* out
        int64_t x_stride
        int64_t weight_stride
        int64_t tokens
        int64_t columns
        int64_t rows
        bint float_out
        Form form

    cdef cppclass Table "tokenspeed::cpu::Kernels":
        pass

    const int64_t OK
    const int c_linear_few "tokenspeed::cpu::LINEAR_FEW"
    bint c_supports "tokenspeed::cpu::supports"(Isa)
    bint c_full_rate_pairs "tokenspeed::cpu::full_rate_pairs"()
    const Table* c_kernels "tokenspeed::cpu::kernels"(Isa, Type)
    int64_t c_mha_decode "tokenspeed::cpu::mha_decode"(const Table&, const Attention&, int) except +
    int64_t c_mha_prefill "tokenspeed::cpu::mha_prefill"(
        const Table&, const Attention&, const int32_t*, int) except +
    int64_t c_kv_store "tokenspeed::cpu::kv_store"(
        const void*, int64_t, void*, const int64_t*, int64_t, int64_t, int64_t, int)
    void c_rms_norm "tokenspeed::cpu::rms_norm"(
        const Table&, const void*, int64_t, const void*, int64_t, const void*, void*, void*, int64_t, int64_t, float,
        int)
    int64_t c_rotary "tokenspeed::cpu::rotary"(
        const Table&, void*, int64_t, int64_t, int64_t, void*, int64_t, int64_t, int64_t, int64_t, bint,
        const int64_t*, const float*, int64_t, int64_t, int)
    void c_silu_mul "tokenspeed::cpu::silu_mul"(const Table&, const void*, int64_t, void*, int64_t, int64_t, int)
    void c_linear "tokenspeed::cpu::linear"(const Table&, const Linear&, int) except +
    int64_t c_embedding "tokenspeed::cpu::embedding"(
        const Table&, Form, const void*, int64_t, int64_t, const int64_t*, int64_t, void*)


cdef extern from "blocks.h" namespace "tokenspeed::cpu" nogil:
    cdef cppclass CMatrix "tokenspeed::cpu::Matrix":
        const void* data
        const void* bias
        int64_t rows
        int64_t columns
        int64_t stride
        Form form

    cdef cppclass Stream:
        const void* x
        const void* residual
        const void* gain
        void* y
        void* residual_out
        int64_t x_stride
        int64_t residual_stride
        int64_t tokens
        float eps

    cdef cppclass CGqaBlock "tokenspeed::cpu::GqaBlock":
        CMatrix qkv
        CMatrix out
        const void* q_gain
        const void* k_gain
        const float* cos_sin
        int64_t num_positions
        void* k_cache
        void* v_cache
        int64_t num_blocks
        int32_t block_size
        int32_t num_heads
        int32_t num_kv_heads
        int32_t head_dim
        float scale
        float head_eps
        bint interleaved

    cdef cppclass CBlockRows "tokenspeed::cpu::BlockRows":
        const int64_t* positions
        const int64_t* kv_slots
        const int32_t* kv_len
        const int32_t* block_table
        int64_t table_stride
        int64_t table_width

    cdef cppclass CMlpBlock "tokenspeed::cpu::MlpBlock":
        CMatrix gate_up
        CMatrix down

    cdef cppclass StackLayer:
        CGqaBlock attention
        CMlpBlock mlp
        const void* attention_gain
        const void* mlp_gain
        float eps

    cdef cppclass Passage:
        const void* x
        const void* gain
        void* y
        int64_t x_stride
        int64_t tokens
        float eps

    int64_t c_gqa_block "tokenspeed::cpu::gqa_block"(
        const Table&, const CGqaBlock&, const CBlockRows&, const Stream&, int) except +
    void c_mlp_block "tokenspeed::cpu::mlp_block"(const Table&, const CMlpBlock&, const Stream&, int) except +
    int64_t c_stack "tokenspeed::cpu::stack"(
        const Table&, const vector[StackLayer]&, const CBlockRows&, const Passage&, int) except +


cdef dict ISAS = {"portable": <int> Isa.portable, "avx2": <int> Isa.avx2, "avx512": <int> Isa.avx512,
                  "avx512_bf16": <int> Isa.avx512_bf16, "amx": <int> Isa.amx}
cdef dict TYPES = {"float32": <int> Type.f32, "bfloat16": <int> Type.bf16}

cdef dict FORMS = {"rows": <int> Form.rows, "panels": <int> Form.panels, "q4_0": <int> Form.q4_0,
                   "q4_1": <int> Form.q4_1, "q4_k": <int> Form.q4_k, "q8_0": <int> Form.q8_0,
                   "q5_0": <int> Form.q5_0, "q5_1": <int> Form.q5_1, "q5_k": <int> Form.q5_k,
                   "q6_k": <int> Form.q6_k, "mixed": <int> Form.mixed}

LINEAR_FEW = c_linear_few
MAX_THREADS = c_max_threads


def num_helpers():
    return c_num_helpers()


def full_rate_pairs():
    return c_full_rate_pairs()


def supports(str isa):
    return c_supports(<Isa> <int> ISAS[isa])


def kv_store(uintptr_t source, int64_t source_stride, uintptr_t cache, uintptr_t slots, int64_t tokens, int64_t size,
             int64_t num_slots, int threads):
    cdef int64_t bad
    with nogil:
        bad = c_kv_store(<const void*> source, source_stride, <void*> cache, <const int64_t*> slots, tokens, size,
                         num_slots, threads)
    if bad != OK:
        raise IndexError(f"kv_store: the slot of token {bad} is not among the {num_slots} of the cache")


cdef class Kernels:
    """The kernels of one instruction set and one type."""

    cdef const Table* table

    def __cinit__(self, str isa, str dtype):
        self.table = c_kernels(<Isa> <int> ISAS[isa], <Type> <int> TYPES[dtype])
        if self.table == NULL:
            raise ValueError(f"this processor or build has no {isa}")

    def mha_decode(self, uintptr_t q, int64_t q_stride, uintptr_t out, uintptr_t k, uintptr_t v, int64_t num_blocks,
                   int block_size, int num_heads, int num_kv_heads, int head_dim, uintptr_t block_table,
                   int64_t table_stride, int64_t table_width, uintptr_t kv_len, int rows, float scale, int threads):
        cdef Attention a = attention(q, q_stride, out, k, v, num_blocks, block_size, num_heads, num_kv_heads, head_dim,
                                     block_table, table_stride, table_width, kv_len, rows, scale)
        cdef int64_t bad
        with nogil:
            bad = c_mha_decode(self.table[0], a, threads)
        if bad != OK:
            raise IndexError(f"mha_decode: the length of row {bad} or a block of it is out of range")

    def mha_prefill(self, uintptr_t q, int64_t q_stride, uintptr_t out, uintptr_t k, uintptr_t v, int64_t num_blocks,
                    int block_size, int num_heads, int num_kv_heads, int head_dim, uintptr_t block_table,
                    int64_t table_stride, int64_t table_width, uintptr_t kv_len, int rows, float scale,
                    uintptr_t query_start, int threads):
        cdef Attention a = attention(q, q_stride, out, k, v, num_blocks, block_size, num_heads, num_kv_heads, head_dim,
                                     block_table, table_stride, table_width, kv_len, rows, scale)
        cdef int64_t bad
        with nogil:
            bad = c_mha_prefill(self.table[0], a, <const int32_t*> query_start, threads)
        if bad != OK:
            raise IndexError(f"mha_prefill: the lengths of row {bad} or a block of it are out of range")

    def rms_norm(self, uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t weight,
                 uintptr_t y, uintptr_t residual_out, int64_t tokens, int64_t hidden, float eps, int threads):
        with nogil:
            c_rms_norm(self.table[0], <const void*> x, x_stride, <const void*> residual, residual_stride,
                       <const void*> weight, <void*> y, <void*> residual_out, tokens, hidden, eps, threads)

    def rotary(self, uintptr_t q, int64_t q_stride, int64_t q_head_stride, int64_t q_heads, uintptr_t k,
               int64_t k_stride, int64_t k_head_stride, int64_t k_heads, int64_t head_dim, bint interleaved,
               uintptr_t positions, uintptr_t cos_sin, int64_t num_positions, int64_t tokens, int threads):
        cdef int64_t bad
        with nogil:
            bad = c_rotary(self.table[0], <void*> q, q_stride, q_head_stride, q_heads, <void*> k, k_stride,
                           k_head_stride, k_heads, head_dim, interleaved, <const int64_t*> positions,
                           <const float*> cos_sin, num_positions, tokens, threads)
        if bad != OK:
            raise IndexError(f"rotary: the position of token {bad} is not among the {num_positions} of the table")

    def silu_mul(self, uintptr_t gate_up, int64_t stride, uintptr_t out, int64_t tokens, int64_t size, int threads):
        with nogil:
            c_silu_mul(self.table[0], <const void*> gate_up, stride, <void*> out, tokens, size, threads)

    def linear(self, uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias,
               uintptr_t out, bint float_out, int64_t tokens, int64_t columns, int64_t rows, str form, int threads):
        cdef Linear a
        a.form = <Form> <int> FORMS[form]
        a.float_out = float_out
        a.x, a.weight, a.bias, a.out = <const void*> x, <const void*> weight, <const void*> bias, <void*> out
        a.x_stride, a.weight_stride, a.tokens, a.columns, a.rows = x_stride, weight_stride, tokens, columns, rows
        with nogil:
            c_linear(self.table[0], a, threads)

    def embedding(self, str form, uintptr_t table, int64_t num_rows, int64_t columns, uintptr_t ids, int64_t tokens,
                  uintptr_t out):
        cdef Form packed = <Form> <int> FORMS[form]
        cdef int64_t bad
        with nogil:
            bad = c_embedding(self.table[0], packed, <const void*> table, num_rows, columns, <const int64_t*> ids,
                              tokens, <void*> out)
        if bad != OK:
            raise IndexError(f"embedding: id {bad} is not among the {num_rows} of the table")


cdef Attention attention(uintptr_t q, int64_t q_stride, uintptr_t out, uintptr_t k, uintptr_t v, int64_t num_blocks,
                         int block_size, int num_heads, int num_kv_heads, int head_dim, uintptr_t block_table,
                         int64_t table_stride, int64_t table_width, uintptr_t kv_len, int rows, float scale):
    cdef Attention a
    a.q, a.q_stride, a.out = <const void*> q, q_stride, <void*> out
    a.k, a.v, a.num_blocks, a.block_size = <const void*> k, <const void*> v, num_blocks, block_size
    a.num_heads, a.num_kv_heads, a.head_dim, a.scale = num_heads, num_kv_heads, head_dim, scale
    a.block_table = <const int32_t*> block_table
    a.table_stride, a.table_width = table_stride, table_width
    a.kv_len, a.rows = <const int32_t*> kv_len, rows
    return a


cdef CMatrix matrix_of(tuple of):
    cdef CMatrix m
    data, bias, rows, columns, stride, form = of
    m.data, m.bias = <const void*> <uintptr_t> data, <const void*> <uintptr_t> bias
    m.rows, m.columns, m.stride = rows, columns, stride
    m.form = <Form> <int> FORMS[form]
    return m


cdef class BlockRows:
    """Where the rows of a step lie."""

    cdef CBlockRows rows

    def __cinit__(self, uintptr_t positions, uintptr_t kv_slots, uintptr_t kv_len, uintptr_t block_table,
                  int64_t table_stride, int64_t table_width):
        self.rows.positions, self.rows.kv_slots = <const int64_t*> positions, <const int64_t*> kv_slots
        self.rows.kv_len, self.rows.block_table = <const int32_t*> kv_len, <const int32_t*> block_table
        self.rows.table_stride, self.rows.table_width = table_stride, table_width


cdef class GqaBlock:
    """An attention block with its weights and caches."""

    cdef Kernels kernels
    cdef CGqaBlock block

    def __cinit__(self, Kernels kernels, tuple qkv, tuple out, uintptr_t q_gain, uintptr_t k_gain, float head_eps,
                  uintptr_t cos_sin, int64_t num_positions, bint interleaved, uintptr_t k_cache, uintptr_t v_cache,
                  int64_t num_blocks, int block_size, int num_heads, int num_kv_heads, int head_dim, float scale):
        self.kernels = kernels
        self.block.qkv, self.block.out = matrix_of(qkv), matrix_of(out)
        self.block.q_gain, self.block.k_gain = <const void*> q_gain, <const void*> k_gain
        self.block.head_eps, self.block.scale, self.block.interleaved = head_eps, scale, interleaved
        self.block.cos_sin, self.block.num_positions = <const float*> cos_sin, num_positions
        self.block.k_cache, self.block.v_cache = <void*> k_cache, <void*> v_cache
        self.block.num_blocks, self.block.block_size = num_blocks, block_size
        self.block.num_heads, self.block.num_kv_heads, self.block.head_dim = num_heads, num_kv_heads, head_dim

    def run(self, BlockRows rows, uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
            uintptr_t gain, float eps, uintptr_t y, uintptr_t residual_out, int64_t tokens, int threads):
        cdef Stream s = stream(x, x_stride, residual, residual_stride, gain, eps, y, residual_out, tokens)
        cdef int64_t bad
        with nogil:
            bad = c_gqa_block(self.kernels.table[0], self.block, rows.rows, s, threads)
        if bad != OK:
            raise IndexError(f"gqa_block_decode: position, slot, length or a block of row {bad} is out of range")


cdef class MlpBlock:
    """A feed-forward block with its weights."""

    cdef Kernels kernels
    cdef CMlpBlock block

    def __cinit__(self, Kernels kernels, tuple gate_up, tuple down):
        self.kernels = kernels
        self.block.gate_up, self.block.down = matrix_of(gate_up), matrix_of(down)

    def run(self, uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t gain,
            float eps, uintptr_t y, uintptr_t residual_out, int64_t tokens, int threads):
        cdef Stream s = stream(x, x_stride, residual, residual_stride, gain, eps, y, residual_out, tokens)
        with nogil:
            c_mlp_block(self.kernels.table[0], self.block, s, threads)


cdef class Stack:
    """The layers of a dense decoder."""

    cdef Kernels kernels
    cdef vector[StackLayer] layers

    def __cinit__(self, Kernels kernels):
        self.kernels = kernels

    def add(self, GqaBlock attention, uintptr_t attention_gain, MlpBlock mlp, uintptr_t mlp_gain, float eps):
        cdef StackLayer layer
        layer.attention, layer.mlp, layer.eps = attention.block, mlp.block, eps
        layer.attention_gain, layer.mlp_gain = <const void*> attention_gain, <const void*> mlp_gain
        self.layers.push_back(layer)

    def run(self, BlockRows rows, uintptr_t x, int64_t x_stride, uintptr_t gain, float eps, uintptr_t y,
            int64_t tokens, int threads):
        cdef Passage p
        cdef int64_t bad
        if self.layers.empty():
            raise ValueError("a stack without layers")
        p.x, p.x_stride, p.gain, p.y = <const void*> x, x_stride, <const void*> gain, <void*> y
        p.tokens, p.eps = tokens, eps
        with nogil:
            bad = c_stack(self.kernels.table[0], self.layers, rows.rows, p, threads)
        if bad != OK:
            raise IndexError(f"stack_decode: position, slot, length or a block of row {bad} is out of range")


cdef Stream stream(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, uintptr_t gain,
                   float eps, uintptr_t y, uintptr_t residual_out, int64_t tokens):
    cdef Stream s
    s.x, s.x_stride, s.residual, s.residual_stride = <const void*> x, x_stride, <const void*> residual, residual_stride
    s.gain, s.eps, s.y, s.residual_out = <const void*> gain, eps, <void*> y, <void*> residual_out
    s.tokens = tokens
    return s


include "_moe.pxi"
include "_mla.pxi"
include "_sampling.pxi"
