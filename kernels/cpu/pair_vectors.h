// The products of pairs.h in vectors: a row of a panel is a lane, and one instruction multiplies and adds a pair.
// Included by isa_avx512_bf16.cc inside its namespace, after pairs.h.
//
// A Zen 4 core does 200 to 222 GFLOP/s of them from 8 tokens on: as much as it can start. float32 has half.

// So far ahead of its use each panel is asked for, into the second-level cache: into the first, whose waiting lines are few,
// one token of all the products of a small model took 13 ms instead of 11.3, of eight-bit weights 12 instead of 6.8.
constexpr int64_t ASKED_BYTES = 4096;

inline Floats add_pairs(Floats sums, Words weights, const char* token) {
    uint32_t pair;
    __builtin_memcpy(&pair, token, sizeof pair);
    const Words all = Words{} + pair;
    const __m512bh left = bit_copy<__m512bh>(weights), right = bit_copy<__m512bh>(all);
    return bit_copy<Floats>(_mm512_dpbf16_ps(bit_copy<__m512>(sums), left, right));
}

// sums [P] [N, 16] (from zero if `first`), panel_sums apart, += P panels, panel_bytes apart, · N tokens. With FETCH the
// weights come from memory and those AHEAD are asked for; behind the last of the `left` groups comes a panel's successor
// in this stream, P panels on.
template <int P, int N, bool FETCH>
inline void multiply_vectors(const char* x, int rows, const char* weight, int64_t panel_bytes, int64_t groups,
                             int64_t left, bool first, float* sums, int64_t panel_sums) {
    constexpr int64_t AHEAD = P == 1 ? 8 : ASKED_BYTES / GROUP_BYTES;
    Floats totals[P][N];
    const auto at = [&](int p, int n) { return sums + p * panel_sums + n * PANEL_ROWS; };
    for (int p = 0; p < P; ++p) {
        for (int n = 0; n < N; ++n) totals[p][n] = first ? Floats{} : load(at(p, n));
    }
    for (int64_t g = 0; g < groups; ++g, x += rows * GROUP_WORDS * 4, weight += GROUP_BYTES) {
        const int64_t ahead = AHEAD * GROUP_BYTES + (g + AHEAD < left ? 0 : (P - 1) * panel_bytes);
        for (int w = 0; w < GROUP_WORDS; ++w) {
            Words words[P];
            for (int p = 0; p < P; ++p) {
                const char* line = weight + p * panel_bytes + w * 64;
                words[p] = words_at(line);
                if constexpr (FETCH) __builtin_prefetch(line + ahead, 0, 2);
            }
            for (int n = 0; n < N; ++n) {
                for (int p = 0; p < P; ++p) {
                    totals[p][n] = add_pairs(totals[p][n], words[p], x + (n * GROUP_WORDS + w) * 4);
                }
            }
        }
    }
    for (int p = 0; p < P; ++p) {
        for (int n = 0; n < N; ++n) store(at(p, n), totals[p][n]);
    }
}

// Panels [first, last) against one block of tokens, P panels by N tokens at a time, `depth` groups of them. words(first
// panel, their number, first group, groups, stride) gives bfloat16 words of P or one, and sets the bytes from panel to
// panel.
template <int P, int N, bool FETCH, class Words_>
inline void strips_of_vectors(const Linear& a, const Pairs& x, int64_t begin, int64_t first, int64_t last, int64_t depth,
                              float* sums, const Words_& words) {
    const int64_t size = x.rows * PANEL_ROWS;
    for (int64_t panel = first; panel < last;) {
        const int64_t count = last - panel < P ? 1 : P, stride = count * size;
        const auto multiply = count == P ? multiply_vectors<P, N, FETCH> : multiply_vectors<1, N, FETCH>;
        for (int64_t g = 0; g == 0 || g < x.groups; g += depth) {
            const int64_t till = x.groups - g < depth ? x.groups - g : depth;
            int64_t panel_bytes = 0;
            const char* weight = words(panel, count, g, till, panel_bytes);
            for (int64_t t = 0; t < x.tiles; ++t) {
                for (int n = 0; n < x.rows; n += N) {
                    multiply(x.tile(t, g) + n * GROUP_WORDS * 4, x.rows, weight, panel_bytes, till, x.groups - g, g == 0,
                             sums + t * stride + n * PANEL_ROWS, size);
                }
            }
        }
        for (int64_t p = 0; p < count; ++p) write_pairs(a, x, begin, panel + p, sums + p * size, stride, 0, x.tiles);
        panel += count;
    }
}

// bfloat16 panels, as they lie.
inline void plain_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                        float* scratch) {
    const Pairs x(packed, end - begin, a.groups());
    const auto words = [&](int64_t panel, int64_t, int64_t g, int64_t, int64_t& panel_bytes) {
        panel_bytes = x.groups * GROUP_BYTES;
        return static_cast<const char*>(a.weight) + panel * panel_bytes + g * GROUP_BYTES;
    };
    const auto multiply = [&](auto panels, auto tokens) {
        const int64_t whole = x.groups + 1;
        strips_of_vectors<panels.value, tokens.value, true>(a, x, begin, first, last, whole, scratch, words);
    };
    // One tile is multiplied in one pass, so that the memory is read while products are made: of two passes the first
    // would wait for memory and the second read none. More tiles take turns, four rows of sums by four.
    switch (x.tiles == 1 ? x.rows : 0) {
        case 1: return multiply(Width<4>{}, Width<1>{});
        case 2: return multiply(Width<4>{}, Width<2>{});
        case 8: return multiply(Width<2>{}, Width<8>{});
        case 16: return multiply(Width<1>{}, Width<16>{});
        default: return multiply(Width<4>{}, Width<4>{});
    }
}

// Quantised panels, rounded to bfloat16 strip by strip: F is their view of panels.h.
template <class F>
inline void rounded_pairs(const Linear& a, const Pairs& x, int64_t begin, int64_t first, int64_t last, float* scratch) {
    constexpr int64_t DEPTH = STRIP_GROUPS / 2, BYTES = DEPTH * GROUP_BYTES;
    char* strip = reinterpret_cast<char*>(scratch);
    const auto words = [&](int64_t panel, int64_t count, int64_t g, int64_t till, int64_t& panel_bytes) {
        panel_bytes = BYTES;
        return round_strip<F>(a, panel, count, g, till, panel_bytes, strip);
    };
    strips_of_vectors<4, 4, false>(a, x, begin, first, last, DEPTH, scratch + 4 * (BYTES / 4), words);
}

// totals[n] += scale · (a group of a panel · token n) + minimum · (sum of the token).
template <class F, int N>
[[gnu::always_inline]] inline void add_scaled(const Floats (&products)[N], Floats scale, Floats minimum,
                                              const float* token_sums, Floats (&totals)[N]) {
    for (int n = 0; n < N; ++n) {
        totals[n] = fused(products[n], scale, totals[n]);
        if constexpr (F::MINIMUMS) totals[n] = fused(splat(token_sums[n]), minimum, totals[n]);
    }
}

// sums [P] [N, 16], panel_sums apart, = P quantised panels · N tokens. Words are made in registers: through memory they
// cost 68 ns a group, more than eight tokens' products.
template <class F, int P, int N>
inline void multiply_scaled(const char* x, const float* token_sums, int rows, const char* weight, int64_t groups,
                            float* sums, int64_t panel_sums) {
    constexpr int64_t AHEAD = ASKED_BYTES / F::BYTES;
    const int64_t panel_bytes = groups * F::BYTES;
    Floats totals[P][N] = {};
    for (int64_t g = 0; g < groups; ++g, x += rows * GROUP_WORDS * 4, token_sums += rows, weight += F::BYTES) {
        const int64_t ahead = AHEAD * F::BYTES + (g + AHEAD < groups ? 0 : (P - 1) * panel_bytes);
        const char* of[P];
        for (int p = 0; p < P; ++p) {
            of[p] = weight + p * panel_bytes;
            for (int64_t line = 0; line < F::BYTES; line += 64) __builtin_prefetch(of[p] + ahead + line, 0, 2);
        }
        Floats products[P][N] = {};
        each<GROUP_WORDS>([&](auto w) {
            for (int p = 0; p < P; ++p) {
                const Words words = typename F::Group(of[p]).template pair<w.value>();
                for (int n = 0; n < N; ++n) {
                    products[p][n] = add_pairs(products[p][n], words, x + (n * GROUP_WORDS + w.value) * 4);
                }
            }
        });
        for (int p = 0; p < P; ++p) {
            Floats scale, minimum = {};
            F::head(of[p], reinterpret_cast<float*>(&scale), reinterpret_cast<float*>(&minimum));
            add_scaled<F, N>(products[p], scale, minimum, token_sums, totals[p]);
        }
    }
    for (int p = 0; p < P; ++p) {
        for (int n = 0; n < N; ++n) store(sums + p * panel_sums + n * PANEL_ROWS, totals[p][n]);
    }
}

// P quantised panels from `panel` on against one block of tokens, N at a time.
template <class F, int P, int N>
inline void scaled_panels(const Linear& a, const Pairs& x, int64_t begin, int64_t panel, float* scratch) {
    const char* weight = static_cast<const char*>(a.weight) + panel * x.groups * F::BYTES;
    const int64_t size = x.rows * PANEL_ROWS;
    for (int64_t n = 0; n < x.tokens; n += N) {
        const int64_t t = n / x.rows, in = n % x.rows;
        multiply_scaled<F, P, N>(x.tile(t, 0) + in * GROUP_WORDS * 4, x.sums_of(t, 0) + in, x.rows, weight, x.groups,
                                 scratch + t * P * size + in * PANEL_ROWS, size);
    }
    for (int p = 0; p < P; ++p) write_pairs(a, x, begin, panel + p, scratch + p * size, P * size, 0, x.tiles);
}

// Quantised panels [first, last) against one block of tokens.
template <class F>
void scaled_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                  float* scratch) {
    const Pairs x(packed, end - begin, a.groups());
    if (a.tokens > PAIRS_FEW && !a.float_out) {
        return rounded_pairs<typename F::View>(a, x, begin, first, last, scratch);
    }
    // As many panels side by side as hide the latency of a sum, and keep enough lines on their way from memory.
    const auto all = [&](auto tokens, auto panels) {
        constexpr int N = tokens.value, P = panels.value;
        for (; first + P <= last; first += P) scaled_panels<F, P, N>(a, x, begin, first, scratch);
        for (; first < last; ++first) scaled_panels<F, 1, N>(a, x, begin, first, scratch);
    };
    switch (x.rows) {
        case 1: return all(Width<1>{}, Width<4>{});
        case 2: return all(Width<2>{}, Width<4>{});
        case 4: return all(Width<4>{}, Width<2>{});
        default: return all(Width<8>{}, Width<1>{});
    }
}

template <class F>
void scaled_pack(const Linear& a, int64_t begin, int64_t end, float* packed) {
    pairs_pack<F::MINIMUMS>(a, begin, end, packed);
}
