# The experts' part of _ops.pyx.

cdef extern from "moe.h" namespace "tokenspeed::cpu" nogil:
    cdef cppclass CRoute "tokenspeed::cpu::Route":
        const void* logits
        const float* bias
        int32_t* ids
        float* weights
        int64_t logits_stride
        int64_t tokens
        int64_t present
        int32_t experts
        int32_t top_k
        int32_t num_shared
        int32_t groups
        int32_t top_groups
        float scale
        bint float_logits
        bint sigmoid
        bint normalise

    cdef cppclass CExperts "tokenspeed::cpu::Experts":
        const void* x
        const void* gate_up
        const void* down
        void* out
        const int32_t* ids
        const float* weights
        int64_t x_stride
        int64_t tokens
        int64_t slots
        int64_t experts
        int64_t hidden
        int64_t inner

    const int c_route_most "tokenspeed::cpu::ROUTE_MOST"
    void c_moe_route "tokenspeed::cpu::moe_route"(const Table&, const CRoute&, int) except +
    int64_t c_moe_experts "tokenspeed::cpu::moe_experts"(const Table&, const CExperts&, int) except +


ROUTE_MOST = c_route_most


cdef class MoeRoute:
    """The choice of one model's experts."""

    cdef Kernels kernels
    cdef CRoute shape

    def __cinit__(self, Kernels kernels, int experts, int top_k, int num_shared, int groups, int top_groups,
                  bint sigmoid, bint normalise):
        self.kernels = kernels
        self.shape.experts, self.shape.top_k, self.shape.num_shared = experts, top_k, num_shared
        self.shape.groups, self.shape.top_groups = groups, top_groups
        self.shape.sigmoid, self.shape.normalise = sigmoid, normalise

    def run(self, uintptr_t logits, int64_t stride, bint float_logits, uintptr_t bias, float scale, int64_t tokens,
            uintptr_t num_tokens, uintptr_t ids, uintptr_t weights, int threads):
        cdef CRoute r = self.shape
        r.logits, r.logits_stride, r.float_logits = <const void*> logits, stride, float_logits
        r.bias, r.scale, r.tokens = <const float*> bias, scale, tokens
        r.present = tokens if num_tokens == 0 else (<const int32_t*> num_tokens)[0]
        r.ids, r.weights = <int32_t*> ids, <float*> weights
        with nogil:
            c_moe_route(self.kernels.table[0], r, threads)


cdef class MoeExperts:
    """The experts of one layer's shape."""

    cdef Kernels kernels
    cdef CExperts shape

    def __cinit__(self, Kernels kernels, int64_t experts, int64_t hidden, int64_t inner):
        self.kernels = kernels
        self.shape.experts, self.shape.hidden, self.shape.inner = experts, hidden, inner

    def run(self, uintptr_t x, int64_t x_stride, uintptr_t gate_up, uintptr_t down, uintptr_t ids, uintptr_t weights,
            int64_t tokens, int64_t slots, uintptr_t out, int threads):
        cdef CExperts e = self.shape
        cdef int64_t bad
        e.x, e.x_stride, e.tokens, e.slots = <const void*> x, x_stride, tokens, slots
        e.gate_up, e.down, e.out = <const void*> gate_up, <const void*> down, <void*> out
        e.ids, e.weights = <const int32_t*> ids, <const float*> weights
        with nogil:
            bad = c_moe_experts(self.kernels.table[0], e, threads)
        if bad != OK:
            raise IndexError(f"moe_experts: an expert of token {bad} is not among the {e.experts}")
