// The products of attention_packed.h in vectors. Included by isa_avx512_bf16.cc inside its namespace, after
// attention_pairs.h.

// What a thread must hold to multiply_columns.
struct ColumnProducts {};

// c [V tiles] (from zero, or from itself) += the `depth` tiles of 16 rows at a times those of each of V tiles of
// columns at b, b_stride words apart. Sixteen sums are in flight: so many rows of one, two or four tiles.
template <int V, bool ACCUMULATE>
inline void multiply_columns(const float* a, const float* b, int64_t b_stride, int depth, float* c) {
    constexpr int ROWS = SIDE / V;
    for (int m = 0; m < SIDE; m += ROWS) {
        Floats sums[ROWS][V] = {};
        if constexpr (ACCUMULATE) {
            for (int r = 0; r < ROWS; ++r) {
                for (int v = 0; v < V; ++v) sums[r][v] = load(c + v * TILE_WORDS + (m + r) * SIDE);
            }
        }
        for (int t = 0; t < depth; ++t) {
            const float* left = a + t * TILE_WORDS + m * SIDE;
            const float* right = b + t * TILE_WORDS;
            for (int k = 0; k < SIDE; ++k) {
                Words columns[V];
                for (int v = 0; v < V; ++v) columns[v] = bit_copy<Words>(load(right + v * b_stride + k * SIDE));
                for (int r = 0; r < ROWS; ++r) {
                    const Words row = Words{} + bit_copy<uint32_t>(left[r * SIDE + k]);
                    for (int v = 0; v < V; ++v) sums[r][v] = dot_pairs(sums[r][v], row, columns[v]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < V; ++v) store(c + v * TILE_WORDS + (m + r) * SIDE, sums[r][v]);
        }
    }
}

// c [16 × 16, one for each 16 rows] = rows where they lie, 16 from each of `count` (≤ 4) places on, `stride` numbers
// apart, times the `depth` tiles of columns at b. Of `next`, if not null, the rows are fetched meanwhile.
inline void multiply_in_place(const BFloat16* base, const int64_t* offset, int count, int64_t stride, const float* b,
                              int depth, const int64_t* next, float* c) {
    for (int i = 0; i < count; ++i, c += TILE_WORDS) {
        Floats sums[SIDE] = {};
        const BFloat16* rows[4];
        for (int q = 0; q < 4; ++q) rows[q] = base + offset[i * SIDE] + q * 4 * stride;
        for (int t = 0; t < depth; ++t) {
            if (next != nullptr) {
                for (int r = 0; r < SIDE; ++r) fetch<64>(base + next[i * SIDE + r] + t * 2 * SIDE);
            }
            for (int k = 0; k < SIDE; ++k) {
                const Words column = bit_copy<Words>(load(b + t * TILE_WORDS + k * SIDE));
                for (int r = 0; r < SIDE; ++r) {
                    uint32_t pair;
                    __builtin_memcpy(&pair, rows[r / 4] + r % 4 * stride + t * 2 * SIDE + 2 * k, sizeof pair);
                    sums[r] = dot_pairs(sums[r], Words{} + pair, column);
                }
            }
        }
        for (int r = 0; r < SIDE; ++r) store(c + r * SIDE, sums[r]);
    }
}
