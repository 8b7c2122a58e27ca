// Products of bfloat16 tokens with packed weights (forms.h) where one instruction multiplies pairs of numbers: y = x
// · weightᵀ + bias. Included by each isa_*.cc that has them inside its namespace, after panels.h; pair_vectors.h or
// pair_tiles.h follows, which multiply.
//
// A word of a bfloat16 panel is the pair (k, 16 + k) of a group, so tokens are put into such pairs, once, and weights
// are used as they lie: a group of a panel is 16 × 16 words. Quantised weights become words of small whole numbers,
// which bfloat16 holds exactly, for a few groups and all tokens; scales and minimums are applied to the group's
// sums in float32, so that a weight is the number of the file here too. For more than PAIRS_FEW tokens, whose outputs
// are bfloat16, they are rounded to it instead: three times as fast, and the error of a product becomes √2 times as
// large. An output is the same sum in the same order for any number of tokens beside it, of those up to PAIRS_FEW and
// of those above.
//
// Tokens lie in tiles of Pairs::rows: words [tiles, groups, rows, 16], zeros behind the last token, then, for forms
// with minimums, the tokens' sums [tiles, groups, rows].

typedef uint16_t Shorts __attribute__((vector_size(64)));

constexpr int64_t GROUP_WORDS = GROUP / 2;
constexpr int64_t GROUP_BYTES = PANEL_ROWS * GROUP_WORDS * 4;  // a group of words
constexpr int64_t STRIP_GROUPS = 20;  // at most: a strip of two panels stays in L1

struct Pairs {
    const float* words;
    const float* sums;
    int64_t groups;
    int64_t tiles;
    int64_t tokens;
    int rows;

    Pairs(const float* packed, int64_t count, int64_t num_groups)
        : words(packed),
          sums(packed + pair_tokens(count) * num_groups * GROUP_WORDS),
          groups(num_groups),
          tiles(pair_tokens(count) / pair_rows(count)),
          tokens(count),
          rows(static_cast<int>(pair_rows(count))) {}
    const char* tile(int64_t t, int64_t group) const {
        return reinterpret_cast<const char*>(words + (t * groups + group) * rows * GROUP_WORDS);
    }
    int64_t tile_bytes() const { return groups * rows * GROUP_WORDS * 4; }
    const float* sums_of(int64_t t, int64_t group) const { return sums + (t * groups + group) * rows; }
};

// 0, 16, 1, 17, …
template <int... I>
inline Shorts interleaved(Lanes<I...>) {
    return Shorts{(I / 2 + I % 2 * 16)...};
}

template <int N, class Body>
[[gnu::always_inline]] inline void each(const Body& body) {
    [&]<int... I>(Lanes<I...>) { (body(Width<I>{}), ...); }(typename CountLanes<N>::type{});
}

// Quantised forms: head() gives what each row's sum over the group is multiplied with, and what the tokens' sum is; a
// Group its words, pair by pair, or the same numbers as floats, column by column. The words of four bits are 16 +
// value: an "or" makes them, and the 16 goes into the minimum. Up to ORDERED tokens vectors beat tiles (pair_order.h).
template <class Scale, bool HAS_MINIMUMS>
struct NibblePairs {
    using View = Nibbles<Scale, HAS_MINIMUMS>;
    static constexpr int64_t BYTES = View::BYTES;
    static constexpr bool MINIMUMS = true;
    static constexpr int ORDERED = 1;

    static void head(const char* group, float* scales, float* minimums) {
        const Scale* at = reinterpret_cast<const Scale*>(group);
        const Floats scale = load(at);
        store(scales, scale);
        if constexpr (HAS_MINIMUMS) {
            store(minimums, fused(scale, splat(-16.f), load(at + PANEL_ROWS)));
        } else {
            store(minimums, scale * -24.f);
        }
    }
    struct Group {
        Words words[4];
        explicit Group(const char* group) {
            const char* from = group + (HAS_MINIMUMS ? 2 : 1) * View::HEAD;
            for (int w = 0; w < 4; ++w) words[w] = words_at(from + w * PANEL_ROWS * 4);
        }
        // Of column C.
        template <int C>
        Floats number() const {
            constexpr int UP = 19 - C / 4 * 4;
            const Words moved = UP > 0 ? words[C % 4] << (UP > 0 ? UP : 0) : words[C % 4] >> (UP < 0 ? -UP : 0);
            return bit_copy<Floats>((moved & 0x00780000u) | 0x41800000u);
        }
        // Of columns I and GROUP / 2 + I.
        template <int I>
        Words pair() const {
            constexpr int W = I % 4, DOWN = I / 4 * 4 - 3;
            const Words moved = DOWN > 0 ? words[W] >> (DOWN > 0 ? DOWN : 0) : words[W] << (DOWN < 0 ? -DOWN : 0);
            return (moved & 0x00780078u) | 0x41804180u;
        }
    };
};

// Eight bits: converted in the upper byte of an integer, 2^24 too large. Bytes come there by instructions of both ports
// that have vectors, and one permutation under a mask puts two numbers' upper halves together.
struct BytePairs {
    using View = Bytes;
    static constexpr int64_t BYTES = Bytes::BYTES;
    static constexpr bool MINIMUMS = false;
    static constexpr int ORDERED = 3;

    static void head(const char* group, float* scales, float*) {
        store(scales, load(reinterpret_cast<const Half*>(group)) * 0x1p-24f);
    }
    // Byte I of each word.
    template <int I>
    static Floats number(Words words) {
        if constexpr (I == 0) {
            words = words << 24;
        } else if constexpr (I == 3) {
            words = words & 0xff000000u;
        } else {
            const Words byte_of_word = bit_copy<Words>(lane_index() % 4 * 4 + I) << 24;
            const __m512i places = bit_copy<__m512i>(byte_of_word | 0x00808080u);  // zeros below it
            words = bit_copy<Words>(_mm512_shuffle_epi8(bit_copy<__m512i>(words), places));
        }
        return __builtin_convertvector(bit_copy<Ints>(words), Floats);
    }
    struct Group {
        Words words[8];
        explicit Group(const char* group) {
            for (int w = 0; w < 8; ++w) words[w] = words_at(group + Bytes::HEAD + w * PANEL_ROWS * 4);
        }
        // Of column C.
        template <int C>
        Floats number() const {
            return BytePairs::number<C / 8>(words[C % 8]);
        }
        // Of columns I and GROUP / 2 + I.
        template <int I>
        Words pair() const {
            const __m512i low = bit_copy<__m512i>(number<I>()), high = bit_copy<__m512i>(number<I + GROUP / 2>());
            return bit_copy<Words>(_mm512_mask_alignr_epi8(high, 0x3333333333333333u, low, low, 2));
        }
    };
};

// A group of one of panels.h's forms as words of weights, rounded to bfloat16.
template <class F>
inline void round_group(const char* group, char* to) {
    constexpr int WORDS = GROUP / F::PARTS, HALF = F::PARTS / 2;
    const __m512i order = bit_copy<__m512i>(interleaved(typename CountLanes<GROUP>::type{}));
    F low(group, 0), high(group, 0);
    const auto part = [&]<int P>(Width<P>) {
        low.template turn<P>();
        high.template turn<P + HALF>();
        for (int w = 0; w < WORDS; ++w, to += PANEL_ROWS * 4) {
            const auto rounded = _mm512_cvtne2ps_pbh(bit_copy<__m512>(high.template at<P + HALF>(w)),
                                                     bit_copy<__m512>(low.template at<P>(w)));
            const __m512i pairs = _mm512_maskz_permutexvar_epi16(0xffffffffu, order, bit_copy<__m512i>(rounded));
            __builtin_memcpy(to, &pairs, sizeof pairs);
        }
    };
    [&]<int... I>(Lanes<I...>) { (part(Width<I>{}), ...); }(typename CountLanes<HALF>::type{});
}

// The groups [g, g + till) of `count` quantised panels as such words, panel_bytes from panel to panel.
template <class F>
inline const char* round_strip(const Linear& a, int64_t panel, int64_t count, int64_t g, int64_t till,
                               int64_t panel_bytes, char* strip) {
    const int64_t groups = a.groups();
    for (int64_t p = 0; p < count; ++p) {
        const char* group = static_cast<const char*>(a.weight) + ((panel + p) * groups + g) * F::BYTES;
        char* to = strip + p * panel_bytes;
        for (int64_t i = 0; i < till; ++i) round_group<F>(group + i * F::BYTES, to + i * GROUP_BYTES);
    }
    return strip;
}

// Of all lanes, in four steps.
template <int S>
inline float halved_sum(Floats x) {
    x = low<S>(x, x, AllLanes{}) + high<S>(x, x, AllLanes{});
    if constexpr (S * 2 < LANES) {
        return halved_sum<S * 2>(x);
    } else {
        return x[0];
    }
}

// Tokens [begin, end) as the tiles of one block.
template <bool SUMS>
void pairs_pack(const Linear& a, int64_t begin, int64_t end, float* packed) {
    const Pairs x(packed, end - begin, a.groups());
    for (int64_t t = 0; t < x.tiles * x.rows; ++t) {
        float* words = packed + (t / x.rows * x.groups * x.rows + t % x.rows) * GROUP_WORDS;
        float* sums = const_cast<float*>(x.sums) + t / x.rows * x.groups * x.rows + t % x.rows;
        const BFloat16* token = static_cast<const BFloat16*>(a.x) + (begin + t) * a.x_stride;
        const int64_t columns = t < x.tokens ? a.columns : 0;
        for (int64_t g = 0; g < x.groups; ++g, words += x.rows * GROUP_WORDS, sums += x.rows) {
            Halves low = {}, high = {};
            if ((g + 1) * GROUP <= columns) {
                __builtin_memcpy(&low, token + g * GROUP, sizeof low);
                __builtin_memcpy(&high, token + g * GROUP + GROUP / 2, sizeof high);
            } else if (g * GROUP < columns) {
                BFloat16 rest[GROUP] = {};
                const std::size_t left = static_cast<std::size_t>(columns - g * GROUP);
                __builtin_memcpy(rest, token + g * GROUP, left * sizeof(BFloat16));
                __builtin_memcpy(&low, rest, sizeof low);
                __builtin_memcpy(&high, rest + GROUP / 2, sizeof high);
            }
            const Words pairs = __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
            __builtin_memcpy(words, &pairs, sizeof pairs);
            if constexpr (SUMS) {
                *sums = halved_sum<1>(bit_copy<Floats>(pairs << 16) + bit_copy<Floats>(pairs & 0xffff0000u));
            }
        }
    }
}

// The outputs of one panel for the tokens of the tiles [tile, tile + several): sums [several, rows, 16], a tile
// `stride` floats behind the one before.
inline void write_pairs(const Linear& a, const Pairs& x, int64_t begin, int64_t panel, const float* sums,
                        int64_t stride, int64_t tile, int64_t several) {
    const BFloat16* bias = static_cast<const BFloat16*>(a.bias);
    const int64_t row = panel * PANEL_ROWS;
    const int rows = static_cast<int>(a.rows - row < PANEL_ROWS ? a.rows - row : PANEL_ROWS);
    const Floats added = bias == nullptr || rows < PANEL_ROWS ? Floats{} : load(bias + row);
    const int64_t end = (tile + several) * x.rows < x.tokens ? (tile + several) * x.rows : x.tokens;
    for (int64_t t = tile * x.rows; t < end; ++t) {
        const float* of = sums + (t / x.rows - tile) * stride + t % x.rows * PANEL_ROWS;
        if (rows < PANEL_ROWS) {
            write_sums(a, bias, begin + t, row, rows, of);
            continue;
        }
        const int64_t at = (begin + t) * a.rows + row;
        const Floats y = bias == nullptr ? load(of) : load(of) + added;
        if (a.float_out) {
            store(static_cast<float*>(a.out) + at, y);
        } else {
            const __m256bh rounded = _mm512_cvtneps_pbh(bit_copy<__m512>(y));
            __builtin_memcpy(static_cast<BFloat16*>(a.out) + at, &rounded, sizeof rounded);
        }
    }
}
