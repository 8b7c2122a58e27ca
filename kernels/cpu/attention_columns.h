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
