// linear for many tokens of bfloat16 where one instruction multiplies pairs of numbers: of experts; the op `linear` leaves
// them to torch, which is as fast. Included by isa_avx512_bf16.cc inside its namespace, after linear_many.h, whose
// strips these are.
//
// A strip of weight rows becomes words of pairs, rows side by side as in a panel, and multiplies all tokens of a block,
// whose pairs are as they were given. A sum runs over the pairs in order, whatever stands beside it.

// Words of a token, from the start of its memory on.
inline int64_t words_of(const Linear& a) { return a.packed_stride() / 2; }

template <>
void linear_many_widen<BFloat16>(const Linear& a, int64_t begin, int64_t end, float* widened) {
    for (int64_t t = begin; t < end; ++t) {
        char* to = reinterpret_cast<char*>(widened + t * words_of(a));
        const std::size_t bytes = static_cast<std::size_t>(a.columns) * sizeof(BFloat16);
        __builtin_memcpy(to, static_cast<const BFloat16*>(a.x) + t * a.x_stride, bytes);
        __builtin_memset(to + bytes, 0, static_cast<std::size_t>(words_of(a)) * sizeof(float) - bytes);
    }
}

// `rows` ≤ STRIP weight rows, `depth` numbers of each → strip [words, STRIP], zeros past either.
inline void pair_weights(const BFloat16* weight, int64_t stride, int rows, int64_t depth, float* strip) {
    for (int n = 0; n < STRIP; n += LANES) {
        for (int64_t k = 0; k < depth; k += STEP) {
            const __mmask32 mask = depth - k < STEP ? (1u << (depth - k)) - 1 : ~__mmask32{0};
            Floats square[LANES];
            for (int i = 0; i < LANES; ++i) {
                const __mmask32 seen = n + i < rows ? mask : 0;
                square[i] = bit_copy<Floats>(_mm512_maskz_loadu_epi16(seen, weight + (n + i) * stride + k));
            }
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(strip + (k / 2 + i) * STRIP + n, square[i]);
        }
    }
}

// sums [N, STRIP] (from zero if `first`) += N tokens · the strip, of so many words.
template <int N>
inline void multiply_strip(const float* x, int64_t x_stride, const float* strip, int64_t words, bool first,
                           float* sums) {
    constexpr int V = STRIP / LANES;
    Floats totals[N][V];
#pragma GCC unroll 16  // as a copy of memory it would keep the sums in memory (GCC 12), at 40% of the rate
    for (int i = 0; i < N * V; ++i) totals[i / V][i % V] = first ? Floats{} : load(sums + i * LANES);
    for (int64_t k = 0; k < words; ++k, strip += STRIP) {
        __m512bh weights[V];
        for (int v = 0; v < V; ++v) weights[v] = bit_copy<__m512bh>(load(strip + v * LANES));
        for (int n = 0; n < N; ++n) {
            const __m512bh pair = bit_copy<__m512bh>(Words{} + bit_copy<uint32_t>(x[n * x_stride + k]));
            for (int v = 0; v < V; ++v) {
                totals[n][v] = bit_copy<Floats>(_mm512_dpbf16_ps(bit_copy<__m512>(totals[n][v]), weights[v], pair));
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N * V; ++i) store(sums + i * LANES, totals[i / V][i % V]);
}

template <>
void linear_many_rows<BFloat16>(const Linear& a, const float* widened, int64_t begin, int64_t end, int64_t first_row,
                                int64_t last_row, float* scratch) {
    constexpr int64_t ROW_LINES = LINEAR_DEPTH * sizeof(BFloat16) / 64, LINES = STRIP * ROW_LINES;
    const int64_t tokens = end - begin, blocks = (tokens + 3) / 4, stride = words_of(a);
    const BFloat16* bias = static_cast<const BFloat16*>(a.bias);
    float* strip = scratch;
    float* sums = strip + STRIP * LINEAR_DEPTH / 2;
    for (int64_t n = first_row; n < last_row; n += STRIP) {
        const int rows = static_cast<int>(last_row - n < STRIP ? last_row - n : STRIP);
        for (int64_t k = 0; k == 0 || k < a.columns; k += LINEAR_DEPTH) {
            const int64_t depth = a.columns - k < LINEAR_DEPTH ? a.columns - k : LINEAR_DEPTH;
            const BFloat16* weight = static_cast<const BFloat16*>(a.weight) + n * a.weight_stride + k;
            pair_weights(weight, a.weight_stride, rows, depth, strip);
            // The next strip comes from memory meanwhile.
            const bool last = k + LINEAR_DEPTH >= a.columns;
            const BFloat16* next = last ? weight - k + STRIP * a.weight_stride : weight + LINEAR_DEPTH;
            for (int64_t i = 0; i < blocks; ++i) {
                for (int64_t line = LINES * i / blocks; line < LINES * (i + 1) / blocks; ++line) {
                    const BFloat16* row = next + line / ROW_LINES * a.weight_stride;
                    __builtin_prefetch(row + line % ROW_LINES * LINE<BFloat16>, 0, 2);
                }
                const float* x = widened + (begin + 4 * i) * stride + k / 2;
                float* of = sums + 4 * i * STRIP;
                const int64_t words = (depth + 1) / 2;
                switch (tokens - 4 * i) {
                    case 1: multiply_strip<1>(x, stride, strip, words, k == 0, of); break;
                    case 2: multiply_strip<2>(x, stride, strip, words, k == 0, of); break;
                    case 3: multiply_strip<3>(x, stride, strip, words, k == 0, of); break;
                    default: multiply_strip<4>(x, stride, strip, words, k == 0, of);
                }
            }
        }
        for (int64_t t = 0; t < tokens; ++t) write_sums(a, bias, begin + t, n, rows, sums + t * STRIP);
    }
}
