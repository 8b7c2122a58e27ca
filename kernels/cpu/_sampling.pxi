# The sampler's part of _ops.pyx.

cdef extern from "kernels.h" namespace "tokenspeed::cpu" nogil:
    cdef cppclass Sampling:
        float* logits
        const int32_t* slots
        int32_t* tokens
        const int32_t* features
        const float* temperature
        const int32_t* top_k
        const float* top_p
        const float* min_p
        const float* repetition
        const float* presence
        const float* frequency
        const int32_t* min_length
        const int64_t* seed
        const int64_t* length
        int64_t* last_token
        const float* bias
        int32_t* seen
        const int32_t* mask
        int64_t vocab
        int64_t mask_words
        int64_t num_slots

    int64_t c_sample "tokenspeed::cpu::sample"(const Table&, const Sampling&, int64_t, int) except +


cdef class SamplerTables:
    """The sampler's tables of all slots."""

    cdef Kernels kernels
    cdef Sampling tables

    def __cinit__(self, Kernels kernels, int64_t num_slots, int64_t vocab, int64_t mask_words, uintptr_t features,
                  uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t repetition,
                  uintptr_t presence, uintptr_t frequency, uintptr_t min_length, uintptr_t seed, uintptr_t length,
                  uintptr_t last_token, uintptr_t bias, uintptr_t seen, uintptr_t mask):
        self.kernels = kernels
        self.tables.num_slots, self.tables.vocab, self.tables.mask_words = num_slots, vocab, mask_words
        self.tables.features, self.tables.temperature = <const int32_t*> features, <const float*> temperature
        self.tables.top_k, self.tables.top_p = <const int32_t*> top_k, <const float*> top_p
        self.tables.min_p, self.tables.repetition = <const float*> min_p, <const float*> repetition
        self.tables.presence, self.tables.frequency = <const float*> presence, <const float*> frequency
        self.tables.min_length, self.tables.seed = <const int32_t*> min_length, <const int64_t*> seed
        self.tables.length, self.tables.last_token = <const int64_t*> length, <int64_t*> last_token
        self.tables.bias, self.tables.seen = <const float*> bias, <int32_t*> seen
        self.tables.mask = <const int32_t*> mask

    def sample(self, uintptr_t logits, uintptr_t slots, uintptr_t tokens, int64_t rows, int threads):
        cdef Sampling s = self.tables
        cdef int64_t bad
        s.logits, s.slots, s.tokens = <float*> logits, <const int32_t*> slots, <int32_t*> tokens
        with nogil:
            bad = c_sample(self.kernels.table[0], s, rows, threads)
        if bad != OK:
            raise IndexError(f"sample: the slot of row {bad} is not among the {s.num_slots} of the tables")
