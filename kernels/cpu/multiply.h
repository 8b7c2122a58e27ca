// Products of float32 matrices in the cache: STEP_ROWS × STEP_VECTORS vectors of sums in registers. Included by
// each isa_*.cc inside its namespace, after simd.h.

template <int N>
struct Width {
    static constexpr int value = N;
};

constexpr int STEP_ROWS = 6;
constexpr int STEP_VECTORS = LANES == 16 ? 4 : 2;

// c[M, V·LANES] = (c · factor or 0) + a[M, depth] · b, row k of b at b_row(k). Without factors they are 1. Sums run over k
// in order and are fused, so their bits depend on no other row.
template <int V, int M, bool ACCUMULATE, class BRow>
inline void multiply_step(const float* a, int64_t a_stride, const BRow& b_row, int depth, const float* factor, float* c,
                          int64_t c_stride) {
    Floats sums[M][V];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < V; ++v) {
            sums[m][v] = Floats{};
            if constexpr (ACCUMULATE) {
                sums[m][v] = load(c + m * c_stride + v * LANES);
                if (factor != nullptr) sums[m][v] = sums[m][v] * factor[m];
            }
        }
    }
    for (int k = 0; k < depth; ++k) {
        const float* b = b_row(k);
        Floats right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
        for (int m = 0; m < M; ++m) {
            const Floats left = splat(a[m * a_stride + k]);
            for (int v = 0; v < V; ++v) sums[m][v] = fused(left, right[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < V; ++v) store(c + m * c_stride + v * LANES, sums[m][v]);
    }
}

// c[rows, columns] likewise; `b_row(k)` is offset by the column. Columns outermost: a strip of b stays in L1. Rows are
// cut evenly: 8 in steps of 6 and 2 would leave most registers idle in the second.
template <bool ACCUMULATE, class BRow>
inline void multiply(const float* a, int64_t a_stride, const BRow& b_row, int rows, int columns, int depth,
                     const float* factor, float* c, int64_t c_stride) {
    int n = 0;
    const int steps = (rows + STEP_ROWS - 1) / STEP_ROWS;
    const auto strip = [&](auto width) {
        const auto shifted = [&](int k) { return b_row(k) + n; };
        for (int step = 0; step < steps; ++step) {
            const int m = rows * step / steps, count = rows * (step + 1) / steps - m;
            const auto run = [&](auto exact) {
                multiply_step<decltype(width)::value, decltype(exact)::value, ACCUMULATE>(
                    a + m * a_stride, a_stride, shifted, depth, factor == nullptr ? nullptr : factor + m,
                    c + m * c_stride + n, c_stride);
            };
            static_assert(STEP_ROWS == 6);
            switch (count) {
                case 6: run(Width<6>{}); break;
                case 5: run(Width<5>{}); break;
                case 4: run(Width<4>{}); break;
                case 3: run(Width<3>{}); break;
                case 2: run(Width<2>{}); break;
                default: run(Width<1>{}); break;
            }
        }
        n += decltype(width)::value * LANES;
    };
    while (n + STEP_VECTORS * LANES <= columns) strip(Width<STEP_VECTORS>{});
    while (n < columns) strip(Width<1>{});
}

// sums[tokens, STRIP] = (sums or 0) + x[tokens, depth] · strip[depth, columns ≤ STRIP].
constexpr int STRIP = STEP_VECTORS * LANES < 16 ? 16 : STEP_VECTORS * LANES;
inline void product(const float* x, int64_t x_stride, const float* strip, int tokens, int columns, int depth,
                    bool accumulate, float* sums) {
    const auto row = [&](int k) { return strip + k * STRIP; };
    if (accumulate) {
        multiply<true>(x, x_stride, row, tokens, columns, depth, nullptr, sums, STRIP);
    } else {
        multiply<false>(x, x_stride, row, tokens, columns, depth, nullptr, sums, STRIP);
    }
}
