// Products of float32 matrices in the cache: STEP_ROWS × STEP_VECTORS vectors of sums in registers. Included by
// each isa_*.cc inside its namespace, after simd.h.

template <int N>
struct Width {
    static constexpr int value = N;
};

constexpr int STEP_ROWS = 6;
constexpr int STEP_VECTORS = LANES == 16 ? 4 : 2;

// c[STEP_ROWS, V·LANES] = (c · factor or 0) + a[STEP_ROWS, depth] · b, row k of b at b_row(k).
template <int V, bool ACCUMULATE, class BRow>
inline void multiply_step(const float* a, int64_t a_stride, const BRow& b_row, int depth, const float* factor, float* c,
                          int64_t c_stride) {
    Floats sums[STEP_ROWS][V];
    for (int m = 0; m < STEP_ROWS; ++m) {
        for (int v = 0; v < V; ++v) {
            sums[m][v] = ACCUMULATE ? load(c + m * c_stride + v * LANES) * factor[m] : Floats{};
        }
    }
    for (int k = 0; k < depth; ++k) {
        const float* b = b_row(k);
        Floats right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
        for (int m = 0; m < STEP_ROWS; ++m) {
            const Floats left = splat(a[m * a_stride + k]);
            for (int v = 0; v < V; ++v) sums[m][v] += left * right[v];
        }
    }
    for (int m = 0; m < STEP_ROWS; ++m) {
        for (int v = 0; v < V; ++v) store(c + m * c_stride + v * LANES, sums[m][v]);
    }
}

// c[rows, columns] likewise; `b_row(k)` is offset by the column. Columns outermost: a strip of b stays in L1.
template <bool ACCUMULATE, class BRow>
inline void multiply(const float* a, int64_t a_stride, const BRow& b_row, int rows, int columns, int depth,
                     const float* factor, float* c, int64_t c_stride) {
    int n = 0;
    const auto strip = [&](auto width) {
        const auto shifted = [&](int k) { return b_row(k) + n; };
        for (int m = 0; m < rows; m += STEP_ROWS) {
            multiply_step<decltype(width)::value, ACCUMULATE>(a + m * a_stride, a_stride, shifted, depth, factor + m,
                                                              c + m * c_stride + n, c_stride);
        }
        n += decltype(width)::value * LANES;
    };
    while (n + STEP_VECTORS * LANES <= columns) strip(Width<STEP_VECTORS>{});
    while (n < columns) strip(Width<1>{});
}
