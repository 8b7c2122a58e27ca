// The products of pairs.h in vectors: a row of a panel is a lane, and one instruction multiplies and adds a pair.
// Included by isa_avx512_bf16.cc inside its namespace, after pairs.h.

inline Floats add_pairs(Floats sums, Words weights, const char* token) {
    uint32_t pair;
    __builtin_memcpy(&pair, token, sizeof pair);
    const Words all = Words{} + pair;
    const __m512bh left = bit_copy<__m512bh>(weights), right = bit_copy<__m512bh>(all);
    return bit_copy<Floats>(_mm512_dpbf16_ps(bit_copy<__m512>(sums), left, right));
}

// sums [P, rows, 16] = P panels · N tokens, whole rows of the matrix. The weights come from memory and those AHEAD are
// fetched; behind a panel's end comes its successor in this stream, P panels on.
template <int P, int N>
inline void multiply_vectors(const char* x, int rows, const char* weight, int64_t groups, float* sums) {
    constexpr int64_t AHEAD = 2;
    const int64_t panel_bytes = groups * GROUP_BYTES;
    Floats totals[P][N] = {};
    for (int64_t g = 0; g < groups; ++g, x += rows * GROUP_WORDS * 4, weight += GROUP_BYTES) {
        const int64_t ahead = AHEAD * GROUP_BYTES + (g + AHEAD < groups ? 0 : (P - 1) * panel_bytes);
        for (int w = 0; w < GROUP_WORDS; ++w) {
            Words words[P];
            for (int p = 0; p < P; ++p) {
                const char* line = weight + p * panel_bytes + w * 64;
                words[p] = words_at(line);
                __builtin_prefetch(line + ahead);
            }
            for (int n = 0; n < N; ++n) {
                for (int p = 0; p < P; ++p) {
                    totals[p][n] = add_pairs(totals[p][n], words[p], x + (n * GROUP_WORDS + w) * 4);
                }
            }
        }
    }
    for (int p = 0; p < P; ++p) {
        for (int n = 0; n < N; ++n) store(sums + (p * rows + n) * PANEL_ROWS, totals[p][n]);
    }
}

// As many tokens as a tile has, N at a time: body(their number, the first).
template <class Body>
inline void tokens_of_tile(int rows, const Body& body) {
    switch (rows) {
        case 1: return body(Width<1>{}, 0);
        case 2: return body(Width<2>{}, 0);
        default:
            for (int n = 0; n < rows; n += 4) body(Width<4>{}, n);
    }
}

// bfloat16 panels [first, last) against one block of tokens.
inline void plain_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                        float* scratch) {
    const Pairs x(packed, end - begin, a.groups());
    const int64_t size = x.rows * PANEL_ROWS, panel_bytes = x.groups * GROUP_BYTES;
    for (int64_t panel = first; panel < last;) {
        const int64_t count = last - panel < 4 ? 1 : 4, stride = count * size;
        const char* weight = static_cast<const char*>(a.weight) + panel * panel_bytes;
        for (int64_t t = 0; t < x.tiles; ++t) {
            tokens_of_tile(x.rows, [&](auto tokens, int n) {
                const char* from = x.tile(t, 0) + n * GROUP_WORDS * 4;
                float* to = scratch + t * stride + n * PANEL_ROWS;
                count == 4 ? multiply_vectors<4, tokens.value>(from, x.rows, weight, x.groups, to)
                           : multiply_vectors<1, tokens.value>(from, x.rows, weight, x.groups, to);
            });
        }
        for (int64_t p = 0; p < count; ++p) write_pairs(a, x, begin, panel + p, scratch + p * size, stride, 0, x.tiles);
        panel += count;
    }
}
