# Latent attention's part of _ops.pyx.

cdef extern from "mla.h" namespace "tokenspeed::cpu" nogil:
    cdef cppclass CLatentDecode "tokenspeed::cpu::LatentDecode"(Attention):
        const void* q_rope
        int64_t q_query_stride
        int64_t q_head_stride
        int64_t rope_row_stride
        int64_t rope_query_stride
        int64_t rope_head_stride
        int32_t queries
        int32_t rank

    cdef cppclass CLatentPrefill "tokenspeed::cpu::LatentPrefill"(Attention):
        const void* k_up
        const void* v_up
        int64_t k_up_stride
        int64_t v_up_stride
        int32_t tokens
        int32_t nope
        int32_t v_dim
        int32_t rank

    int64_t c_mla_decode "tokenspeed::cpu::mla_decode"(const Table&, const CLatentDecode&, int) except +
    int64_t c_mla_prefill "tokenspeed::cpu::mla_prefill"(const Table&, const CLatentPrefill&, int) except +


cdef class MlaDecode:
    """Absorbed latent attention of one model's shape."""

    cdef Kernels kernels
    cdef CLatentDecode shape

    def __cinit__(self, Kernels kernels, int num_heads, int rank, int rope, int block_size):
        self.kernels = kernels
        self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim = num_heads, 1, rank + rope
        self.shape.rank, self.shape.block_size = rank, block_size

    def run(self, uintptr_t q_latent, tuple q_strides, uintptr_t q_rope, tuple rope_strides, uintptr_t cache,
            int64_t num_blocks, uintptr_t block_table, int64_t table_stride, int64_t table_width, uintptr_t kv_len,
            int rows, int queries, float scale, uintptr_t out, int threads):
        cdef CLatentDecode a = self.shape
        cdef int64_t bad
        a.q, a.q_rope, a.k, a.out = <const void*> q_latent, <const void*> q_rope, <const void*> cache, <void*> out
        a.q_stride, a.q_query_stride, a.q_head_stride = q_strides[0], q_strides[1], q_strides[2]
        a.rope_row_stride, a.rope_query_stride, a.rope_head_stride = rope_strides[0], rope_strides[1], rope_strides[2]
        a.block_table, a.table_stride, a.table_width = <const int32_t*> block_table, table_stride, table_width
        a.num_blocks, a.kv_len, a.rows = num_blocks, <const int32_t*> kv_len, rows
        a.queries, a.scale = queries, scale
        with nogil:
            bad = c_mla_decode(self.kernels.table[0], a, threads)
        if bad != OK:
            raise IndexError(f"mla_decode: the length of row {bad} or a block of it is out of range")


cdef class MlaPrefill:
    """Expanded latent attention of one model's shape."""

    cdef Kernels kernels
    cdef CLatentPrefill shape

    def __cinit__(self, Kernels kernels, int num_heads, int nope, int v_dim, int rank, int rope, int block_size):
        self.kernels = kernels
        self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim = num_heads, 1, rank + rope
        self.shape.nope, self.shape.v_dim, self.shape.rank = nope, v_dim, rank
        self.shape.block_size, self.shape.rows = block_size, 1

    def run(self, uintptr_t q, int64_t q_stride, uintptr_t cache, int64_t num_blocks, uintptr_t block_table,
            int64_t table_width, uintptr_t kv_len, int tokens, uintptr_t k_up, int64_t k_up_stride, uintptr_t v_up,
            int64_t v_up_stride, float scale, uintptr_t out, int threads):
        cdef CLatentPrefill a = self.shape
        cdef int64_t bad
        a.q, a.q_stride, a.k, a.out = <const void*> q, q_stride, <const void*> cache, <void*> out
        a.block_table, a.table_stride, a.table_width = <const int32_t*> block_table, table_width, table_width
        a.num_blocks, a.kv_len, a.tokens, a.scale = num_blocks, <const int32_t*> kv_len, tokens, scale
        a.k_up, a.k_up_stride, a.v_up, a.v_up_stride = <const void*> k_up, k_up_stride, <const void*> v_up, v_up_stride
        with nogil:
            bad = c_mla_prefill(self.kernels.table[0], a, threads)
        if bad != OK:
            raise IndexError("mla_prefill: the lengths of the row or a block of it are out of range")
