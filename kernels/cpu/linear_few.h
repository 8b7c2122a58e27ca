// linear for few tokens: y = x · weightᵀ + bias. Included by each isa_*.cc inside its namespace, after simd.h.
//
// Dot products of weights, read where they lie, with packed tokens, STEP elements at a time into one vector of
// sums an output. The order of an output's sum depends on K alone (lanes, then panels), so its bits depend
// neither on the tokens beside it nor on the thread. A block of LINEAR_ROWS weight rows comes from memory once
// for all tokens; while it is used, the next one is fetched: 9.5 → 11.8 GB/s on one Zen 3 core.

constexpr int STEP = 2 * LANES;
template <class T>
constexpr int64_t LINE = 64 / sizeof(T);  // elements of a cache line

// A step of weights: as its two halves (float32), or as its even and its odd elements (bfloat16), which are
// widened without a shuffle. A packed token is float32 in the same order.
template <class T>
struct Step {
    using Packed = float;
    Floats parts[2];

    void read(const float* p) {
        parts[0] = load(p);
        parts[1] = load(p + LANES);
    }
    void read(const BFloat16* p) {
        Words pairs;
        __builtin_memcpy(&pairs, p, sizeof pairs);
        parts[0] = bit_copy<Floats>(pairs << 16);
        parts[1] = bit_copy<Floats>(pairs & 0xffff0000u);
    }
    void pack(float* packed) const {
        store(packed, parts[0]);
        store(packed + LANES, parts[1]);
    }
};

// sums[r] += weights[r] · token, lane by lane.
template <int R, class T>
inline void accumulate(const Step<T> (&weights)[R], const float* token, Floats* sums) {
    for (int half = 0; half < 2; ++half) {
        const Floats value = load(token + half * LANES);
        for (int r = 0; r < R; ++r) sums[r] = fused(weights[r].parts[half], value, sums[r]);
    }
}

#ifdef TOKENSPEED_BFLOAT16_PRODUCTS
// One instruction multiplies pairs and adds them in float32, so nothing is widened.
template <>
struct Step<BFloat16> {
    using Packed = BFloat16;
    Words pairs;

    void read(const BFloat16* p) { __builtin_memcpy(&pairs, p, sizeof pairs); }
    void pack(BFloat16* packed) const { __builtin_memcpy(packed, &pairs, sizeof pairs); }
};

#endif

// The `count` < STEP elements at p, then zeros.
template <class T>
inline void read_rest(const T* p, int64_t count, Step<T>& step) {
    T rest[STEP] = {};
    __builtin_memcpy(rest, p, static_cast<std::size_t>(count) * sizeof(T));
    step.read(rest);
}

template <class T>
void linear_few_pack(const Linear& a, int64_t begin, int64_t end, void* packed_) {
    using Packed = typename Step<T>::Packed;
    const int64_t whole = a.columns - a.columns % STEP;
    for (int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
        Packed* packed = static_cast<Packed*>(packed_) + t * a.packed_stride();
        Step<T> step;
        for (int64_t k = 0; k < whole; k += STEP) {
            step.read(x + k);
            step.pack(packed + k);
        }
        if (whole < a.columns) {
            read_rest(x + whole, a.columns - whole, step);
            step.pack(packed + whole);
        }
    }
}

// `rows` outputs of token t, from weight row n on.
template <class T>
inline void write_sums(const Linear& a, const T* bias, int64_t t, int64_t n, int rows, const float* sums) {
    const auto write = [&](auto* out) {
        out += t * a.rows + n;
        for (int r = 0; r < rows; ++r) store_one(out + r, bias == nullptr ? sums[r] : sums[r] + load_one(bias + n + r));
    };
    if (a.float_out) {
        write(static_cast<float*>(a.out));
    } else {
        write(static_cast<T*>(a.out));
    }
}

// A panel of weight rows and of packed tokens, both from the panel's first element on.
template <class T>
struct Panel {
    const T* weight;
    int64_t weight_stride;
    const typename Step<T>::Packed* x;
    int64_t x_stride;
    int64_t size;
};

// totals[n · LINEAR_ROWS + r] += weight row r · token n, for R rows and N tokens.
template <int R, int N, class T>
inline void dot_products_of_panel(const Panel<T>& panel, bool fetch, float* totals) {
    constexpr int VECTORS = (R * N + LANES - 1) / LANES;
    constexpr int64_t FETCH = STEP < LINE<T> ? LINE<T> : STEP;
    Floats sums[VECTORS * LANES] = {};
    Step<T> weights[R];
    const auto step = [&](int64_t k) {
        for (int r = 0; r < R; ++r) weights[r].read(panel.weight + r * panel.weight_stride + k);
        for (int n = 0; n < N; ++n) accumulate(weights, panel.x + n * panel.x_stride + k, sums + n * R);
    };
    int64_t k = 0;
    for (; k + FETCH <= panel.size; k += FETCH) {
        if (fetch) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(panel.weight + r * panel.weight_stride + k + R * panel.weight_stride);
        }
        for (int64_t i = 0; i < FETCH; i += STEP) step(k + i);
    }
    for (; k + STEP <= panel.size; k += STEP) step(k);
    if (k < panel.size) {
        for (int r = 0; r < R; ++r) read_rest(panel.weight + r * panel.weight_stride + k, panel.size - k, weights[r]);
        for (int n = 0; n < N; ++n) accumulate(weights, panel.x + n * panel.x_stride + k, sums + n * R);
    }
    for (int v = 0; v < VECTORS; ++v) {
        const Floats each = sum_each(sums + v * LANES);
        for (int i = 0; i < LANES && v * LANES + i < R * N; ++i) {
            totals[(v * LANES + i) / R * LINEAR_ROWS + (v * LANES + i) % R] += each[i];
        }
    }
}

// `rows` ≤ LINEAR_ROWS weight rows, R at a time, against N tokens.
template <int R, int N, class T>
inline void rows_of_panel(Panel<T> panel, int rows, bool fetch, float* totals) {
    int r = 0;
    for (; r + R <= rows; r += R, panel.weight += R * panel.weight_stride) {
        dot_products_of_panel<R, N>(panel, fetch, totals + r);
    }
    for (; r < rows; ++r, panel.weight += panel.weight_stride) dot_products_of_panel<1, N>(panel, fetch, totals + r);
}

// `rows` ≤ LINEAR_ROWS weight rows against so many tokens.
template <class T>
inline void tokens_of_panel(Panel<T> panel, int rows, int64_t tokens, float* totals) {
    constexpr int WIDE = LANES == 16 ? 4 : 2;  // rows × tokens in flight must fit the registers
    bool fetch = true;
    const auto block = [&](auto rows_at_once, auto tokens_at_once) {
        constexpr int N = decltype(tokens_at_once)::value;
        rows_of_panel<decltype(rows_at_once)::value, N>(panel, rows, fetch, totals);
        fetch = false;
        panel.x += N * panel.x_stride, totals += N * LINEAR_ROWS, tokens -= N;
    };
    while (tokens >= 4) block(Width<WIDE>{}, Width<4>{});
    if (tokens == 3) return block(Width<WIDE>{}, Width<3>{});
    if (tokens == 2) return block(Width<4>{}, Width<2>{});
    if (tokens == 1) return block(Width<8>{}, Width<1>{});
}

#ifdef TOKENSPEED_BFLOAT16_PRODUCTS
constexpr int64_t ROWS_AHEAD = 2 * LINEAR_ROWS;

// The same sums of bfloat16, held in registers: in an array that functions are handed they go through memory in every
// step (GCC 12), 83 GFLOP/s of a Zen 4 core where this has 162. Meanwhile the columns [fetch_first, fetch_last) of rows
// to come are fetched, into the second-level cache: rows of 4 KiB share few lines of the first. With eight rows ahead
// in that one, a token alone had 18 GB/s where it has 23.
template <int R, int N>
inline void dot_pairs_of_panel(const Panel<BFloat16>& panel, int64_t fetch_first, int64_t fetch_last,
                               float* totals) {
    const int64_t stride = panel.weight_stride, x_stride = panel.x_stride;
    Floats sums[N][R] = {};
    for (int64_t k = 0; k < panel.size; k += STEP) {
        const __mmask32 mask = panel.size - k < STEP ? (1u << (panel.size - k)) - 1 : ~__mmask32{0};
        if (k >= fetch_first && k < fetch_last) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(panel.weight + (ROWS_AHEAD + r) * stride + k, 0, 2);
        }
        __m512bh rows[R];
        for (int r = 0; r < R; ++r) {
            rows[r] = bit_copy<__m512bh>(_mm512_maskz_loadu_epi16(mask, panel.weight + r * stride + k));
        }
        for (int n = 0; n < N; ++n) {
            Step<BFloat16> token;
            token.read(panel.x + n * x_stride + k);
            for (int r = 0; r < R; ++r) {
                sums[n][r] = bit_copy<Floats>(
                    _mm512_dpbf16_ps(bit_copy<__m512>(sums[n][r]), rows[r], bit_copy<__m512bh>(token.pairs)));
            }
        }
    }
    constexpr int VECTORS = (R * N + LANES - 1) / LANES;
    Floats all[VECTORS * LANES] = {};
#pragma GCC unroll 16  // or it is a copy of memory, and the sums are memory
    for (int i = 0; i < R * N; ++i) all[i] = sums[i / R][i % R];
    float each[VECTORS * LANES];
    for (int v = 0; v < VECTORS; ++v) store(each + v * LANES, sum_each(all + v * LANES));
    for (int n = 0; n < N; ++n) {
        for (int r = 0; r < R; ++r) totals[n * LINEAR_ROWS + r] += each[n * R + r];
    }
}

template <int R>
inline void pairs_of_panel(Panel<BFloat16> panel, int64_t tokens, float* totals) {
    constexpr int N = R > 4 ? 2 : 4;  // at once: sixteen sums
    const int64_t blocks = (tokens + N - 1) / N;
    for (int64_t i = 0; i < blocks; ++i, panel.x += N * panel.x_stride, totals += N * LINEAR_ROWS, tokens -= N) {
        const int64_t first = panel.size * i / blocks, last = panel.size * (i + 1) / blocks;
        if (tokens >= N) {
            dot_pairs_of_panel<R, N>(panel, first, last, totals);
        } else if (tokens == 1) {
            dot_pairs_of_panel<R, 1>(panel, first, last, totals);
        } else if (tokens == 2) {
            dot_pairs_of_panel<R, 2>(panel, first, last, totals);
        } else {
            dot_pairs_of_panel<R, N == 4 ? 3 : 1>(panel, first, last, totals);
        }
    }
}

// Rows outermost: a few of them stay in the cache, and the next ones come evenly while all tokens are multiplied.
inline void tokens_of_panel(Panel<BFloat16> panel, int rows, int64_t tokens, float* totals) {
    if (tokens <= 2 && rows == LINEAR_ROWS) return pairs_of_panel<LINEAR_ROWS>(panel, tokens, totals);
    int r = 0;
    for (; r + 4 <= rows; r += 4, panel.weight += 4 * panel.weight_stride) pairs_of_panel<4>(panel, tokens, totals + r);
    for (; r < rows; ++r, panel.weight += panel.weight_stride) pairs_of_panel<1>(panel, tokens, totals + r);
}
#endif

// Weight rows [first_row, last_row) against the packed tokens [begin, end). `totals`: LINEAR_ROWS × (end - begin).
template <class T>
void linear_few_rows(const Linear& a, const void* packed, int64_t begin, int64_t end, int64_t first_row, int64_t last_row,
                     float* totals) {
    const T* bias = static_cast<const T*>(a.bias);
    Panel<T> panel;
    panel.weight_stride = a.weight_stride;
    panel.x_stride = a.packed_stride();
    for (int64_t n = first_row; n < last_row && n < first_row + LINEAR_ROWS; ++n) {
        const T* row = static_cast<const T*>(a.weight) + n * a.weight_stride;
        for (int64_t k = 0; k < a.columns && k < LINEAR_PANEL; k += LINE<T>) __builtin_prefetch(row + k);
    }
    for (int64_t n = first_row; n < last_row; n += LINEAR_ROWS) {
        const int rows = static_cast<int>(last_row - n < LINEAR_ROWS ? last_row - n : LINEAR_ROWS);
        for (int64_t i = 0; i < LINEAR_ROWS * (end - begin); ++i) totals[i] = 0;
        for (int64_t k = 0; k < a.columns; k += LINEAR_PANEL) {
            panel.size = a.columns - k < LINEAR_PANEL ? a.columns - k : LINEAR_PANEL;
            panel.weight = static_cast<const T*>(a.weight) + n * a.weight_stride + k;
            panel.x = static_cast<const typename Step<T>::Packed*>(packed) + begin * panel.x_stride + k;
            tokens_of_panel(panel, rows, end - begin, totals);
        }
        for (int64_t t = begin; t < end; ++t) {
            write_sums(a, bias, t, n, rows, totals + (t - begin) * LINEAR_ROWS);
        }
    }
}
