// Products of a few tokens with quantised panels in vectors, which have the bits that tiles give them: a token alone
// would pay there for words that a block of tokens shares. Included by isa_amx.cc inside its namespace, after pairs.h.
//
// A tile product of a group adds up, fused and in order, the lower numbers of its 16 pairs, likewise the upper ones,
// and then the two sums; numbers below the normal ones are zeros, those that come and those that are made. Lower
// numbers are a group's first 16 columns, so tokens are floats as they lie: [tokens, groups, 32], then their sums
// [tokens, groups].
//
// A column of 16 rows takes three instructions (shift or shuffle, conversion or "or", sum) of the two ports that have
// vectors: 19 ns a group of eight bits from the cache. From memory four panels side by side keep enough lines on their
// way: 204 → 132 µs for 576 → 3,072 of q8_0, where one panel at a time took 170 to 220.

// While it lives, vectors of this thread know no denormal numbers, as tiles never do.
class NormalNumbers {
public:
    NormalNumbers() {
        constexpr unsigned ZEROS_OUT = 1u << 15, ZEROS_IN = 1u << 6;
        asm volatile("stmxcsr %0" : "=m"(before_) : : "memory");
        set(before_ | ZEROS_OUT | ZEROS_IN);
    }
    ~NormalNumbers() { set(before_); }
    NormalNumbers(const NormalNumbers&) = delete;
    NormalNumbers& operator=(const NormalNumbers&) = delete;

private:
    static void set(unsigned state) { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
    unsigned before_;
};

// Tokens [begin, end) as ordered_panels takes them.
template <bool SUMS>
void ordered_pack(const Linear& a, int64_t begin, int64_t end, float* packed) {
    panels_widen<BFloat16>(a, begin, end, packed - begin * a.packed_stride());
    if constexpr (SUMS) {
        float* sums = packed + (end - begin) * a.packed_stride();
        for (const float* group = packed; group < sums; group += GROUP) {
            sums[(group - packed) / GROUP] = halved_sum<1>(load(group) + load(group + LANES));
        }
    }
}

// totals[n] [16] += a group of a panel · token n. The loop over columns is unrolled, so that a column's place in its
// word is known.
template <class F, int N>
inline void ordered_group(const char* from, int64_t groups, const float* x, const float* token_sums, float* totals) {
    Floats lower[N] = {}, upper[N] = {};
    const typename F::Group group(from);
    [&]<int... K>(Lanes<K...>) {
        const auto add = [&]<int C>(Width<C>) {
            const Floats low = group.template number<C>(), high = group.template number<C + GROUP / 2>();
            for (int n = 0; n < N; ++n) {
                const float* token = x + n * groups * GROUP + C;
                lower[n] = fused(low, splat(token[0]), lower[n]);
                upper[n] = fused(high, splat(token[GROUP / 2]), upper[n]);
            }
        };
        (add(Width<K>{}), ...);
    }(AllLanes{});
    Floats scale, minimum;
    F::head(from, reinterpret_cast<float*>(&scale), reinterpret_cast<float*>(&minimum));
    for (int n = 0; n < N; ++n) {
        Floats total = fused(lower[n] + upper[n], scale, load(totals + n * PANEL_ROWS));
        if constexpr (F::MINIMUMS) total = fused(splat(token_sums[n * groups]), minimum, total);
        store(totals + n * PANEL_ROWS, total);
    }
}

// Panels [first, last) against N tokens, all of the block.
template <class F, int N>
inline void ordered_panels(const Linear& a, const float* packed, int64_t begin, int64_t first, int64_t last) {
    constexpr int64_t PANELS = 4, AHEAD = 4;
    const Pairs x(packed, N, a.groups());
    const int64_t panel_bytes = x.groups * F::BYTES;
    const float* token_sums = packed + N * a.packed_stride();
    float totals[PANELS][N * PANEL_ROWS];
    for (int64_t panel = first; panel < last;) {
        const int64_t count = last - panel < PANELS ? last - panel : PANELS;
        const char* group = static_cast<const char*>(a.weight) + panel * panel_bytes;
        __builtin_memset(totals, 0, sizeof totals);
        for (int64_t g = 0; g < x.groups; ++g, group += F::BYTES) {
            const int64_t ahead = AHEAD * F::BYTES + (g + AHEAD < x.groups ? 0 : (count - 1) * panel_bytes);
            for (int64_t p = 0; p < count; ++p) {
                const char* of = group + p * panel_bytes;
                for (int64_t line = 0; line < F::BYTES; line += 64) __builtin_prefetch(of + ahead + line);
                ordered_group<F, N>(of, x.groups, packed + g * GROUP, token_sums + g, totals[p]);
            }
        }
        for (int64_t p = 0; p < count; ++p) write_pairs(a, x, begin, panel + p, totals[p], N * PANEL_ROWS, 0, 1);
        panel += count;
    }
}

// Panels [first, last) against one block of at most ORDERED tokens.
template <class F>
inline void ordered_pairs(const Linear& a, const float* packed, int64_t begin, int64_t end, int64_t first,
                          int64_t last) {
    static_assert(F::ORDERED <= ORDERED_FEW && ORDERED_FEW == 3);
    if constexpr (F::ORDERED >= 3) {
        if (end - begin == 3) return ordered_panels<F, 3>(a, packed, begin, first, last);
    }
    if constexpr (F::ORDERED >= 2) {
        if (end - begin == 2) return ordered_panels<F, 2>(a, packed, begin, first, last);
    }
    ordered_panels<F, 1>(a, packed, begin, first, last);
}
