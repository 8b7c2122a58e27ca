// Products with packed weights (forms.h): y = x · weightᵀ + bias. Included by each isa_*.cc inside its namespace, after
// linear_few.h and linear_many.h.
//
// A weight is w = value · scale + minimum, rounded once, and an output is the sum of w · x over k in order, fused, for
// any number of tokens: its bits depend neither on the batch, nor on the chunk, nor on the thread. A row of the matrix
// is a lane, so nothing is summed across lanes. Values are taken from their words by a mask and a conversion, and the
// place of the bits goes into the scale: four instructions for LANES weights of four bits.

constexpr int PANEL_VECTORS = PANEL_ROWS / LANES;

// IEEE half precision. Finite: where no instruction converts, infinities become numbers.
struct Half {
    uint16_t bits;
};
inline Floats load(const Half* p) {
    Halves x;
    __builtin_memcpy(&x, p, sizeof x);
#if TOKENSPEED_FUSED_BITS == 512
    // Not the plain one, of whose undefined operand GCC 12 warns.
    return bit_copy<Floats>(_mm512_maskz_cvtph_ps(0xffff, bit_copy<__m256i>(x)));
#elif TOKENSPEED_FUSED_BITS == 256
    return bit_copy<Floats>(_mm256_cvtph_ps(bit_copy<__m128i>(x)));
#else
    const Words words = __builtin_convertvector(x, Words);
    const Floats size = bit_copy<Floats>((words & 0x7fff) << 13) * 0x1p112f;
    return bit_copy<Floats>(bit_copy<Words>(size) | (words & 0x8000) << 16);
#endif
}

inline Words words_at(const char* p) {
    Words x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// Each form: a view of one vector of rows of a group. turn<I>() prepares for the elements of part I, at<I>(w) gives
// those of word w.
struct PlainFloats {
    static constexpr int PARTS = 1;
    static constexpr int64_t BYTES = plain_group_bytes(4);
    const char* words;
    PlainFloats(const char* group, int vector) : words(group + vector * LANES * 4) {}
    template <int I>
    void turn() {}
    template <int I>
    Floats at(int w) const {
        return load(reinterpret_cast<const float*>(words + w * PANEL_ROWS * 4));
    }
};

struct PlainBFloat16s {
    static constexpr int PARTS = 2;
    static constexpr int64_t BYTES = plain_group_bytes(2);
    const char* words;
    PlainBFloat16s(const char* group, int vector) : words(group + vector * LANES * 4) {}
    template <int I>
    void turn() {}
    template <int I>
    Floats at(int w) const {
        const Words pair = words_at(words + w * PANEL_ROWS * 4);
        return bit_copy<Floats>(I == 0 ? pair << 16 : pair & 0xffff0000u);
    }
};

// Four bits, 0 to 15. Without stored minimums, 8 stands for zero.
template <class Scale, bool MINIMUMS>
struct Nibbles {
    static constexpr int PARTS = 8;
    static constexpr int64_t HEAD = PANEL_ROWS * sizeof(Scale);
    static constexpr int64_t BYTES = nibble_group_bytes(sizeof(Scale), MINIMUMS);
    const char* words;
    Floats scale, minimum, turned;
    Nibbles(const char* group, int vector) : words(group + (MINIMUMS ? 2 : 1) * HEAD + vector * LANES * 4) {
        const Scale* scales = reinterpret_cast<const Scale*>(group) + vector * LANES;
        scale = load(scales);
        if constexpr (MINIMUMS) {
            minimum = load(scales + PANEL_ROWS);
        } else {
            minimum = scale * -8.f;
        }
    }
    template <int I>
    void turn() {
        turned = I == PARTS - 1 ? scale : scale * (1.f / static_cast<float>(1u << 4 * I));
    }
    template <int I>
    Floats at(int w) const {
        const Words pack = words_at(words + w * PANEL_ROWS * 4);
        const Words value = I == PARTS - 1 ? pack >> 28 : pack & (15u << 4 * I);
        return fused(__builtin_convertvector(bit_copy<Ints>(value), Floats), turned, minimum);
    }
};

// Five or six bits, 0 to 63: the lower four as in Nibbles, the upper ones moved behind them. Without stored minimums, the
// middle of the range stands for zero. SPANS scales (and minimums) are for GROUP / SPANS columns each.
template <int BITS, class Scale, bool MINIMUMS, int SPANS>
struct WideNibbles {
    static constexpr int PARTS = 8, LAST = PARTS - 1, UPPER = BITS - 4;
    static constexpr int64_t HEAD = PANEL_ROWS * sizeof(Scale) * SPANS;
    static constexpr int64_t BYTES = split_group_bytes(BITS, sizeof(Scale), MINIMUMS, SPANS);
    static constexpr uint32_t UPPER_MASK = (1u << UPPER) - 1;
    const char* words;
    Floats scales[SPANS], minimums[SPANS], turned, minimum;
    WideNibbles(const char* group, int vector) : words(group + (MINIMUMS ? 2 : 1) * HEAD + vector * LANES * 4) {
        const Scale* numbers = reinterpret_cast<const Scale*>(group) + vector * LANES;
        for (int s = 0; s < SPANS; ++s) {
            scales[s] = load(numbers + s * PANEL_ROWS);
            if constexpr (MINIMUMS) {
                minimums[s] = load(numbers + (SPANS + s) * PANEL_ROWS);
            } else {
                minimums[s] = scales[s] * -static_cast<float>(1 << (BITS - 1));
            }
        }
    }
    template <int I>
    void turn() {
        constexpr int SPAN = I * SPANS / PARTS;
        turned = I == LAST ? scales[SPAN] : scales[SPAN] * (1.f / static_cast<float>(1u << 4 * I));
        minimum = minimums[SPAN];
    }
    template <int I>
    Floats at(int w) const {
        const Words low = words_at(words + w * PANEL_ROWS * 4);
        const Words high = words_at(words + (GROUP / PARTS + UPPER * w / 4) * PANEL_ROWS * 4);
        const int place = UPPER * w % 4;
        Words value;
        if constexpr (I == LAST) {
            value = low >> 28 | (high >> (24 + place) & UPPER_MASK << 4);
        } else {
            value = (low & 15u << 4 * I) | (high << (4 - place) & UPPER_MASK << (4 * I + 4));
        }
        return fused(__builtin_convertvector(bit_copy<Ints>(value), Floats), turned, minimum);
    }
};

// Eight bits, signed, read as the upper byte of an integer.
struct Bytes {
    static constexpr int PARTS = 4;
    static constexpr int64_t HEAD = PANEL_ROWS * sizeof(Half);
    static constexpr int64_t BYTES = byte_group_bytes();
    const char* words;
    Floats scale;
    Bytes(const char* group, int vector) : words(group + HEAD + vector * LANES * 4) {
        scale = load(reinterpret_cast<const Half*>(group) + vector * LANES) * 0x1p-24f;
    }
    template <int I>
    void turn() {}
    template <int I>
    Floats at(int w) const {
        Words value = words_at(words + w * PANEL_ROWS * 4);
        if constexpr (I < 3) value = value << (24 - 8 * I);
        if constexpr (I > 0) value = value & 0xff000000u;
        return __builtin_convertvector(bit_copy<Ints>(value), Floats) * scale;
    }
};

template <class F>
using Parts = typename CountLanes<F::PARTS>::type;

// sums[r][n] += the elements of part P of row vector r · token n; `x` is at the part's first element. Inlined whatever the
// compiler thinks of the size: called, it would keep its sums in memory.
template <int P, int R, int N, class F>
[[gnu::always_inline]] inline void part_products(F (&views)[R], const float* x, int64_t x_stride,
                                                 Floats (&sums)[R][N]) {
    for (int r = 0; r < R; ++r) views[r].template turn<P>();
#pragma GCC unroll 8
    for (int w = 0; w < GROUP / F::PARTS; ++w) {
        if constexpr (N == 1) {
            const Floats token = splat(x[w]);
            for (int r = 0; r < R; ++r) sums[r][0] = fused(views[r].template at<P>(w), token, sums[r][0]);
        } else {
            Floats weights[R];
            for (int r = 0; r < R; ++r) weights[r] = views[r].template at<P>(w);
            for (int n = 0; n < N; ++n) {
                const Floats token = splat(x[n * x_stride + w]);
                for (int r = 0; r < R; ++r) sums[r][n] = fused(weights[r], token, sums[r][n]);
            }
        }
    }
}

// The same for the groups of S panels: row vector r is the r % PANEL_VECTORS-th of panel r / PANEL_VECTORS.
template <class F, int N, int R, int... I, int... J>
[[gnu::always_inline]] inline void group_products(const char* const* groups, const float* x, int64_t x_stride,
                                                  Floats (&sums)[R][N], Lanes<I...>, Lanes<J...>) {
    F views[R] = {F(groups[J / PANEL_VECTORS], J % PANEL_VECTORS)...};
    (part_products<I>(views, x + I * (GROUP / F::PARTS), x_stride, sums), ...);
}

// S panels from `panel` on against N tokens → totals[n][S · PANEL_ROWS].
template <class F, int S, int N>
inline void panel_products(const char* panel, int64_t groups, const float* x, int64_t x_stride, float* totals) {
    constexpr int64_t AHEAD = F::BYTES < 1024 ? 4 : 2;
    constexpr int ROWS = S * PANEL_VECTORS;
    Floats sums[ROWS][N] = {};
    const int64_t panel_bytes = groups * F::BYTES;
    const char* at[S];
    for (int s = 0; s < S; ++s) at[s] = panel + s * panel_bytes;
    for (int64_t g = 0; g < groups; ++g) {
        // Behind a panel's end comes its successor in this stream, S panels on.
        const int64_t ahead = AHEAD * F::BYTES + (g + AHEAD < groups ? 0 : (S - 1) * panel_bytes);
        for (int s = 0; s < S; ++s) {
            for (int64_t line = 0; line < F::BYTES; line += 64) __builtin_prefetch(at[s] + ahead + line);
        }
        group_products<F>(at, x + g * GROUP, x_stride, sums, Parts<F>{}, typename CountLanes<ROWS>::type{});
        for (int s = 0; s < S; ++s) at[s] += F::BYTES;
    }
    for (int n = 0; n < N; ++n) {
        for (int r = 0; r < ROWS; ++r) store(totals + (n * ROWS + r) * LANES, sums[r][n]);
    }
}

template <class F, int S, int N, class T>
inline void few_of_panels(const Linear& a, const float* x, int64_t panel) {
    float totals[N * S * PANEL_ROWS];
    const int64_t groups = a.groups(), row = panel * PANEL_ROWS;
    const char* weight = static_cast<const char*>(a.weight) + panel * groups * F::BYTES;
    panel_products<F, S, N>(weight, groups, x, a.packed_stride(), totals);
    const int rows = static_cast<int>(a.rows - row < S * PANEL_ROWS ? a.rows - row : S * PANEL_ROWS);
    for (int n = 0; n < N; ++n) {
        write_sums(a, static_cast<const T*>(a.bias), n, row, rows, totals + n * S * PANEL_ROWS);
    }
}

// Panels [first, last) against all tokens, at most PANELS_FEW, of `x` [tokens, packed_stride()].
template <class F, class T>
void panels_few(const Linear& a, const float* x, int64_t first, int64_t last) {
    const auto all = [&](auto tokens) {
        constexpr int N = decltype(tokens)::value;
        // Eight sums in flight hide the latency of a product, if there are registers for them.
        constexpr int VECTORS = PANEL_VECTORS * N;
        constexpr int S = VECTORS > (F::PARTS == 8 ? 2 : 4) ? 1 : F::PARTS * VECTORS <= 4 ? 4 : 2;
        int64_t panel = first;
        for (; panel + S <= last; panel += S) few_of_panels<F, S, N, T>(a, x, panel);
        for (; panel < last; ++panel) few_of_panels<F, 1, N, T>(a, x, panel);
    };
    static_assert(PANELS_FEW == 4);
    if (a.tokens == 4) {
        all(Width<4>{});
    } else if (a.tokens == 3) {
        all(Width<3>{});
    } else if (a.tokens == 2) {
        all(Width<2>{});
    } else {
        all(Width<1>{});
    }
}

// The groups [first, last) of one panel → strip [(last - first) · GROUP, stride], PANEL_ROWS of each row.
template <class F, int... I>
inline void unpack(const char* panel, int64_t first, int64_t last, float* strip, int64_t stride, Lanes<I...>) {
    constexpr int WORDS = GROUP / F::PARTS;
    for (int64_t g = first; g < last; ++g, strip += GROUP * stride) {
        for (int v = 0; v < PANEL_VECTORS; ++v) {
            F view(panel + g * F::BYTES, v);
            const auto part = [&]<int P>(Width<P>) {
                view.template turn<P>();
                for (int w = 0; w < WORDS; ++w) {
                    store(strip + (P * WORDS + w) * stride + v * LANES, view.template at<P>(w));
                }
            };
            (part(Width<I>{}), ...);
        }
    }
}

constexpr int PANELS_OF_STRIP = STRIP / PANEL_ROWS;

// Panels [first, last) against the tokens [begin, end) of `x` [tokens, packed_stride()].
template <class F, class T>
void panels_many(const Linear& a, const float* x, int64_t begin, int64_t end, int64_t first, int64_t last,
                 float* scratch) {
    const int tokens = static_cast<int>(end - begin);
    const int64_t groups = a.groups(), stride = a.packed_stride();
    float* strip = scratch;
    float* sums = strip + STRIP * LINEAR_DEPTH;
    for (int64_t panel = first; panel < last; panel += PANELS_OF_STRIP) {
        const int count = static_cast<int>(last - panel < PANELS_OF_STRIP ? last - panel : PANELS_OF_STRIP);
        const char* weight = static_cast<const char*>(a.weight) + panel * groups * F::BYTES;
        for (int64_t g = 0; g < groups; g += LINEAR_DEPTH / GROUP) {
            const int64_t till = groups - g < LINEAR_DEPTH / GROUP ? groups : g + LINEAR_DEPTH / GROUP;
            for (int s = 0; s < count; ++s) {
                unpack<F>(weight + s * groups * F::BYTES, g, till, strip + s * PANEL_ROWS, STRIP, Parts<F>{});
            }
            product(x + begin * stride + g * GROUP, stride, strip, tokens, count * static_cast<int>(PANEL_ROWS),
                    static_cast<int>((till - g) * GROUP), g > 0, sums);
        }
        const int64_t row = panel * PANEL_ROWS;
        const int rows = static_cast<int>(a.rows - row < count * PANEL_ROWS ? a.rows - row : count * PANEL_ROWS);
        for (int t = 0; t < tokens; ++t) {
            write_sums(a, static_cast<const T*>(a.bias), begin + t, row, rows, sums + t * STRIP);
        }
    }
}

// Tokens [begin, end) as floats, zeros behind the last column.
template <class T>
void panels_widen(const Linear& a, int64_t begin, int64_t end, float* widened) {
    const int64_t whole = a.columns - a.columns % LANES, stride = a.packed_stride();
    for (int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
        float* to = widened + t * stride;
        for (int64_t k = 0; k < whole; k += LANES) store(to + k, load(x + k));
        for (int64_t k = whole; k < stride; ++k) to[k] = k < a.columns ? load_one(x + k) : 0;
    }
}

// Row `row` of a packed table → out [columns].
template <class F, class T>
void panels_row(const void* table, int64_t row, int64_t columns, void* out_) {
    const int64_t groups = (columns + GROUP - 1) / GROUP, lane = row % PANEL_ROWS;
    const char* panel = static_cast<const char*>(table) + row / PANEL_ROWS * groups * F::BYTES;
    T* out = static_cast<T*>(out_);
    float strip[GROUP * PANEL_ROWS];
    for (int64_t g = 0; g < groups; ++g) {
        unpack<F>(panel, g, g + 1, strip, PANEL_ROWS, Parts<F>{});
        for (int64_t k = 0; k < GROUP && g * GROUP + k < columns; ++k) {
            store_one(out + g * GROUP + k, strip[k * PANEL_ROWS + lane]);
        }
    }
}

template <class F, class T>
constexpr FormKernels form_of() {
    return FormKernels{.few = panels_few<F, T>, .many = panels_many<F, T>, .row = panels_row<F, T>};
}

template <class T>
struct PlainOf {
    using type = PlainFloats;
};
template <>
struct PlainOf<BFloat16> {
    using type = PlainBFloat16s;
};
